"""Checkpoints on disk are whole or absent, whatever happens to the process, the disk or the files."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from qlora_neft.errors import UserInputError
from qlora_neft.run_folder.checkpoints import (
    MANIFEST,
    Checkpoint,
    find_checkpoints,
    new_checkpoint,
    prune,
    read_checkpoint,
    remove_leftovers,
    verify,
)

ROOT = Path(__file__).resolve().parents[2]


def write(output_dir, step, content=b"weights", about=None):
    with new_checkpoint(output_dir, step, about or {}) as folder:
        (folder / "model.bin").write_bytes(content)
        (folder / "deep" / "er").mkdir(parents=True)
        (folder / "deep" / "er" / "state.json").write_text("{}")
    return output_dir / f"checkpoint-{step}"


def damage(path):
    (path / "model.bin").write_bytes(b"Weights")


def names(output_dir):
    return sorted(path.name for path in output_dir.iterdir())


def python(script, *args, **kwargs):
    """Start a process that runs a script."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


# ---- Writing and reading ----


def test_what_was_written_is_found(tmp_path):
    path = write(tmp_path / "new" / "run", 12, about={"recipe": "ä", "seed": 1})
    expected = Checkpoint(path, 12, {"recipe": "ä", "seed": 1})
    assert verify(path) == []
    assert read_checkpoint(path) == expected
    assert find_checkpoints(path.parent).newest == expected
    assert names(path.parent) == ["checkpoint-12"]


def test_the_manifest_names_every_file(tmp_path):
    manifest = json.loads((write(tmp_path, 3) / MANIFEST).read_text())
    assert (manifest["manifest_version"], manifest["step"], manifest["about"]) == (1, 3, {})
    assert manifest["files"] == {
        "model.bin": {"sha256": hashlib.sha256(b"weights").hexdigest(), "bytes": 7},
        "deep/er/state.json": {"sha256": hashlib.sha256(b"{}").hexdigest(), "bytes": 2},
    }


def test_files_beyond_the_manifest_are_allowed(tmp_path):
    (write(tmp_path, 3) / "notes.txt").write_text("mine")
    assert verify(tmp_path / "checkpoint-3") == []


def test_others_can_read_it_as_any_new_folder(tmp_path):
    (tmp_path / "usual").mkdir()
    assert write(tmp_path, 3).stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_file_system_without_sync_serves(tmp_path, monkeypatch):
    def cannot(descriptor):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", cannot)
    assert verify(write(tmp_path, 3)) == []


@pytest.mark.parametrize("exists", [False, True])
def test_a_disk_that_loses_data_is_an_error(tmp_path, monkeypatch, exists):
    def cannot(descriptor):
        raise OSError(5, "Input/output error")

    if exists:
        write(tmp_path, 3)
    monkeypatch.setattr(os, "fsync", cannot)
    with pytest.raises(OSError, match="Input/output"):
        write(tmp_path, 3, b"newer")
    assert names(tmp_path) == (["checkpoint-3"] if exists else [])
    assert not exists or verify(tmp_path / "checkpoint-3") == []


def test_a_rename_that_fails_gives_the_old_one_its_name_back(tmp_path, monkeypatch):
    write(tmp_path, 3)
    rename = Path.rename

    def refuse(path, target):
        if ".partial-" in path.name:
            raise OSError(30, "Read-only file system")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Read-only"):
        write(tmp_path, 3, b"newer")
    assert names(tmp_path) == ["checkpoint-3"] and (tmp_path / "checkpoint-3/model.bin").read_bytes() == b"weights"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_in_the_block_leaves_nothing(tmp_path, error):
    write(tmp_path, 3)
    with pytest.raises(error), new_checkpoint(tmp_path, 3, {}) as folder:  # noqa: PT012
        (folder / "half.bin").write_bytes(b"x")
        assert folder.parent == tmp_path and folder.name.startswith(".")
        raise error
    assert names(tmp_path) == ["checkpoint-3"]
    assert verify(tmp_path / "checkpoint-3") == []


