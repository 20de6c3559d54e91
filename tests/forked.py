"""Processes that start at once: forked from one that has imported everything. See `fork_server.py`."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import fork_client

TESTS = Path(__file__).parent
SECONDS = 180  # until the server has imported everything, on a machine that is slow or busy


def environment(**more: str) -> dict[str, str]:
    """For processes: this clone of the package, one thread, no network."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def quick_python(**variables: str) -> str:
    """An executable in place of `sys.executable`, for processes that need not import everything anew.

    Signals, exit codes, standard streams, the folder and the environment are those of a real process. It is not for
    tests of what a fresh interpreter does: what is imported, and how long that takes.

    Args:
        variables: As for `environment`. Libraries read some when they are imported: such an environment has a server
            of its own, which pays from the third process on.
    """
    if not sys.platform.startswith("linux"):
        return sys.executable
    _server(environment(**variables))
    return str(_folder() / "python")


def start_fork_server() -> None:
    """Let the server begin its imports in the background, for later."""
    if sys.platform.startswith("linux"):
        _start(environment())


class Forked:
    """The command line in a process that starts at once, known by its own process id."""

    def __init__(self, *arguments: str, **variables: str) -> None:
        self.stderr = Path(f"stderr{variables.get('RANK', '')}.txt").absolute()
        content = fork_client.request(["-P", "-m", "qlora_neft", *arguments], sys.executable, environment(**variables))
        with Path(os.devnull).open("r+b") as nothing, self.stderr.open("wb") as stderr:
            streams = (nothing.fileno(), nothing.fileno(), stderr.fileno())
            self._connection, self.pid = fork_client.connect(str(_server(environment(**variables))), content, streams)
        self._connection.setblocking(False)
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal, None while it runs."""
        if self._code is None:
            try:
                self._code = os.waitstatus_to_exitcode(fork_client.number(self._connection))
            except BlockingIOError:
                return None
        return self._code

    def send_signals(self, *signals: int) -> None:
        """Each of them; different ones, for of equal ones that wait a process sees one."""
        for number in signals:
            os.kill(self.pid, number)

    def ended(self) -> tuple[int, str]:
        """Wait for exit code and stderr."""
        end = time.monotonic() + 60
        while self.poll() is None:
            assert time.monotonic() < end, "still running after 60 s"
            time.sleep(0.005)
        return self._code, self.stderr.read_text()

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.ended()
        self._connection.close()


# ---- The server ----


def _folder() -> Path:
    """What the processes of this test session share (`conftest.py`)."""
    return Path(os.environ["QLORA_NEFT_TEST_SESSION"])


def _server(variables: dict[str, str]) -> Path:
    """The socket of the server for an environment, once it answers."""
    address = _start(variables)
    end = time.monotonic() + SECONDS
    while not address.exists():
        assert time.monotonic() < end, address.with_suffix(".log").read_text()
        time.sleep(0.02)
    return address


def _start(variables: dict[str, str]) -> Path:
    """Start it, unless another process of this session has."""
    address = Path(fork_client.address_for(variables, str(_folder())))
    log = address.with_suffix(".log")
    with (_folder() / "fork.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        executable = _folder() / "python"
        if not executable.exists():
            client = [sys.executable, "-IS", TESTS / "fork_client.py", executable, _folder(), sys.executable]
            executable.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, client))} "$@"\n')
            executable.chmod(0o755)
        if not log.exists():
            owner = os.environ["QLORA_NEFT_TEST_SESSION_OWNER"]
            with log.open("w") as said:
                subprocess.Popen(
                    [sys.executable, TESTS / "fork_server.py", address, owner],
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    env=variables,
                    start_new_session=True,
                )
    return address
