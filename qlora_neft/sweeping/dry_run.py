"""A look at every run of a sweep before one begins: model, data and plan, as ``train --dry-run`` checks them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..run import run
from .plan import PlannedRun, SweepPlan
from .sweep_file import open_sweep


def check_runs(plan: SweepPlan, output_dir: Path) -> dict[str, Any]:
    """Check the runs and count their tokens; nothing is written. Runs that differ in noise or seed are looked at once.

    Returns:
        ``runs`` (``name``, ``steps``, ``tokens``, ``state``) and ``tokens``, of those that are not finished.

    Raises:
        UserInputError: If one of them would be refused.
    """
    open_sweep(plan, output_dir, write=False)
    known: dict[str, dict[str, Any]] = {}
    rows = []
    for planned in plan.runs:
        key = _looked_at(planned)
        if key not in known:
            known[key] = run(planned.recipe, output_dir / planned.name, dry_run=True, quiet=True)
        rows.append({"name": planned.name, "state": _state(output_dir / planned.name), **_size(planned, known[key])})
    return {"runs": rows, "tokens": sum(row["tokens"] for row in rows if row["state"] != "finished")}


def _looked_at(planned: PlannedRun) -> str:
    recipe = planned.recipe.to_dict()
    recipe["train"] = {**recipe["train"], "seed": None}
    recipe["machine"] = {**recipe["machine"], "mirror_dir": None}
    return repr({**recipe, "neftune": None})


def _size(planned: PlannedRun, facts: dict[str, Any]) -> dict[str, int]:
    """Optimizer steps, and an estimate of the tokens in them: the mean of the data."""
    steps, rows = facts["plan"]["num_steps"], facts["data"]["train"]
    per_row = rows["tokens"] / max(rows["rows"], 1)
    most = rows["tokens"] * planned.recipe.train.num_train_epochs
    return {"steps": steps, "tokens": round(min(steps * planned.recipe.train.effective_batch_size * per_row, most))}


def _state(folder: Path) -> str:
    if (folder / "summary.json").exists():
        return "finished"
    return "begun" if (folder / "run.json").exists() else ""
