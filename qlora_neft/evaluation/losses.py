"""Losses of runs and their bases on whole sets of sequences, without noise or dropout (NEFTune's Figure 4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, cast

import torch
from datasets import Dataset
from trl.trainer.utils import add_fused_lm_head
from typing_extensions import TypedDict

from ..adapter.folder import RECIPE
from ..adapter.load import Trained, load_trained
from ..base.precision import PrecisionPolicy
from ..display.plots import BLUE, GREEN, LIGHT_GREY, ORANGE, PURPLE, VERMILION, new_picture, save_picture
from ..display.tables import Table, short_names
from ..errors import UserInputError
from ..run_folder.record import keep_measures
from ..runner.run_data import other_data, recipe_data
from ..steps import LOSS_WEIGHTS
from ..steps.losses import RowLosses, row_losses
from ..trainer.loss_head import settle_loss_head
from .runs import HELD_OUT, TRAIN, Machine, Progress, Say, folders_of, no_progress, progress_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, LIGHT_GREY)
BINS = 40
SLICE = 1024  # sequences held in memory at a time; those of similar length share a batch

BASE = "base"  # in ``samples``
_MEASURE_NAMES = {TRAIN: "whole_train_loss", HELD_OUT: "held_out_loss"}


@dataclass(frozen=True)
class SetLoss:
    """A mean over all trained tokens of a set.

    Attributes:
        loss: Nats per trained token.
        tokens: Trained tokens.
        rows: Sequences.
        samples: Mean of each sequence, None for one without a trained token.
    """

    loss: float
    tokens: int
    rows: int
    samples: list[float | None]


class LossesOfSet(TypedDict):
    """Losses on one set of rows, in nats per trained token: of a base alone, and of adapters on it by their source.

    ``samples`` has the mean of every row by model, in the order of the rows, null for a row without a trained token:
    ``base``, and each adapter by its source. It is there if it was asked for.
    """

    set: str
    rows: int
    tokens: int
    base_model: str
    base: float
    adapters: dict[str, float]
    samples: NotRequired[dict[str, list[float | None]]]


@dataclass(frozen=True)
class _Set:
    name: str
    rows: Dataset
    sha256: str


def losses_of_runs(
    sources: Sequence[str],
    data: Mapping[str, str],
    *,
    rows: int = 0,
    machine: Machine | None = None,
    overrides: Sequence[str] = (),
    samples: bool = False,
    say: Say = lambda line: None,
) -> list[LossesOfSet]:
    """Measure several runs and their bases, on their own training and held-out rows and on other data.

    Each run keeps its losses on whole sets in ``measures.json``.

    Args:
        sources: Folders of runs, or adapters of other origin, which have no data of their own.
        data: Further sets by name: local files or Hub ids, prepared as each run prepares its own.
        rows: Use only the first N sequences of each set; 0 for all.
        machine: Where to compute.
        overrides: Changes to the recipes, for data that has moved.
        samples: Also return the loss of every row (NEFTune's Figure 4 shows their histograms).
        say: Called with progress messages, and with what is wrong with further data.

    Returns:
        An entry for each set; runs with the same rows and base share one.

    Raises:
        UserInputError: If a run or its data cannot be loaded, or a set has no row to learn from.
    """
    machine = machine or Machine()
    # By set, rows and base: runs that share all three share a line and the base's loss, which is measured once.
    found: dict[tuple[str | None, ...], LossesOfSet] = {}
    for folder in folders_of(sources, machine):
        trained = load_trained(folder, device=machine.device, precision=machine.precision)
        prepare_for_losses(trained)
        numbers, made = {}, {}
        for one in list(_sets(trained, data, overrides, say)):  # all data is read before anything is measured
            part = one.rows.select(range(min(rows, len(one.rows)))) if rows else one.rows
            key = (one.name, one.sha256, folder.base, folder.base_revision)
            progress = progress_of(say, f"{folder.source}, {one.name}: sequences")
            if key not in found:
                with trained.base_alone():
                    alone = set_loss(trained, part, batch_size=machine.batch_size, progress=progress)
                found[key] = {
                    "set": one.name,
                    "rows": alone.rows,
                    "tokens": alone.tokens,
                    "base_model": folder.base,
                    "base": alone.loss,
                    "adapters": {},
                }
                if samples:
                    found[key]["samples"] = {BASE: alone.samples}
            measured = set_loss(trained, part, batch_size=machine.batch_size, progress=progress)
            loss = found[key]["adapters"][folder.source] = measured.loss
            if samples:
                found[key]["samples"][folder.source] = measured.samples
            numbers[_measure_name(one.name)] = loss
            made[_measure_name(one.name)] = {"rows": len(part), "rows_sha256": one.sha256[:16]}
        if not rows:  # a loss on some of the rows is not the run's and does not belong into its records
            keep_measures(folder.source, "loss", numbers, made)
    return list(found.values())


def _sets(trained: Trained, data: Mapping[str, str], overrides: Sequence[str], say: Say) -> Iterator[_Set]:
    """Yield a run's own sets, then the others."""
    folder = trained.folder
    if folder.recipe is not None:
        # An adapter of other origin has no recipe, and no rows of its own.
        own = recipe_data(folder, trained.tokenizer, overrides)
        yield _Set(TRAIN, own.train, own.report["train"]["sha256"])
        held_out = own.report["eval"]
        if own.eval is not None and held_out is not None:  # both or neither
            yield _Set(HELD_OUT, own.eval, held_out["sha256"])
    elif not data:
        raise UserInputError(f"{folder.source}: holds no {RECIPE}, so it has no data of its own. Give --data FILE.")
    for name, path in data.items():
        other = other_data(trained, path)
        for problem in other.report["problems"]:
            say(f"{name}: {problem}")
        if not len(other.train):
            raise UserInputError(f"--data: {path!r} has no row that can be learned from.")
        yield _Set(name, other.train, other.report["train"]["sha256"])


def _measure_name(set_name: str) -> str:
    return _MEASURE_NAMES.get(set_name) or f"{Path(set_name).name.replace(' ', '_')}_loss"


# ---- One model on one set ----


def prepare_for_losses(trained: Trained) -> None:
    """Give the model the head it was trained through: TRL's fused one where that is the model's. Once per model."""
    # PEFT types the base as any module; load_trained made it from a PreTrainedModel.
    base, policy = cast("PreTrainedModel", trained.model.get_base_model()), trained.policy
    add_fused_lm_head(base)
    settle_loss_head(
        trained.model, range(1, 9), device=policy.device, dtype=policy.compute_dtype, autocast=_autocast(policy)
    )


def set_loss(trained: Trained, rows: Dataset, *, batch_size: int, progress: Progress = no_progress) -> SetLoss:
    """Return the mean negative log-likelihood of a set's trained tokens, whatever the batches.

    Args:
        trained: After `prepare_for_losses`.
        rows: ``input_ids`` and ``labels``, at least one row.
        batch_size: Sequences at a time.
        progress: Called with how many sequences are done, and of how many.
    """
    total, tokens = 0.0, 0.0  # sums, not means of batches: batches differ in their trained tokens
    samples: list[float | None] = []
    for losses in losses_by_row(trained, rows, batch_size=batch_size, progress=progress):
        total, tokens = total + losses.sums.sum().item(), tokens + losses.counts.sum().item()
        means = zip(losses.sums.tolist(), losses.counts.tolist(), strict=True)
        samples += [value / count if count else None for value, count in means]
    return SetLoss(total / tokens if tokens else float("nan"), round(tokens), len(rows), samples)


def losses_by_row(
    trained: Trained, rows: Dataset, *, batch_size: int, progress: Progress = no_progress
) -> Iterator[RowLosses]:
    """Yield the losses of a set's rows, `SLICE` of them at a time; arguments as in `set_loss`."""
    # By slices: a whole training set as Python lists would take more memory than the model.
    for start in range(0, len(rows), SLICE):
        part = rows.select(range(start, min(start + SLICE, len(rows))))
        # Without the columns that only reports need; the model takes no others.
        features = [{key: row[key] for key in ("input_ids", "labels", LOSS_WEIGHTS) if key in row} for row in part]
        with _autocast(trained.policy):
            losses = row_losses(trained.model, features, batch_size=batch_size, device=trained.policy.device)
        progress(start + len(features), len(rows))
        yield losses


def _autocast(policy: PrecisionPolicy) -> AbstractContextManager[Any]:
    """Return the autocast of training, so that losses round as the run's own did."""
    if policy.amp == "no":
        return nullcontext()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[policy.amp]
    return torch.autocast(policy.device.type, dtype=dtype)


# ---- Shown ----


def loss_table(found: Sequence[LossesOfSet], sources: Sequence[str]) -> Table:
    """Return one row per set, with base and adapters in columns."""
    rows: list[list[str]] = []
    for entry in found:
        losses = [entry["base"], *(entry["adapters"].get(source) for source in sources)]
        counts = [f"{entry['rows']:,}", f"{entry['tokens']:,}"]
        rows.append([entry["set"], *counts, *("-" if loss is None else f"{loss:.4f}" for loss in losses)])
    return Table(["nats per trained token", "rows", "tokens", "base", *short_names(sources)], rows)


def draw_samples(found: Sequence[LossesOfSet], path: Path, title: str, *, with_base: bool = False) -> bool:
    """Draw histograms of the rows' losses, a panel per set, as NEFTune's Figure 4 has them.

    Args:
        found: From `losses_of_runs` with ``samples``.
        path: The PNG file.
        title: Heading.
        with_base: Draw the base alone too, whose losses may lie far from the adapters'.

    Returns:
        False if matplotlib is not installed (extra ``plots``).
    """
    picture = new_picture("", (max(5 * len(found), 6), 4))
    if picture is None:
        return False
    figure, axes = picture
    axes.remove()
    figure.suptitle(title, parse_math=False)
    for panel, entry in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        models = {name: values for name, values in entry["samples"].items() if with_base or name != BASE}
        losses = {name: [value for value in values if value is not None] for name, values in models.items()}
        # One set of bins, so that the heights of two models compare.
        ends = [value for values in losses.values() for value in values]
        span = (min(ends), max(ends)) if ends else (0.0, 1.0)
        for (name, values), color in zip(losses.items(), cycle(COLORS), strict=False):
            panel.hist(
                values, BINS, range=span, histtype="step", linewidth=1.6, color=color, label=short_names([name])[0]
            )
        panel.set(xlabel="loss of a row, nats per trained token", ylabel="rows")
        panel.set_title(entry["set"], fontsize=10, parse_math=False)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8)
    return save_picture(figure, path)
