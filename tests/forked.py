"""Processes that start at once: forked from one that has imported everything. See `fork_server.py`."""

from __future__ import annotations

import fcntl
import json
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


def quick_python() -> str:
    """An executable in place of `sys.executable`, for processes that need not import everything anew.

    Signals, exit codes, standard streams, the folder and the environment are those of a real process. It is not for
    tests of what a fresh interpreter does: what is imported, and how long that takes.
    """
    if not sys.platform.startswith("linux"):
        return sys.executable
    return str(_server().with_name("python"))


def start_fork_server() -> None:
    """Let the server begin its imports in the background, for later."""
    if sys.platform.startswith("linux"):
        _start(_address())


class Forked:
    """The command line in a process that starts at once, known by its own process id."""

    def __init__(self, *arguments: str, **variables: str) -> None:
        self.stderr = Path(f"stderr{variables.get('RANK', '')}.txt").absolute()
        content = fork_client.request(["-m", "qlora_neft", *arguments], sys.executable, environment(**variables))
        with Path(os.devnull).open("r+b") as nothing, self.stderr.open("wb") as stderr:
            streams = (nothing.fileno(), nothing.fileno(), stderr.fileno())
            self._connection, self.pid = fork_client.connect(str(_server()), content, streams)
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


def _address() -> Path:
    """Its socket, in the folder of this test session (`conftest.py`)."""
    return Path(os.environ["QLORA_NEFT_TEST_SESSION"], "server")


def _server() -> Path:
    address = _address()
    if not address.exists():
        _start(address)
        end = time.monotonic() + SECONDS
        while not address.exists():
            assert time.monotonic() < end, address.with_suffix(".log").read_text()
            time.sleep(0.05)
    return address


def _start(address: Path) -> None:
    """Start it, unless another process of this session has."""
    with address.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        executable = address.with_name("python")
        if executable.exists():
            return
        variables = environment()
        address.with_suffix(".json").write_text(json.dumps(fork_client.read_on_import(variables)))
        client = [sys.executable, "-IS", TESTS / "fork_client.py", executable, address, sys.executable]
        executable.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, client))} "$@"\n')
        executable.chmod(0o755)
        with address.with_suffix(".log").open("w") as log:
            subprocess.Popen(
                [sys.executable, TESTS / "fork_server.py", address, os.environ["QLORA_NEFT_TEST_SESSION_OWNER"]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=variables,
                start_new_session=True,
            )
