"""Processes that we start end with the one that started them, and run no file of the current directory."""

import os
import signal
import subprocess
import sys
import time

import pytest
from forked import environment, quick_python

from qlora_neft import notebook
from qlora_neft.compare.queue import Processes
from qlora_neft.processes import ENDS_WITH_STDIN, python_command

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's prctl and fork")

# Workers that are busy for a minute, and a parent that tells their ids.
WORKERS = """
import os, time
from qlora_neft.data.parallel import map_rows
def work(rows):
    os.write(1, f"{os.getpid()}\\n".encode())  # at once: both write to one pipe
    time.sleep(60)
list(map_rows(work, range(1000), 2))
"""


@linux
def test_processes_that_prepare_data_end_with_their_parent():
    with subprocess.Popen([quick_python(), "-c", WORKERS], env=environment(), stdout=subprocess.PIPE) as parent:
        workers = [int(parent.stdout.readline()) for _ in range(2)]
        [started] = {int(line.split()[3]) for line in map(stat_of, workers)}  # their parent
        os.kill(started, signal.SIGKILL)
        parent.wait(30)
    end = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{worker}") for worker in workers):
        assert time.monotonic() < end, "they outlive it"
        time.sleep(0.01)


def stat_of(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read()


def test_a_process_is_asked_to_end_when_its_starter_has_ended():
    code = (
        "import time, sys; from qlora_neft.processes import end_with_starter\n"
        "end_with_starter(); print(repr(sys.stdin.read()), flush=True); time.sleep(60)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([quick_python(), "-c", code], env=environment(**{ENDS_WITH_STDIN: "1"}), **pipes) as child:
        assert child.stdout.readline() == b"''\n"  # a verb that reads finds nothing
        child.stdin.close()  # as the kernel does when a process ends
        assert child.wait(30) == -signal.SIGTERM


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A current directory whose modules would run in place of Python's."""
    for name in ("random", "argparse", "json", "torch", "yaml", "typer"):
        (tmp_path / f"{name}.py").write_text("open('sprung', 'w')\n")
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "sprung").exists()


def test_no_file_of_the_current_directory_runs_in_our_processes(trap, tmp_path, capfd):
    lines = []
    assert Processes()("json.tool", ["--help"], tmp_path / "logs" / "log", lines.append) == 0
    assert "usage:" in lines[0]
    assert notebook._follow(["--version"], lambda: None) == 0
    assert "qlora-neft" in capfd.readouterr().out


def test_a_package_that_is_not_installed_is_found_at_the_end_of_the_path(trap, monkeypatch):
    monkeypatch.setattr("sys.path", [str(notebook.Path(notebook.__file__).parents[1])])  # as `python -m` in a clone
    command = python_command("qlora_neft", "--version")
    assert command[1:3] == ["-P", "-c"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("qlora-neft ")
