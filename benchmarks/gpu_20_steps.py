"""Twenty QLoRA + NEFTune steps on a Llama-2-7B-sized base with random weights: peak memory and tokens per second.

    python benchmarks/gpu_20_steps.py --output docs/results/gpu_20_steps.json

Needs a CUDA device and 14 GB of disk for the random checkpoint. Random weights say nothing about quality.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS, WARM_UP, BATCH, LENGTH = 20, 5, 16, 512


def main() -> None:
    """Make the base, train, print and optionally write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="folder of the base (made if missing)")
    parser.add_argument("--max-tokens", type=int, default=4096, help="tokens per micro-batch")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu_20_steps.py: needs a CUDA device")
    with tempfile.TemporaryDirectory() as folder:
        base = options.base or make_base(Path(folder) / "base")
        result = measure(base, options.max_tokens)
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def make_base(folder: Path) -> Path:
    """Save a random base of Llama-2-7B's geometry, in bf16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    with torch.device("cuda"):
        LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    torch.cuda.empty_cache()
    return folder


def measure(base: Path, max_tokens: int) -> dict[str, Any]:
    """Train; return what the clock and the allocator say."""
    import torch
    from cpu_step import StepClock, make_tokenizer
    from datasets import Dataset

    from qlora_neft import QLoRANeftConfig, QLoRANeftTrainer

    draw = random.Random(0)
    lengths = [draw.randint(64, LENGTH) for _ in range(BATCH * STEPS)]
    rows = [[draw.randrange(4, 32000) for _ in range(length)] for length in lengths]
    args = QLoRANeftConfig(
        tempfile.mkdtemp(),
        neftune_noise_alpha=5.0,
        per_device_train_batch_size=BATCH,
        max_tokens_per_micro_batch=max_tokens,
        max_steps=STEPS,
        learning_rate=2e-4,
        optim="adamw_torch",
        max_length=None,
        clean_loss_steps=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
    trainer = QLoRANeftTrainer(str(base), args, train_dataset=dataset, processing_class=make_tokenizer())
    clock = StepClock()
    trainer.add_callback(clock)
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    seconds = statistics.median(clock.seconds[WARM_UP:])
    tokens = sum(lengths) / STEPS
    return {
        "device": torch.cuda.get_device_name(),
        "base": "Llama-2-7B geometry, random weights, NF4 with double quantization, LoRA r 64",
        "step_seconds_median": seconds,
        "real_tokens_per_second": tokens / seconds,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "max_tokens_per_micro_batch": max_tokens,
        "sequences_per_step": BATCH,
    }


if __name__ == "__main__":
    main()
