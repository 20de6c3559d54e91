"""Processes: which signals ask them to stop, and how those that we start begin and end.

They end with the one that started them, and run no file of the current directory.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

# Ctrl-C; kill, a scheduler, a spot machine; a closed terminal; what batch systems send before their limits. Not all
# of them exist on every system.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
# Set for a process whose standard input is a pipe that its starter holds open for as long as it lives.
ENDS_WITH_STDIN = "QLORA_NEFT_ENDS_WITH_STDIN"
POLL_SECONDS = 1.0  # where the kernel does not tell a process that its parent has ended
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# For a package that is not installed but found in the current directory: at the path's end, behind what Python has.
_FROM_HERE = (
    "import runpy, sys; root, module, *words = sys.argv[1:]; sys.path.append(root); sys.argv[1:] = words; "
    "runpy.run_module(module, run_name='__main__', alter_sys=True)"
)


def python_command(module: str, *words: str) -> list[str]:
    """Return the command that runs a module of this package in a process of its own.

    With ``-P``: otherwise Python looks for every module in the current directory first, and a ``random.py`` there runs.
    """
    root = Path(__file__).resolve().parents[1]
    # The first entry is the one that -P leaves out.
    if any(Path(entry).resolve() == root for entry in sys.path[1:] if entry):
        return [sys.executable, "-P", "-m", module, *words]
    return [sys.executable, "-P", "-c", _FROM_HERE, str(root), module, *words]


def end_with_starter() -> None:
    """Be asked to end by SIGTERM when the process that started this one has ended, however it did.

    Only if that process has set `ENDS_WITH_STDIN`. Standard input is empty from then on.
    """
    if os.environ.pop(ENDS_WITH_STDIN, None) is None:
        return
    pipe, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    threading.Thread(target=_end_after, args=(pipe,), daemon=True).start()


def _end_after(pipe: int) -> None:
    while os.read(pipe, 1024):  # nothing is ever written; it ends when no process holds the other end
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def end_with_parent(parent: int) -> None:
    """Be killed when the parent of this process ends: for one that has nothing to save.

    Args:
        parent: Its process id, taken before this process was started: it may have ended since.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return
    threading.Thread(target=_end_without, args=(parent,), daemon=True).start()


def _end_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)
