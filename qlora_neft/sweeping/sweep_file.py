"""``sweep.json``: what a folder's sweep is made of, and whether another plan goes on with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UserInputError
from ..files.json_file import write_json
from ..run_report.record import SWEEP_FILE, read_sweep
from .plan import SweepPlan


def open_sweep(plan: SweepPlan, output_dir: Path, *, write: bool = True) -> list[str]:
    """Begin a sweep in a folder, or go on with it there.

    A sweep may grow: runs that are there already stay as they are, further values or seeds are added.

    Args:
        plan: All its runs.
        output_dir: A new or empty folder, or this sweep's.
        write: Whether to note the plan, and the recipe of every run in ``recipes/``; else it is only compared.

    Returns:
        Names of the runs that an earlier plan did not have; all of them in a new folder.

    Raises:
        UserInputError: If the folder holds anything else, or a sweep that has other runs (the difference is shown).
    """
    earlier = read_sweep(output_dir) if output_dir.is_dir() else None
    if earlier is None and output_dir.exists():
        _check_empty(output_dir)
    before = {run["name"]: run for run in (earlier or {}).get("runs", [])}
    now = plan.to_dict()
    _check_same(before, {run["name"]: run for run in now["runs"]}, output_dir)
    if write:
        (output_dir / "recipes").mkdir(parents=True, exist_ok=True)
        for run in plan.runs:
            recipe_of(output_dir, run.name).write_text(run.recipe.to_yaml(), encoding="utf-8")
        write_json(output_dir / SWEEP_FILE, now)
    return [run.name for run in plan.runs if run.name not in before]


def recipe_of(output_dir: Path, name: str) -> Path:
    """The recipe that a run is trained from; later changes to the user's own file do not reach it."""
    return output_dir / "recipes" / f"{name}.yaml"


def _check_empty(output_dir: Path) -> None:
    if not output_dir.is_dir():
        raise UserInputError(f"--output-dir: {str(output_dir)!r} is a file. Give a new folder.")
    if any(not path.name.startswith(".") for path in output_dir.iterdir()):
        raise UserInputError(
            f"--output-dir: {str(output_dir)!r} is not empty and holds no sweep. Nothing in it may be lost: give a new "
            "folder."
        )


def _check_same(before: dict[str, Any], now: dict[str, Any], output_dir: Path) -> None:
    lines = [f"  {name}: not in this sweep now" for name in before if name not in now]
    for name in before.keys() & now.keys():
        old, new = _learned(before[name]["recipe"]), _learned(now[name]["recipe"])
        for key in sorted({*old, *new}):
            line = f"  {key}: {json.dumps(old.get(key))} before, {json.dumps(new.get(key))} now"
            if old.get(key) != new.get(key) and line not in lines:
                lines.append(line)
    if lines:
        raise UserInputError(
            f"--output-dir: {str(output_dir)!r} holds another sweep:\n" + "\n".join(lines) + "\n"
            "Values and seeds may be added, the machine section may change, nothing else. Give the same sweep, or a "
            "new --output-dir."
        )


def _learned(recipe: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, keys in recipe.items()
        if section != "machine"
        for key, value in (keys or {}).items()
    }
