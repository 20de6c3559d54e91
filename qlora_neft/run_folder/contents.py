"""What the files of a checkpoint say, checked before training goes on from them.

A manifest tells that files are those that were written, not that a trainer can go on from them: they may have been
edited together with it, or come from another program. Whatever is wrong here would end in a traceback or, worse, in
training from another step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..files import read_json
from .checkpoints import BEST

STATE, PROGRESS, OPTIMIZER, SCHEDULER, SCALER = (
    "trainer_state.json",
    "progress.json",
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
)
ADAPTER_CONFIG, ADAPTER, MODEL_CONFIG, INDEX = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "model.safetensors.index.json",
)
# What reading a file that was made for something else raises; torch refuses pickles with UnpicklingError.
UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, EOFError, TypeError, AttributeError, UnpicklingError)
JUDGEMENTS = {"best_step", "best_loss", "without_improvement", "judged_step", "judged_loss", "stopped"}
COUNTERS = ("tokens_seen", "trained_tokens_seen", "bad_steps", "bad_in_a_row")


class _Wrong(Exception):
    """What is wrong with a file; the message continues a sentence that its name begins."""


def problems(checkpoint: Path, step: int) -> list[str]:
    """Return what keeps a trainer from going on from a checkpoint, nothing if it can.

    Args:
        checkpoint: A checkpoint's folder, whose files are those of its manifest.
        step: The optimizer steps taken, as the manifest says.
    """
    found: list[str] = []
    values: dict[str, Any] = {}

    def look(name: str, read: Callable[[Path], Any], check: Callable[[Any], None]) -> None:
        path = checkpoint / name
        try:
            values[name] = read(path)
            check(values[name])
        except _Wrong as error:
            found.append(f"{name} {error}")
        except (*UNREADABLE, SafetensorError, RecursionError) as error:
            said = str(error).strip()
            found.append(f"{name} cannot be read ({said.splitlines()[0] if said else type(error).__name__})")

    look(STATE, read_json, lambda state: _check_state(state, step))
    if (checkpoint / PROGRESS).exists():  # a checkpoint of plain SFTTrainer has none
        look(PROGRESS, read_json, lambda progress: _check_progress(progress, step))
    folders = [""]
    if not found and (values.get(PROGRESS, {}).get("judgements") or {}).get("best_step") is not None:
        # Judged so far, and with what is to be kept: an adapter or a model of its own.
        folders += [f"{BEST}/"] * (checkpoint / BEST).is_dir()
    for folder in folders:
        for name, read, check in _weights(checkpoint / folder):
            look(f"{folder}{name}", read, check)
    # Counted by the scaler alone, a step that overflows moves neither optimizer nor scheduler.
    scaled = (checkpoint / SCALER).exists()
    if scaled:
        look(SCALER, _tensors, _check_scaler)
    bad = 0 if found else values.get(PROGRESS, {}).get("bad_steps", 0)
    if not any(path.is_dir() for path in checkpoint.glob("optimizer*")):  # FSDP writes a folder
        look(OPTIMIZER, _tensors, lambda state: _check_optimizer(state, 0 if scaled else step - bad, step))
    look(SCHEDULER, _tensors, lambda state: _check_scheduler(state, 0 if scaled else step, step))
    return found


def _tensors(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _check_state(state: Any, step: int) -> None:
    if not isinstance(state, dict) or not _is_count(state.get("global_step")):
        raise _Wrong("is not the state of a trainer")
    if state["global_step"] != step:
        raise _Wrong(f"is of step {state['global_step']}, and the checkpoint of step {step}")
    if not _is_count(state.get("max_steps")) or state["max_steps"] < step:
        raise _Wrong(f"says that the run has {state.get('max_steps')!r} steps")
    epoch, log = state.get("epoch"), state.get("log_history", [])
    if not (epoch is None or _is_number(epoch)) or not isinstance(log, list):
        raise _Wrong("is not the state of a trainer")
    from transformers import TrainerState

    try:
        TrainerState(**state)
    except TypeError as error:  # keys that it does not know
        raise _Wrong(f"is not the state of a trainer ({error})") from error


def _check_progress(progress: Any, step: int) -> None:
    if not isinstance(progress, dict):
        raise _Wrong("does not hold counters")
    wrong = [name for name in COUNTERS if not _is_count(progress.get(name))]
    seconds, split = progress.get("train_seconds"), progress.get("split", "")
    if not _is_number(seconds) or seconds < 0:
        wrong.append("train_seconds")
    if split is not None and not (
        isinstance(split, list)
        and len(split) == 2
        and all(_is_count(limit) and limit for limit in split if limit is not None)
        and split[0] is not None
    ):
        wrong.append("split")
    if "judgements" in progress and not _are_judgements(progress["judgements"], step):
        wrong.append("judgements")
    if wrong:
        raise _Wrong(f"has no usable {', '.join(wrong)}")
    if max(progress["bad_steps"], progress["bad_in_a_row"]) > step:
        raise _Wrong(f"counts more bad steps than the {step} that were taken")


def _are_judgements(found: Any, step: int) -> bool:
    """Tell whether what was judged is as `trainer.selection.Judgements` has it, and not of a later step."""
    if not isinstance(found, dict) or set(found) != JUDGEMENTS:
        return False
    steps, losses = (found["best_step"], found["judged_step"]), (found["best_loss"], found["judged_loss"])
    return (
        all(at is None or (_is_count(at) and at <= step) for at in steps)
        and (steps[0] is None) == (steps[1] is None)
        and all(loss is None or _is_number(loss) for loss in losses)
        and _is_count(found["without_improvement"])
        and isinstance(found["stopped"], bool)
    )


def _weights(checkpoint: Path) -> Iterable[tuple[str, Callable[[Path], Any], Callable[[Any], None]]]:
    """Return the files of what is trained, each with how to read and check it."""
    if (checkpoint / ADAPTER).exists() or (checkpoint / ADAPTER_CONFIG).exists():
        yield ADAPTER_CONFIG, read_json, _check_mapping
        yield ADAPTER, lambda path: path, _check_tensors
    else:
        yield MODEL_CONFIG, read_json, _check_mapping
        names = [path.name for path in sorted(checkpoint.glob("model*.safetensors"))]
        if (checkpoint / INDEX).exists():
            yield INDEX, read_json, lambda index: _check_index(index, names)
        for name in names or ["model.safetensors"]:
            yield name, lambda path: path, _check_tensors
    for extra in checkpoint.glob("trainable.safetensors"):
        yield extra.name, lambda path: path, _check_tensors


def _check_mapping(content: Any) -> None:
    if not isinstance(content, dict) or not content:
        raise _Wrong("is empty or holds no mapping")


def _check_index(index: Any, names: list[str]) -> None:
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or set(where.values()) != set(names):
        raise _Wrong("does not name the files of weights beside it")


def _check_tensors(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        empty = True
        for name in file.keys():  # noqa: SIM118  it has no iterator
            tensor = file.get_tensor(name)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise _Wrong(f"has values that are not finite ({name})")
            empty = empty and not bool(tensor.any())
    if empty:
        raise _Wrong("holds nothing but zeros")


def _check_scaler(state: Any) -> None:
    if not isinstance(state, dict) or not _is_number(scale := state.get("scale")) or scale <= 0:
        raise _Wrong("is not the state of a gradient scaler")
    wrong = [name for name in ("growth_factor", "backoff_factor", "growth_interval") if not _is_number(state.get(name))]
    if wrong or not _is_count(state.get("_growth_tracker")):
        raise _Wrong("is not the state of a gradient scaler")


def _check_optimizer(state: Any, least: int, most: int) -> None:
    """Check an optimizer's state; ``least`` and ``most`` bound the steps that it may have taken."""
    if not isinstance(state, dict) or not isinstance(state.get("state"), dict) or not state.get("param_groups"):
        raise _Wrong("is not the state of an optimizer")
    groups, moments = state["param_groups"], state["state"]
    if not all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups):
        raise _Wrong("is not the state of an optimizer")
    known = {index for group in groups for index in group["params"]}
    if not set(moments) <= known or not all(isinstance(entry, dict) for entry in moments.values()):
        raise _Wrong("has moments of parameters that no group has")
    steps = []
    for entry in moments.values():
        for name, value in entry.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise _Wrong(f"has values that are not finite ({name})")
        if "step" in entry:
            steps.append(float(entry["step"]))
    # A parameter that no gradient reaches has no moments; all of them together have as many steps as the run.
    if steps and not least <= max(steps) <= most:
        raise _Wrong(f"is of step {max(steps):g}, and the checkpoint of step {most}")
    if least > 0 and not moments and any(group.get("betas") for group in groups):
        raise _Wrong("has lost its moments")


def _check_scheduler(state: Any, least: int, most: int) -> None:
    if not isinstance(state, dict) or type(state.get("last_epoch")) is not int:
        raise _Wrong("is not the state of a scheduler")
    # Others, such as one that waits for a plateau, count something else.
    if "lr_lambdas" in state and not least <= state["last_epoch"] <= most:
        raise _Wrong(f"is of step {state['last_epoch']}, and the checkpoint of step {most}")
    rates = [*state.get("base_lrs", []), *state.get("_last_lr", [])]
    if not all(_is_number(rate) and rate >= 0 for rate in rates):
        raise _Wrong("has learning rates that are no numbers")
    if state.get("base_lrs") and not any(state["base_lrs"]) and not any(state.get("_last_lr", [0])):
        raise _Wrong("holds nothing but zeros")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
