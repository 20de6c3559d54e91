"""What is measured of a finished run beyond its own summary.

A measure is a function from a run's folder to numbers by name. Its numbers are kept in the folder's ``measures.json``
under the measure's name; further files it may write itself. To add one: write the function and name it in `MEASURES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import RunFailed, UserInputError
from ..files.json_file import write_json
from ..recipe import Recipe
from ..run_report.record import MEASURES_FILE, read_run

Measure = Callable[[Path], dict[str, float]]


def _rows(folder: Path) -> dict[str, float]:
    from .model_measures import held_out_rows

    return held_out_rows(folder)


def _answers(folder: Path) -> dict[str, float]:
    from .model_measures import sample_answers

    return sample_answers(folder)


def _overfit(folder: Path) -> dict[str, float]:
    from .model_measures import recited

    return recited(folder)


def _text(folder: Path) -> dict[str, float]:
    from .model_measures import text_of_answers

    return text_of_answers(folder)


def _loss(folder: Path) -> dict[str, float]:
    from .model_measures import whole_losses

    return whole_losses(folder)


MEASURES: dict[str, Measure] = {
    "rows": _rows,
    "answers": _answers,
    "loss": _loss,
    "overfit": _overfit,
    "text": _text,
}
ON_HELD_OUT = ("rows", "answers", "text")


def check_names(names: Sequence[str]) -> None:
    """Refuse a name that is no measure, before anything is trained.

    Raises:
        UserInputError: If there is one.
    """
    unknown = [name for name in names if name not in MEASURES]
    if unknown:
        raise UserInputError(
            f"--measure: must be names from {', '.join(MEASURES)}, with commas between them, got {', '.join(unknown)}."
        )
    if "overfit" in names:
        from ..evaluation.overlap import check_installed

        check_installed()


def check_held_out(names: Sequence[str], recipes: Sequence[Recipe]) -> None:
    """Refuse measures on held-out rows where a recipe has none.

    Raises:
        UserInputError: If there is such a recipe.
    """
    wanting = [name for name in names if name in ON_HELD_OUT]
    if wanting and not all(recipe.data.has_eval_rows for recipe in recipes):
        raise UserInputError(
            f"--measure: {', '.join(wanting)} needs held-out rows. Give data.eval_path, data.eval_split or "
            "data.eval_fraction, or leave it away."
        )


def missing(folder: Path, names: Sequence[str]) -> list[str]:
    """Measures that a run does not have yet."""
    return [name for name in names if name not in read_run(folder).measures]


def measure_run(folder: Path, names: Sequence[str]) -> None:
    """Measure what a run does not have yet, each written as soon as it is known.

    Raises:
        UserInputError: For an unknown name, or a run that cannot be measured.
        RunFailed: If a measure gives no finite number.
    """
    check_names(names)
    for name in missing(folder, names):
        numbers = MEASURES[name](folder)
        wrong = {key: value for key, value in numbers.items() if not math.isfinite(value)}
        if wrong:
            raise RunFailed(f"{folder}: measure {name} gave {wrong}; nothing of it was kept.")
        write_json(folder / MEASURES_FILE, {**read_run(folder).measures, name: numbers})
