"""Measurements of a run in training: its log in ``metrics.jsonl``, the machine, its memory, the versions in use."""

from __future__ import annotations

import json
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..files import finite, write_text
from .record import Hardware

PACKAGES = (
    "qlora-neft",
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "huggingface_hub",
)


class MetricsFile(TrainerCallback):
    """Append every log of a run to a JSON Lines file as it happens, so that a killed run keeps its curve.

    Args:
        path: File to append to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line per log."""
        # Every rank logs the same, into the same folder.
        if state.is_world_process_zero and logs:
            self.write(state.global_step, logs)

    def write(self, step: int, logs: dict[str, Any]) -> None:
        """Append one line and flush it."""
        # Opened and closed for every line, so that it is in the file whatever happens next.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite(logs)}, sort_keys=True) + "\n")

    def keep_up_to(self, step: int | None) -> None:
        """Drop what was logged after a step, or everything for None, and a last line that was cut off."""
        if not self.path.exists():
            return
        # A resumed run takes the steps after its checkpoint again, and logs them again.
        kept = [] if step is None else [entry for entry in self._entries() if entry["step"] <= step]
        lines = dict.fromkeys(json.dumps(entry, sort_keys=True) for entry in kept)  # once each, in order
        write_text(self.path, "".join(line + "\n" for line in lines))

    def _entries(self) -> Iterator[dict[str, Any]]:
        # A power cut may leave half of the last line, or zeros in its place.
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, RecursionError):
                entry = json.loads(line)
                if isinstance(entry, dict) and type(entry.get("step")) is int:
                    yield entry

    def read(self) -> list[dict[str, Any]]:
        """Return every line so far that is one."""
        return list(self._entries())


def versions() -> dict[str, str]:
    """Return the installed versions of Python and of the packages that a run depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def hardware(device: torch.device) -> Hardware:
    """Describe the machine of a run."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return Hardware(device=str(device), name=name, threads=torch.get_num_threads(), platform=platform.platform())


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the highest memory use so far in bytes: the process's resident set, and CUDA allocations."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts KiB on Linux, bytes on macOS
    peaks = {"host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        # Allocated is what tensors took; reserved, what PyTorch's allocator held for them, is nearer to what nvidia-smi
        # shows.
        peaks["cuda_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
        peaks["cuda_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    return peaks


def _cpu_name() -> str:
    # platform.processor() is empty, or the architecture's name, on most Linux systems.
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
