"""The losses of single held-out rows, taken by the trainer that has trained: the base is not loaded a second time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..files import write_json
from ..run_folder.record import MEASURES_FILE
from ..steps import LOSS_WEIGHTS
from ..trainer import QLoRANeftTrainer
from .records import ROW_LOSSES_FILE, read_run

ROWS = "rows"  # the measure


class RowLossesTrainer(QLoRANeftTrainer):
    """Keeps the loss of every held-out row after the last step.

    Attributes:
        row_losses: Sums in nats and counts of trained tokens, (N,) each; None before the last step.
    """

    row_losses: tuple[list[float], list[float]] | None = None

    def held_out_loss(self) -> float | None:
        """Return the mean loss as upstream's trainer does; after the last step, keep the rows' as well."""
        loss = super().held_out_loss()
        if loss is not None and math.isfinite(loss) and self.is_over:
            self.row_losses = self._of_rows()
        return loss

    def _of_rows(self) -> tuple[list[float], list[float]]:
        sums, counts = [], []
        for row in self.eval_dataset:
            weights = row.get(LOSS_WEIGHTS)
            # The first token is predicted by none.
            trained = [i for i, label in enumerate(row["labels"]) if i and label >= 0]
            count = float(sum(weights[i] for i in trained) if weights is not None else len(trained))
            # One row a pass: the trainer's own pass, joined or padded, whatever its attention takes.
            mean = self._mean_loss([row]) if count else 0.0
            sums.append((mean or 0.0) * count)
            counts.append(count)
        return sums, counts


def trainer_class_keeping(kept: list[RowLossesTrainer]) -> type[RowLossesTrainer]:
    """Return a class whose trainers put themselves into ``kept``."""

    class Kept(RowLossesTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            kept.append(self)

    return Kept


def write_row_losses(folder: Path, trainer: RowLossesTrainer) -> bool:
    """Write what a trainer kept as the measure ``rows``, unless it kept nothing; return whether it did."""
    run = read_run(folder)
    rows = run.summary.data.eval if run.summary and run.summary.data else None
    if trainer.row_losses is None or rows is None:
        return False
    sums, counts = trainer.row_losses
    write_json(folder / ROW_LOSSES_FILE, {"rows": rows.sha256, "sums": sums, "counts": counts})
    write_json(folder / MEASURES_FILE, {**run.measures, ROWS: {}})
    return True
