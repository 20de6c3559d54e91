"""One run at a time in a folder, also after a kill, with forks, and on file systems without locks."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import qlora_neft.run_folder.lock as module
from qlora_neft.errors import UserInputError
from qlora_neft.run_folder.lock import LOCK, run_lock

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
if sys.argv[2] == "no fcntl":
    sys.modules["fcntl"] = None
from pathlib import Path
from qlora_neft.run_folder.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(params=["flock", "no flock here", "no fcntl"])
def kind(request, monkeypatch):
    """What the machine offers: file locks, a file system without them, or no module for them."""
    if request.param == "no fcntl":
        monkeypatch.setattr(module, "fcntl", None)
    if request.param == "no flock here":
        monkeypatch.setattr("fcntl.flock", refuse)
    return request.param


def refuse(descriptor, operation):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.fixture
def processes():
    started = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def hold(tmp_path, kind, processes):
    """Start a process that holds the lock of ``tmp_path``."""

    def start():
        # A script of its own: "no flock here" is the same as "no fcntl" for it, and needs nothing replaced.
        mode = "flock" if kind == "flock" else "no fcntl"
        process = python(HOLD, tmp_path, mode)
        processes.append(process)
        assert process.stdout.readline() == "held\n", process.stderr.read()
        return process

    return start


def python(script, *args):
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def is_free(folder):
    try:
        with run_lock(folder):
            return True
    except UserInputError:
        return False


def leave(folder, age=0.0, **body):
    """A lock file as a killed process leaves it."""
    path = folder / LOCK
    path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": "2024-01-01", **body}))
    os.utime(path, (time.time() - age,) * 2)


def gone_pid():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


# ---- With and without flock ----


@pytest.mark.usefixtures("kind")
def test_held_for_a_block(tmp_path):
    for _ in range(3):
        with run_lock(tmp_path):
            body = json.loads((tmp_path / LOCK).read_text())
            assert (body["pid"], body["host"]) == (os.getpid(), socket.gethostname())
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", body["started"])
        assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_released_after_an_exception(tmp_path, error):
    with pytest.raises(error), run_lock(tmp_path):
        raise error
    assert list(tmp_path.iterdir()) == [] and is_free(tmp_path)


@pytest.mark.usefixtures("kind")
def test_a_second_one_of_this_process_is_refused(tmp_path):
    with run_lock(tmp_path):
        assert not is_free(tmp_path)
    assert is_free(tmp_path)


def test_a_second_process_is_refused_while_the_first_lives(tmp_path, hold):
    first = hold()
    started = json.loads((tmp_path / LOCK).read_text())["started"]
    with pytest.raises(UserInputError) as error, run_lock(tmp_path):
        pass
    assert str(error.value).startswith(
        f"{tmp_path}: another run (process {first.pid} on {socket.gethostname()}, since {started}) is writing there. "
        "Wait for it, stop it, or give another --output-dir."
    )
    assert (tmp_path / LOCK).exists()
    first.communicate("\n")
    assert first.returncode == 0 and is_free(tmp_path)


def test_a_killed_process_is_no_obstacle(tmp_path, hold):
    first = hold()
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert (tmp_path / LOCK).exists() and is_free(tmp_path)
    assert list(tmp_path.iterdir()) == []


CONTEND = """
import os, sys
if sys.argv[2] != "flock":
    sys.modules["fcntl"] = None
from pathlib import Path
from qlora_neft.errors import UserInputError
from qlora_neft.run_folder.lock import run_lock

folder, got = Path(sys.argv[1]), 0
print("ready", flush=True)
sys.stdin.readline()
while got < 60:
    try:
        with run_lock(folder):
            (folder / "mine").mkdir()  # fails if another is in here too
            (folder / "mine").rmdir()
            got += 1
    except UserInputError:
        pass
