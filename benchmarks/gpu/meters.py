"""What is read off a trainer while it trains: seconds of every step, one step's profile, gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from .bases import adapters

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")  # the host waits for the device
DEVICE_WAIT = "cudaDeviceSynchronize"  # once by the profile itself
COPIES = ("cudaMemcpyAsync", "cudaMemcpy")
ITEMS = "aten::_local_scalar_dense"  # a tensor's value read by the host, on every device


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock(TrainerCallback):
    """Time every optimizer step from the end of the one before, fetching its rows included.

    Args:
        device: Waited for at the end of each step, in every arm alike.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Begin."""
        self._now = self._time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        before, self._now = self._now, self._time()
        self.seconds.append(self._now - before)

    def _time(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


class OneStepProfile(TrainerCallback):
    """Profile one optimizer step.

    Args:
        step: Which, from 0.
        device: Of the model.
    """

    def __init__(self, step: int, device: torch.device) -> None:
        self.step, self.device = step, device
        self.profile: Any = None
        self.seconds = 0.0
        self.problem = ""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin, if it is that step."""
        if state.global_step != self.step:
            return
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        try:
            self.profile = torch.profiler.profile(activities=kinds)
            self.profile.start()
        except RuntimeError as error:  # a machine may forbid it; the other figures stand
            self.profile, self.problem = None, str(error)
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End it."""
        if self.profile is None or state.global_step != self.step + 1:
            return
        synchronize(self.device)
        self.seconds = time.perf_counter() - self._began
        self.profile.stop()

    def figures(self) -> dict[str, Any]:
        """Return launches, waits, copies and the time that the device was busy."""
        if self.profile is None:
            return {"problem": self.problem or "no step was profiled"}
        events = {event.key: event for event in self.profile.key_averages()}

        def count(*names: str) -> int:
            return sum(events[name].count for name in names if name in events)

        busy = sum(event.self_device_time_total for event in events.values()) / 1e6  # microseconds
        return {
            "launches": count(*LAUNCHES),
            "host_waits": count(*WAITS),
            "device_waits": count(DEVICE_WAIT),
            "copies": count(*COPIES),
            "values_read_by_the_host": count(ITEMS),
            "device_busy_seconds": busy,
            "seconds": self.seconds,
        }


class Gradients(TrainerCallback):
    """Keep the gradients of LoRA in some blocks, as they are before the first optimizer step.

    Args:
        blocks: Indices of decoder blocks.
    """

    def __init__(self, blocks: set[int]) -> None:
        self.blocks = blocks
        self.kept: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep them."""
        self.kept = self.kept or kept_gradients(kwargs["model"], self.blocks)


def kept_gradients(model: nn.Module, blocks: set[int]) -> dict[str, Tensor]:
    """Return the gradients of LoRA in these blocks by name, in float32 on the CPU."""
    return {
        name: parameter.grad.detach().float().cpu()
        for name, parameter in adapters(model)
        if parameter.grad is not None and int(name.split(".")[2]) in blocks
    }


def gradient_error(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return how far gradients are from a reference: L2 norms, relative, over all and of the worst weight.

    Raises:
        ValueError: If the names differ.
    """
    if set(found) != set(reference):
        odd = sorted(set(found) ^ set(reference))
        raise ValueError(f"gradients of {len(found)} weights against {len(reference)}, of one side only: {odd[:3]}")
    errors = {name: ((found[name] - right).norm() / right.norm()).item() for name, right in reference.items()}
    worst = max(errors, key=lambda name: errors[name])
    norms = [sum(_square(part) for part in parts) ** 0.5 for parts in (reference.values(), _gaps(found, reference))]
    return {"gradient_error": norms[1] / norms[0], "worst_gradient_error": errors[worst], "worst_weight": worst}


def _gaps(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> list[Tensor]:
    return [found[name] - right for name, right in reference.items()]


def _square(tensor: Tensor) -> float:
    return tensor.double().square().sum().item()


def memory(device: torch.device) -> dict[str, int]:
    """Return the peaks of the allocator since they were last forgotten, in bytes."""
    if device.type != "cuda":
        return {}
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


def forgotten(device: torch.device, free: Callable[[], object]) -> None:
    """Free what a measurement left, and forget its peaks."""
    free()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