def test_what_json_cannot_say_leaves_nothing(tmp_path):
    with pytest.raises(TypeError), new_checkpoint(tmp_path, 3, {"path": object()}):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("broken", [False, True])
def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path, broken):
    path = write(tmp_path, 3)
    (path / "old.bin").write_bytes(b"old")
    if broken:
        damage(path)
    write(tmp_path, 3, b"newer")
    assert (path / "model.bin").read_bytes() == b"newer" and not (path / "old.bin").exists()
    assert names(tmp_path) == ["checkpoint-3"]


# ---- Damage ----


def flip_a_bit(path):
    content = bytearray((path / "model.bin").read_bytes())
    content[3] ^= 4
    (path / "model.bin").write_bytes(content)


def manifest_of(text):
    return lambda path: (path / MANIFEST).write_bytes(text)


def edited(**changes):
    def edit(path):
        content = json.loads((path / MANIFEST).read_text())
        (path / MANIFEST).write_text(json.dumps({**content, **changes}))

    return edit


DAMAGE = {
    "truncated": (lambda path: os.truncate(path / "model.bin", 3), "model.bin has 3 bytes instead of 7"),
    "one bit": (flip_a_bit, "model.bin has another content"),
    "file missing": (lambda path: (path / "deep/er/state.json").unlink(), "deep/er/state.json is missing"),
    "folder instead of file": (
        lambda path: ((path / "model.bin").unlink(), (path / "model.bin").mkdir()),
        "model.bin is missing",
    ),
    "no manifest": (lambda path: (path / MANIFEST).unlink(), "manifest.json is missing"),
    "empty manifest": (manifest_of(b""), "manifest.json cannot be read"),
    "half a manifest": (manifest_of(b'{"manifest_version": 1, "st'), "manifest.json cannot be read"),
    "no UTF-8": (manifest_of(b"\xff\xfe"), "manifest.json cannot be read"),
    "zeros": (manifest_of(bytes(500)), "manifest.json cannot be read"),
    "deep": (manifest_of(b"[" * 200_000), "manifest.json cannot be read"),
    "a list": (manifest_of(b"[1]"), "manifest.json does not describe"),
    "null": (manifest_of(b"null"), "manifest.json does not describe"),
    "nothing in it": (manifest_of(b"{}"), "manifest.json does not describe"),
    "files are a list": (edited(files=["model.bin"]), "manifest.json does not describe"),
    "a file is a word": (edited(files={"model.bin": "sound"}), "manifest.json does not describe"),
    "later version": (edited(manifest_version=2), "manifest.json is not one of version 1"),
    "step is a word": (edited(step="7"), "manifest.json is not one of version 1"),
    "about is a list": (edited(about=[]), "manifest.json is not one of version 1"),
    "another's step": (edited(step=70), "manifest.json is of step 70"),
}