"""


@pytest.mark.parametrize("kind", ["flock", "no fcntl"], indirect=True)
def test_never_two_at_once(tmp_path, kind, processes):
    """Three processes take and release the lock as fast as they can, so that some open a file just being removed."""
    processes += [python(CONTEND, tmp_path, kind) for _ in range(3)]
    for process in processes:
        process.stdout.readline()
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        err = process.communicate()[1]
        assert process.returncode == 0, err


def test_a_folder_that_cannot_be_written_to(tmp_path):
    tmp_path.chmod(0o555)
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.seteuid(65534)  # root may write everywhere
            with run_lock(tmp_path):
                pass
        except UserInputError as error:
            os._exit(7 if "cannot be opened (Permission denied)" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="this system does not list open descriptors")
@pytest.mark.usefixtures("kind")
def test_no_descriptor_is_left_open(tmp_path):
    before = os.listdir("/proc/self/fd")
    with run_lock(tmp_path):
        assert not is_free(tmp_path)
    leave(tmp_path, pid=gone_pid())
    assert is_free(tmp_path)
    assert os.listdir("/proc/self/fd") == before


# ---- Forks and started programs ----


@pytest.mark.parametrize("kind", ["flock", "no fcntl"], indirect=True)
def test_a_forked_child_leaves_the_block_and_the_lock_stays(tmp_path, kind, processes):
    script = f"""
    import os, sys
    if {kind != "flock"}:
        sys.modules["fcntl"] = None
    from pathlib import Path
    from qlora_neft.run_folder.lock import run_lock
    with run_lock(Path(sys.argv[1])):
        child = os.fork()
        if child:
            print("child left with", os.waitpid(child, 0)[1], flush=True)
            sys.stdin.readline()
    """
    processes.append(python(script, tmp_path))
    assert processes[0].stdout.readline() == "child left with 0\n"
    assert (tmp_path / LOCK).exists() and not is_free(tmp_path)


ORPHAN = """
import os, subprocess, sys, time
from pathlib import Path
from qlora_neft.run_folder.lock import run_lock
with run_lock(Path(sys.argv[1])):
    if sys.argv[2] == "fork":
        child = os.fork()
        if not child:
            time.sleep(60)
    else:
        child = subprocess.Popen(["sleep", "60"], close_fds=False).pid
    print(child, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("way", ["fork", "exec"])
def test_an_orphaned_child_does_not_hold_it(tmp_path, processes, way):
    """A data loader's worker can outlive a killed run."""
    processes.append(python(ORPHAN, tmp_path, way))
    child = int(processes[0].stdout.readline())
    try:
        assert not is_free(tmp_path)
        processes[0].kill()
        processes[0].wait()
        os.kill(child, 0)  # it is alive
        end = time.monotonic() + 30  # a forked child closes the lock when it begins to run
        while not is_free(tmp_path):
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        os.kill(child, signal.SIGKILL)


def test_two_threads(tmp_path):
    free = []
    with run_lock(tmp_path):
        thread = threading.Thread(target=lambda: free.append(is_free(tmp_path)))
        thread.start()
        thread.join()
    assert free == [False]


# ---- With flock, the file's content does not matter ----


@pytest.mark.parametrize("body", [b"", b"\xff\x00", b"[]", b'{"pid": 1, "host": "elsewhere"}' * 500])
def test_any_file_left_behind_is_no_obstacle(tmp_path, body):
    (tmp_path / LOCK).write_bytes(body)
    with run_lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_refused_also_if_the_file_says_nothing(tmp_path):
    with run_lock(tmp_path):
        (tmp_path / LOCK).write_text("")
        with pytest.raises(UserInputError, match=r"process unknown on unknown, since unknown"), run_lock(tmp_path):
            pass


def test_other_errors_are_not_taken_for_missing_locks(tmp_path, monkeypatch):
    def broken(descriptor, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fcntl.flock", broken)
    with pytest.raises(OSError, match="Input/output"), run_lock(tmp_path):
        pass


# ---- Without flock, it does ----


@pytest.mark.parametrize(
    ("body", "age", "free"),
    [
        ({"pid": 1}, 10 * 86400, False),  # process 1 is alive, however old the file is
        ({"pid": gone_pid()}, 0, True),
        ({"pid": os.getpid()}, 0, True),  # a predecessor with the same number: this process knows that it holds no lock
        ({"host": "elsewhere"}, 3600, False),
        ({"host": "elsewhere"}, 86400 + 60, True),
        ({"pid": "?"}, 3600, False),
        ({"pid": -1}, 3600, False),
        ({"pid": 10**30}, 86400 + 60, True),
        ({"pid": None, "host": None}, 3600, False),
    ],
)
def test_whether_a_lock_is_stale(tmp_path, monkeypatch, body, age, free):
    monkeypatch.setattr(module, "fcntl", None)
    leave(tmp_path, age, **body)
    assert is_free(tmp_path) is free
    assert [path.name for path in tmp_path.iterdir()] == ([] if free else [LOCK])


def test_what_to_do_about_one_that_only_seems_held(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fcntl", None)
    leave(tmp_path, host="elsewhere")
    words = rf"If that process is gone, remove {tmp_path / LOCK}\.$"
    with pytest.raises(UserInputError, match=words), run_lock(tmp_path):
        pass


def test_a_stale_lock_is_taken_by_one_of_many(tmp_path, monkeypatch):
    """Moving a stale file aside may catch a new one, just made by a faster process, which is put back."""
    monkeypatch.setattr(module, "fcntl", None)
    leave(tmp_path, pid=gone_pid())
    judged = os.open(tmp_path / LOCK, os.O_RDWR)
    with run_lock(tmp_path):
        module._remove_stale((tmp_path / LOCK).absolute(), judged)
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid() and not is_free(tmp_path)
    os.close(judged)
    assert list(tmp_path.iterdir()) == []
