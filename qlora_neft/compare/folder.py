"""A sweep's folder: its plan in ``sweep.json``, the recipe each run is trained from, and how far each run is. No torch.

```
sweep.json            the plan
recipes/NAME.yaml     what run NAME is trained from
logs/NAME.log         everything its process prints
NAME/                 its folder, as `train` writes it
```
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserInputError
from ..files import read_record_if_there, visible, write_json, write_text
from ..recipe import recipe_of_record
from ..recipe.settings import flat
from ..run_folder.record import RUN_FILE, SUMMARY_FILE
from .asking import Asking
from .plan import SweepPlan
from .records import SWEEP_FILE, read_run, read_sweep

DIVERGED_FILE = "diverged.json"  # in the folder of a run for which that is a result


def open_sweep(plan: SweepPlan, output_dir: Path, *, write: bool = True) -> list[str]:
    """Begin a sweep in a folder, or continue the one that it holds.

    A sweep may grow: runs that are there already stay as they are, further values or seeds are added.

    Args:
        plan: All the sweep's runs.
        output_dir: A new or empty folder, or this sweep's.
        write: Whether to write the plan, and the recipe of every run in ``recipes/``; otherwise it is only compared.

    Returns:
        Names of the runs that are not in the folder's earlier plan; in a new folder, all of them.

    Raises:
        UserInputError: If the folder holds anything else, or a sweep with other runs (the difference is shown).
    """
    earlier = read_sweep(output_dir) if output_dir.is_dir() else None
    # `sweep` has made the folder and holds its lock by now; `visible` overlooks the lock's file.
    if earlier is None and output_dir.exists():
        _check_empty(output_dir)
    before = {run.name: run.recipe for run in earlier.runs} if earlier else {}
    now = plan.to_dict()
    # Through to_dict on both sides: what is compared is what JSON keeps of it.
    _check_same(before, {run["name"]: run["recipe"] for run in now["runs"]}, output_dir)
    if write:
        (output_dir / "recipes").mkdir(parents=True, exist_ok=True)
        for run in plan.runs:
            write_text(recipe_of(output_dir, run.name), run.recipe.to_yaml())
        write_json(output_dir / SWEEP_FILE, now)  # last: a plan whose recipes are not there could not be continued
    return [run.name for run in plan.runs if run.name not in before]


def recipe_of(output_dir: Path, name: str) -> Path:
    """Return the recipe that a run is trained from; later changes to the user's own file do not reach it."""
    return output_dir / "recipes" / f"{name}.yaml"


def log_of(output_dir: Path, name: str) -> Path:
    """Return the file to which everything that a run prints is appended."""
    return output_dir / "logs" / f"{name}.log"


def is_begun(folder: Path) -> bool:
    """Whether a run has begun, finished or not."""
    return (folder / RUN_FILE).exists()


def is_trained(folder: Path) -> bool:
    """Whether a run's training is finished: ``summary.json`` is written last."""
    return (folder / SUMMARY_FILE).exists()


def is_done(folder: Path, measures: Sequence[str] = (), asking: Asking | None = None) -> bool:
    """Whether a run is trained and has all the measures asked for."""
    return is_trained(folder) and not missing(folder, measures, asking)


def note_divergence(folder: Path, reason: str) -> None:
    """Write down that a run diverged: more training would not change it."""
    write_json(folder / DIVERGED_FILE, {"reason": reason})


def divergence_of(folder: Path) -> str | None:
    """Return why a run diverged, None if it did not."""
    record = read_record_if_there(folder / DIVERGED_FILE, "Remove it to train the run again.")
    return None if record is None else str(record.get("reason", ""))


def missing(folder: Path, measures: Sequence[str], asking: Asking | None = None) -> list[str]:
    """Return the measures that a run does not have yet, or has made in another way than ``asking`` makes them."""
    found = read_run(folder).measures if measures else {}
    asking = asking or Asking()
    return [name for name in measures if name not in found or asking.differs(name, folder, found[name])]


def began_without_held_out(output_dir: Path) -> bool:
    """Whether a folder holds a sweep none of whose runs has held-out rows, of an earlier version: it stays so."""
    earlier = read_sweep(output_dir) if output_dir.is_dir() else None
    keys = ("eval_path", "eval_split", "eval_fraction")
    data = [run.recipe.get("data", {}) for run in earlier.runs] if earlier else []
    return bool(data) and not any(section.get(key) is not None for section in data for key in keys)


def _check_empty(output_dir: Path) -> None:
    if not output_dir.is_dir():
        raise UserInputError(f"--output-dir: {str(output_dir)!r} is a file. Give a new folder.")
    if visible(output_dir):
        raise UserInputError(
            f"--output-dir: {str(output_dir)!r} is not empty and holds no sweep. Give a new folder, so that nothing "
            "in this one is lost."
        )


def _check_same(before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]], output_dir: Path) -> None:
    lines = [f"  {name}: no longer in this sweep" for name in before if name not in now]
    for name in (name for name in before if name in now):
        old, new = _outside_the_machine(before[name]), _outside_the_machine(now[name])
        for key in sorted({*old, *new}):
            line = f"  {key}: {json.dumps(old.get(key))} before, {json.dumps(new.get(key))} now"
            if old.get(key) != new.get(key) and line not in lines:  # most differences are the same in every run
                lines.append(line)
    if lines:
        raise UserInputError(
            f"--output-dir: {str(output_dir)!r} holds another sweep:\n" + "\n".join(lines) + "\n"
            "Values and seeds may be added and the machine section may change, nothing else. Give the same sweep, or "
            "a new --output-dir."
        )


def _outside_the_machine(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return what must stay the same in a sweep: all that is learned, and what is measured of it."""
    recorded = recipe_of_record(recipe)  # a key that an earlier version did not have yet has its default
    plain = recipe if recorded is None else recorded.to_dict()
    return {key: value for key, value in flat(plain).items() if not key.startswith("machine.")}