@pytest.mark.parametrize(("harm", "words"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_seen_and_the_one_before_is_used(tmp_path, harm, words):
    write(tmp_path, 5)
    path = write(tmp_path, 7)
    harm(path)
    problems = verify(path)
    assert len(problems) == 1 and problems[0].startswith(words)
    with pytest.raises(UserInputError) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value) and words in str(error.value) and "start over" in str(error.value)
    search = find_checkpoints(tmp_path)
    assert search.newest.step == 5 and search.damaged == [(path, problems)]


def test_every_problem_is_told(tmp_path):
    path = write(tmp_path, 7)
    damage(path)
    (path / "deep/er/state.json").unlink()
    assert len(verify(path)) == 2


def test_a_wrong_size_is_found_without_reading(tmp_path, monkeypatch):
    path = write(tmp_path, 7)
    os.truncate(path / "model.bin", 3)
    (path / "deep/er/state.json").unlink()
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert len(verify(path)) == 2


def test_a_folder_that_is_not_there_is_no_checkpoint(tmp_path):
    with pytest.raises(UserInputError, match=r"manifest\.json is missing"):
        read_checkpoint(tmp_path / "checkpoint-9")


# ---- Finding ----


def test_newest_is_by_number_and_others_names_are_not_looked_at(tmp_path):
    for step in (0, 9, 10):
        write(tmp_path, step)
    for name in ("checkpoint-x", "checkpoint-11-old", "checkpoint-", "checkpoint--12", ".checkpoint-99.partial-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-98").write_text("a file")
    search = find_checkpoints(tmp_path)
    assert search.newest.step == 10 and search.damaged == []


def test_older_ones_are_not_read(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    damage(tmp_path / "checkpoint-1")
    assert find_checkpoints(tmp_path).damaged == []


def test_nothing_sound(tmp_path):
    for step in (1, 2):
        damage(write(tmp_path, step))
    search = find_checkpoints(tmp_path)
    assert search.newest is None and [path.name for path, _ in search.damaged] == ["checkpoint-2", "checkpoint-1"]
    assert find_checkpoints(tmp_path / "missing").newest is None


# ---- Removing ----


@pytest.mark.parametrize(
    ("keep", "damaged", "left"),
    [
        (2, [], [4, 5]),
        (1, [], [5]),
        (0, [], [5]),
        (-3, [], [5]),
        (9, [], [1, 2, 3, 4, 5]),
        (2, [5], [3, 4, 5]),  # a newer damaged one stays and does not count
        (2, [4], [3, 5]),  # one between sound ones is removed and does not count
        (1, [4, 5], [3, 4, 5]),
        (9, [1, 3], [2, 4, 5]),
        (1, [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),  # none is sound: nothing is removed
        (1, [2, 3, 4, 5], [1, 2, 3, 4, 5]),
    ],
)
def test_prune(tmp_path, keep, damaged, left):
    for step in range(1, 6):
        write(tmp_path, step, b"weights")
    for step in damaged:
        damage(tmp_path / f"checkpoint-{step}")
    prune(tmp_path, keep)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in left]


def test_what_cannot_be_removed_has_no_good_name_any_more(tmp_path, monkeypatch):
    for step in (1, 2):
        write(tmp_path, step)
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors=False: None)
    prune(tmp_path, 1)
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["checkpoint-2"]
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint-2"]


def test_a_linked_checkpoint_goes_without_what_it_points_to(tmp_path):
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    write(elsewhere, 1)
    write(run, 2)
    (run / "checkpoint-1").symlink_to(elsewhere / "checkpoint-1")
    prune(run, 1)
    assert names(run) == ["checkpoint-2"] and verify(elsewhere / "checkpoint-1") == []


def test_leftovers_go_and_nothing_else(tmp_path):
    write(tmp_path, 1)
    kept = [".git", ".run.lock", ".checkpoint-3", "checkpoint-4", ".checkpoint-x.partial-1"]
    for name in [*kept, ".checkpoint-2.partial-77-ab", ".checkpoint-1.removed-77-ab", ".checkpoint-1.replaced-77-ab"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*kept, "checkpoint-1"])


@pytest.mark.parametrize("sound", [True, False])
def test_a_checkpoint_moved_aside_comes_back_if_no_other_took_its_place(tmp_path, sound):
    path = write(tmp_path, 1)
    if not sound:
        damage(path)
    path.rename(tmp_path / ".checkpoint-1.replaced-77-ab")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == (["checkpoint-1"] if sound else [])


# ---- Killed at any instant ----

WRITER = """
import sys
from pathlib import Path
from qlora_neft.run_folder.checkpoints import new_checkpoint, prune, remove_leftovers

run, step = Path(sys.argv[1]), int(sys.argv[2])
remove_leftovers(run)
while True:
    with new_checkpoint(run, step, {"step": step}) as folder:
        for name in "abc":
            (folder / name).write_bytes(f"{step}".encode() * 20_000)
    print(step, flush=True)
    prune(run, 2)
    step += 1
"""


