"""One rank of a torchrun job: train a tiny model and write down the noise each sequence received.

python rank_worker.py MODEL_DIR OUTPUT_DIR SEQUENCES_PER_RANK
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from noise_probe import NoiseProbe
from tiny import adapter_weights, mixed_rows, tiny_trainer

from qlora_neft.steps import LOSS_WEIGHTS


def drop_a_step(trainer) -> None:
    """Make the loss of step 2 infinite on the last rank alone; its gradient stays finite."""
    read = trainer.read_metrics
    is_last = trainer.args.process_index == trainer.args.world_size - 1

    def read_metrics(loss):
        value = read(loss)
        return float("inf") if is_last and trainer.state.global_step == 1 else value

    trainer.read_metrics = read_metrics


def main(model: Path, output: Path, per_rank: int) -> None:
    rows = mixed_rows(16, seed=3)
    # Every third token counts a quarter, and every sequence as much as any other.
    weights = [[0.25 if place % 3 == 0 else 1.0 for place in range(len(ids))] for ids in rows["input_ids"]]
    # One of two ranks flattens and the other pads: what a rank's machine decides must not matter either.
    flattens = int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ["RANK"] == "0"
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": per_rank // 2,
        "max_steps": 2,
        "padding_free": flattens,
        "lora_dropout": 0.3,  # its masks belong to the sequence as well
    }
    trainer = tiny_trainer(model, output, rows, **options)
    probe = NoiseProbe(trainer)
    trainer.train()
    weighted = tiny_trainer(
        model, output, rows.add_column(LOSS_WEIGHTS, weights), loss_mean="sequences", loraplus_lr_ratio=4, **options
    )
    weighted.train()
    selected = tiny_trainer(
        model,
        output,
        rows,
        **{**options, "max_steps": 4, "learning_rate": 0.1, "eval_dataset": mixed_rows(5, seed=6)},
        keep="best",
        early_stopping_patience=1,
        selection_steps=1,
    )
    selected.train()
    dropping = tiny_trainer(model, output, rows, **{**options, "max_steps": 3})
    drop_a_step(dropping)
    dropping.train()
    found = {
        "dropped": adapter_weights(dropping),
        "bad_steps": dropping.bad_steps,
        "ended": (selected.state.global_step, selected.selected.step),
        "selected": adapter_weights(selected),
        "noise": probe.by_sequence(rows),
        "adapter": adapter_weights(trainer),
        "weighted": adapter_weights(weighted),
    }
    torch.save(found, output / f"rank{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
