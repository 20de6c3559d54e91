"""The quick Python of the tests behaves as the real one does, or is the real one."""

import os
import signal
import subprocess
import sys

import pytest
from forked import Forked, environment, quick_python

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the fork server needs Linux's pidfd")


def both(*arguments, text="", **variables):
    """What the two say and how they end."""
    done = [
        subprocess.run([python, *arguments], input=text, env=environment(**variables), capture_output=True, text=True)
        for python in (sys.executable, quick_python())
    ]
    return [(process.returncode, process.stdout, process.stderr) for process in done]


@pytest.mark.parametrize(
    "code",
    [
        "import sys; print(sys.argv[1:], sys.path[0], __name__, input())",
        "import os, sys; print(os.getcwd(), os.environ['OWN'], sys.stdout.encoding, sys.stdout.errors)",
        "import sys; sys.stderr.write('é\\udc80'); sys.exit(3)",
        "import sys; sys.exit('a message')",
        "import atexit; atexit.register(print, 'at the end'); print('before')",
        "import os, signal; print('lost', end=''); os.kill(os.getpid(), signal.SIGTERM)",
        "raise SystemExit",
    ],
)
def test_a_quick_python_says_and_ends_as_the_real_one(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real, quick = both("-c", code, "a b", "", text="said\n", OWN="é")
    assert quick == real


def test_an_error_keeps_its_traceback():
    for code, _, stderr in both("-c", "raise ValueError('why')"):
        assert code == 1 and stderr.startswith("Traceback") and stderr.endswith("ValueError: why\n")


def test_modules_and_scripts_run(tmp_path):
    (tmp_path / "beside.py").write_text("NAME = 'beside'\n")
    (tmp_path / "own.py").write_text("import sys\nfrom beside import NAME\nprint(NAME, sys.argv, __name__)\n")
    real, quick = both(str(tmp_path / "own.py"), "x")
    assert quick == real and real[0] == 0
    real, quick = both("-m", "qlora_neft", "ls")
    assert quick == real and real[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on(number):
    code = "import time; print('here', flush=True); time.sleep(60)"
    ends = []
    for python in (sys.executable, quick_python()):
        command = [python, "-c", code]
        with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as started:
            assert started.stdout.readline() == b"here\n"
            started.send_signal(number)
            ends.append(started.wait(30))
    assert ends == [-number, -number]


def test_a_child_ends_with_its_client():
    command = [quick_python(), "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE) as client:
        pid = int(client.stdout.readline())
        assert pid != client.pid and os.path.exists(f"/proc/{pid}")
        client.kill()
        assert client.stdout.read() == b""  # its end of the pipe is closed as it dies


def test_where_a_library_would_read_another_environment_it_is_the_real_one():
    code = "import sys; print('torch' in sys.modules)"
    assert [said for _, said, _ in both("-c", code)] == ["False\n", "True\n"]
    assert [said for _, said, _ in both("-c", code, HF_HOME="/elsewhere")] == ["False\n", "False\n"]
    assert [said for _, said, _ in both("-X", "dev", "-c", code)] == ["False\n", "False\n"]


def test_the_command_line_is_known_by_its_process_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Forked("show", "nonsense") as started:
        assert os.path.exists(f"/proc/{started.pid}")
        code, stderr = started.ended()
    assert code == 2 and stderr.startswith("error: ")