def test_killed_at_any_instant(tmp_path):
    """20 processes in turn, each killed while it writes; the next continues from what it finds."""
    chance, step = random.Random(3), 1
    for _ in range(20):
        process = python(WRITER, tmp_path, step)
        finished = int(process.stdout.readline())  # the process has begun
        time.sleep(chance.uniform(0, 0.06))
        os.kill(process.pid, signal.SIGKILL)
        finished = int((process.communicate()[0].split() or [finished])[-1])
        search = find_checkpoints(tmp_path)
        # One more than it could report: the kill may come between the rename and the print.
        assert search.newest is not None and search.newest.step in (finished, finished + 1)
        assert search.newest.about == {"step": search.newest.step}
        assert search.damaged == []
        step = search.newest.step + 1
    remove_leftovers(tmp_path)
    assert all(name.startswith("checkpoint-") for name in names(tmp_path)) and len(names(tmp_path)) <= 3


def killed_at(event, work):
    """Fork a child that is killed at its n-th system call that opens, makes, renames or removes something.

    Returns whether it got that far.
    """
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    seen = 0

    def hook(name, args):
        nonlocal seen
        if name == "open" or name.startswith("os."):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(hook)
        work()
    finally:
        os._exit(0)


@pytest.mark.parametrize("step", [2, 1], ids=["a further step", "the same step again"])
def test_killed_at_every_system_call(tmp_path, step):
    """With a single checkpoint kept, the next process always finds one, the old or the new."""
    script = """
    import sys
    from pathlib import Path
    from test_checkpoint_files import kill_at_every_system_call
    kill_at_every_system_call(Path(sys.argv[1]), int(sys.argv[2]))
    """
    with python(script, tmp_path, step, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)}) as process:
        _, stderr = process.communicate()
    assert process.returncode == 0, stderr


def kill_at_every_system_call(folder, step):
    """In a process that has not imported torch: forking it hundreds of times is quick."""
    assert "torch" not in sys.modules

    def work():
        write(run, step, b"newer..")
        prune(run, 1)

    for event in range(1, 1000):
        run = folder / str(event)
        write(run, 1)
        killed = killed_at(event, work)
        assert all(verify(path) == [] for path in run.glob("checkpoint-*"))
        remove_leftovers(run)
        search = find_checkpoints(run)
        assert search.newest is not None and search.damaged == []
        assert all(name.startswith("checkpoint-") for name in names(run))
        if not killed:
            break
    assert event > 20 and names(run) == [f"checkpoint-{step}"]
    assert (run / f"checkpoint-{step}" / "model.bin").read_bytes() == b"newer.."


# ---- Full disks ----

FULL = """
import resource, signal, sys
from pathlib import Path
from qlora_neft.run_folder.checkpoints import new_checkpoint

if sys.argv[2] == "limit":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
large = 2_000_000
in_file = sys.argv[3] == "file"
try:
    with new_checkpoint(Path(sys.argv[1]), 2, {} if in_file else {"about": "x" * large}) as folder:
        (folder / "model.bin").write_bytes(bytes(large if in_file else 7))
except OSError as error:
    print(error.errno)
"""


@pytest.fixture(params=["tmpfs", "limit"])
def small_disk(request, tmp_path):
    """A folder with space for a small checkpoint but not for a large one, and how that is achieved."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "limit":
        yield folder, "limit"
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root and is not allowed here; the limit on files is tested")
    try:
        yield folder, "tmpfs"
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("large", ["file", "manifest"])
def test_a_full_disk_is_told_and_the_one_before_stays(small_disk, large):
    folder, kind = small_disk
    write(folder, 1)
    out, err = python(FULL, folder, kind, large).communicate()
    assert out.strip() == {"tmpfs": "28", "limit": "27"}[kind], err  # ENOSPC, EFBIG
    assert names(folder) == ["checkpoint-1"] and find_checkpoints(folder).newest.step == 1
    assert verify(write(folder, 2)) == []
