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


def main(model: Path, output: Path, per_rank: int) -> None:
    rows = mixed_rows(16, seed=3)
    # One of two ranks flattens and the other pads: what a rank's machine decides must not matter either.
    flattens = int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ["RANK"] == "0"
    trainer = tiny_trainer(
        model,
        output,
        rows,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=per_rank // 2,
        max_steps=2,
        padding_free=flattens,
        lora_dropout=0.3,  # its masks belong to the sequence as well
    )
    probe = NoiseProbe(trainer)
    trainer.train()
    rank = os.environ.get("RANK", "0")
    torch.save({"noise": probe.by_sequence(rows), "adapter": adapter_weights(trainer)}, output / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
