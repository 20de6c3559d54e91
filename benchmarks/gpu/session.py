"""One process of a measurement: a probe of the device, the float32 reference, a base on disk, or the runs of one arm.

    python -m benchmarks.gpu.session '{"kind": "arm", "runs": [...], "state": "DIR", "device": "cuda", "tiny": false}'

It imports what it needs and waits for a line on standard input.
Every result is a file of its own, written when it is whole. Nothing of this project is imported before an arm needs it:
an arm may run in an environment that has none of it.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from .parts import part_path, write_part
from .plan import ARMS, Run


def main(spec: dict[str, Any], wait: Callable[[], object] = lambda: None) -> None:
    """Do what a session is asked for.

    Args:
        spec: ``kind``, ``name``, ``runs``, ``state``, ``device``, ``tiny``.
        wait: Called when everything is imported; the device is not touched before it returns.

    Raises:
        SystemExit: If there is no CUDA device where one is asked for.
    """
    runs = [Run(**run) for run in spec["runs"]]
    for name in modules_for(spec["kind"], [ARMS[run.arm].trainer for run in runs]):
        import_module(name)
    wait()
    import torch

    from .trainers import Place

    if spec["device"] == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: torch sees no CUDA device. --tiny rehearses on a CPU.")
    device = torch.device("cuda", 0) if spec["device"] == "cuda" else torch.device("cpu")
    place = Place(device, Path(spec["state"]), spec["tiny"])
    if spec["kind"] == "probe":
        from .probe import probe

        write_part(place.state, spec["name"], probe(device, tiny=place.tiny))
    elif spec["kind"] == "reference":
        from .reference import reference

        write_part(place.state, spec["name"], reference(place))
    elif spec["kind"] == "base":
        from .bases import save_base

        folder = save_base(place.sizes("7b"), device, place.state / spec["name"])
        write_part(place.state, spec["name"], {"bytes": sum(path.stat().st_size for path in folder.iterdir())})
    for run in runs:
        write_part(place.state, run.key, measure(run, place))


def modules_for(kind: str, trainers: Sequence[str]) -> Iterator[str]:
    """Yield what a session will import, in order."""
    if "unsloth" in trainers:
        yield "unsloth"  # first of all: it changes transformers and TRL when it is imported
    if kind in ("reference", "base", "arm"):
        yield from ("transformers", "peft")
    if kind == "arm":
        yield from ("trl", "datasets")
    if "ours" in trainers:
        yield "qlora_neft.runner.build_trainer"


def measure(run: Run, place: Any) -> dict[str, Any]:
    """Return everything that is measured of a run."""
    import torch

    from .meters import forgotten

    began = time.perf_counter()
    if run.cap_gib is not None and place.on_gpu:
        from .trainers import CONTEXT, GIB

        total = torch.cuda.get_device_properties(place.device).total_memory
        # The limit is the allocator's own, which does not see the context.
        torch.cuda.set_per_process_memory_fraction((run.cap_gib * GIB - CONTEXT) / total, place.device)
    result: dict[str, Any] = {"run": run.__dict__, "about": ARMS[run.arm].about}
    if run.check:
        result["check"] = check(run, place)
        forgotten(place.device, gc.collect)
    result |= train(run, place)
    forgotten(place.device, gc.collect)
    return result | {"seconds_in_all": time.perf_counter() - began}


def check(run: Run, place: Any) -> dict[str, Any]:
    """Take one step without noise and dropout; return how far loss and gradient are from the float32 reference."""
    from safetensors.torch import load_file

    from .meters import Gradients, gradient_error
    from .reference import blocks_of, gradients_path, reference_name
    from .trainers import build

    found = part_path(place.state, reference_name(run.base))
    if not found.exists():
        return {"problem": "there is no reference"}
    loss = json.loads(found.read_text(encoding="utf-8"))["loss"]
    trainer = build(run, place, 1, check=True).trainer
    gradients = Gradients(blocks_of(place.sizes(run.base)))
    trainer.add_callback(gradients)
    trainer.train()
    mine = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    errors = gradient_error(gradients.kept, load_file(gradients_path(place.state, run.base)))
    return {"loss": mine, "loss_error": abs(mine - loss) / loss, **errors}


def train(run: Run, place: Any) -> dict[str, Any]:
    """Train the steps of a run; return times, tokens, memory and what the trainer was told."""
    import torch

    from .bases import checksum
    from .lengths import tokens_of_steps
    from .meters import Clock, OneStepProfile, forgotten, memory
    from .trainers import build

    began = time.perf_counter()
    steps = run.warm_up + run.steps
    built = build(run, place, steps + run.profile)
    trainer = built.trainer
    before = checksum(trainer.model)
    clock, profile = Clock(place.device), OneStepProfile(steps, place.device)
    # Before the clock: what a profile costs is no part of a step, and its step is not counted.
    for callback in [profile, clock] if run.profile else [clock]:
        trainer.add_callback(callback)
    building = time.perf_counter() - began
    forgotten(place.device, gc.collect)
    trainer.train()
    tokens = tokens_of_steps(place.lengths(run), steps + run.profile)
    counted = slice(run.warm_up, steps)
    result: dict[str, Any] = {
        "step_seconds": clock.seconds[counted],
        "step_tokens": tokens[counted],
        "seconds_to_build": building,
        "forwards_per_step": trainer.forwards / len(clock.seconds),
        "positions_per_step": trainer.positions / len(clock.seconds),  # padding included
        "largest_micro_batch": trainer.largest,
        "checkpointing": built.checkpointing,
        "switches": built.switches,
        "memory": memory(place.device),
        "estimate": built.estimate,
        "base_checksum": before,
        "base_unchanged": checksum(trainer.model) == before,
        "threads": torch.get_num_threads(),
    }
    if hasattr(trainer, "fast_path_record"):
        result["fast_path"] = trainer.fast_path_record()
    if getattr(getattr(trainer, "split", None), "is_smaller", False):
        result["shrunk"] = str(trainer.split)  # it ran out of memory, and went on with less
    if run.profile:
        result["profile"] = profile.figures()
    return result


def _wait_for_go() -> None:
    """Wait for a line on standard input; without one there is nobody to measure for."""
    if not sys.stdin.readline():
        sys.exit("benchmarks.gpu: not needed")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), _wait_for_go)
