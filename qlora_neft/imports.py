"""Importing torch and what builds on it, in a process that is ours from beginning to end."""

from __future__ import annotations

import gc
import sys
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout


@contextmanager
def imports_that_stay() -> Generator[None, None, None]:
    """Pause garbage collection inside the block, then exempt everything that is alive from it.

    torch, transformers and PEFT make a million objects that live as long as the process. The collector would walk
    them again and again, last of all as the process ends: 2.8 of the 7.2 s of CPU time that importing `runner.run`
    takes, and its part of every later collection. For the command line and its child processes alone: in a user's own
    process, what is alive is not ours to exempt.

    What is printed meanwhile goes to stderr, since a program may read stdout: with WANDB_MODE=offline transformers
    (5.24) prints a line as it is imported.
    """
    was_enabled, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if len(sys.modules) > known:  # a later run in the same process would exempt the garbage of those before
            gc.freeze()
        if was_enabled:
            gc.enable()
