"""The verb fit: what a recipe states, handed to the planner, and its answer shown. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from ..errors import UserInputError
from ..files.bundled import resolve_bundled
from ..fit import card_of, fit_report, read_config, stored_parameters, this_machine
from ..fit.duration import local_bytes, seconds, tokens_in
from ..fit.geometry import geometry_of
from ..fit.show import lines, picture
from ..recipe import Recipe
from ..running.unpack_fit import wanted


def show(recipe: Recipe, name: str, *, vram: str | None, picture_path: Path | None, as_json: bool) -> None:
    """Print whether a recipe fits on a card."""
    report = planned(recipe, vram)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        typer.echo("\n".join(lines(report, name)))
    if picture_path is not None:
        _draw(report, name, picture_path)


def planned(recipe: Recipe, vram: str | None) -> dict[str, Any]:
    """The planner's answer for a recipe, see `fit_report`; ``vram`` None asks this machine."""
    path = resolve_bundled(recipe.model.name_or_path)
    card = this_machine() if vram is None else card_of(vram)
    config, origin = read_config(path, recipe.model.revision)
    stored = stored_parameters(path, recipe.model.revision, origin)
    report = fit_report(geometry_of(config), wanted(recipe), card, recipe.machine.model_dump(), stored)
    return {**report, "seconds": _duration(recipe, report["tokens_per_second"])}


def _duration(recipe: Recipe, speed: list[int] | None) -> list[int] | None:
    """Shortest and longest time of the run, None where its data is not here or the speed is not known."""
    num_bytes = local_bytes(resolve_bundled(recipe.data.path))
    if num_bytes is None:
        return None
    low, high = (tokens * recipe.train.num_train_epochs for tokens in tokens_in(num_bytes))
    if recipe.train.max_steps is not None:
        high = min(high, recipe.train.max_steps * recipe.train.effective_batch_size * recipe.data.max_length)
        low = min(low, high)
    return seconds((low, high), speed)


def _draw(report: dict[str, Any], name: str, path: Path) -> None:
    try:
        drawn = picture(report, path, f"{name}: memory of a training step")
    except (OSError, ValueError) as error:
        raise UserInputError(f"--picture: {str(path)!r} cannot be written ({error}). Give a .png file.") from error
    if not drawn:
        raise UserInputError("--picture: matplotlib is missing. Install the extra: pip install 'qlora-neft[plots]'")
    typer.echo(f"written: {path}", err=True)
