"""Which of the processes of a run this one is. Launchers (torchrun, accelerate) say so in the environment."""

from __future__ import annotations

import os

import torch


def num_processes() -> int:
    """Processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this one writes and speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0


def uses_fsdp() -> bool:
    """Whether ``accelerate launch`` asks for fully sharded data parallelism."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")


def choose_gpu() -> None:
    """Make this process's own GPU the current one, where there are several processes on a machine."""
    if num_processes() > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
