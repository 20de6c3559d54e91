"""Our training step on a CPU against plain `SFTTrainer` QLoRA: same NF4 base, same rows, one run.

    python benchmarks/cpu_step.py --output cpu_step.json

Each arm runs in a process of its own, in the order A B B A, so that drift of the machine affects both alike. ``plain``
is what a user gets from TRL with a QLoRA configuration: bf16 autocast, bf16 LoRA, activation checkpointing. On a CPU
with native bf16, set ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 to see what others get.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WIDTH, LAYERS, VOCABULARY = 256, 4, 2048
ROWS, BATCH, MICRO = 64, 16, 4
WARM_UP = 1  # steps not counted


def main() -> None:
    """Run all arms and print, and optionally write, the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", choices=("ours", "plain"), help="run one arm and print its figures as JSON")
    parser.add_argument("--base", type=Path, help="folder of the base (made if missing)")
    parser.add_argument("--steps", type=int, default=4, help="counted optimizer steps per run")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(run_arm(options.arm, options.base, options.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        base = options.base or make_base(Path(folder) / "base")
        runs = [(arm, spawn(arm, base, options.steps)) for arm in ("ours", "plain", "plain", "ours")]
    result = compare(runs)
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def compare(runs: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Return medians and ratios of the two arms."""
    by_arm = {arm: [figures for name, figures in runs if name == arm] for arm in ("ours", "plain")}
    seconds = {arm: [s for figures in of for s in figures["step_seconds"]] for arm, of in by_arm.items()}
    median = {arm: statistics.median(values) for arm, values in seconds.items()}
    memory = {arm: max(figures["peak_bytes"] for figures in of) for arm, of in by_arm.items()}
    return {
        "step_seconds_median": median,
        "step_seconds_range": {arm: [min(values), max(values)] for arm, values in seconds.items()},
        "plain_over_ours": median["plain"] / median["ours"],
        "noise_share_of_a_step": statistics.median(figures["noise_share"] for figures in by_arm["ours"]),
        "peak_bytes": memory,
        "peak_ours_over_plain": memory["ours"] / memory["plain"],
        "model": {"hidden_size": WIDTH, "layers": LAYERS, "vocabulary": VOCABULARY},
        "step": {"sequences": BATCH, "micro_batch": MICRO},
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    import torch

    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "native_bf16": "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8"),
        "ONEDNN_MAX_CPU_ISA": os.environ.get("ONEDNN_MAX_CPU_ISA", "not set"),
        "torch": torch.__version__,
    }


def spawn(arm: str, base: Path, steps: int) -> dict[str, Any]:
    """Run one arm in a process of its own."""
    command = [sys.executable, __file__, "--arm", arm, "--base", str(base), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def make_base(folder: Path) -> Path:
    """Save a random Llama as a checkpoint; speed does not depend on the weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_rows() -> Any:
    """Return tokenized rows of 20 to 200 tokens, their lengths spread like those of instructions."""
    from datasets import Dataset

    draw = random.Random(0)
    rows = [[draw.randrange(4, VOCABULARY) for _ in range(draw.randint(20, 200))] for _ in range(ROWS)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def make_tokenizer() -> Any:
    """Return a tokenizer in name only: the rows are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def run_arm(arm: str, base: Path, steps: int) -> dict[str, Any]:
    """Train one arm for a few steps; return seconds per step, share of the noise, and peak resident set."""
    trainer, noise_seconds = (ours if arm == "ours" else plain)(base, steps + WARM_UP)
    clock = StepClock()
    trainer.add_callback(clock)
    trainer.train()
    counted = clock.seconds[WARM_UP:]
    return {
        "step_seconds": counted,
        "noise_share": sum(noise_seconds) / sum(clock.seconds),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def ours(base: Path, steps: int) -> tuple[Any, list[float]]:
    """`QLoRANeftTrainer` as it comes."""
    from qlora_neft import QLoRANeftConfig, QLoRANeftTrainer

    seconds: list[float] = []

    class Timed(QLoRANeftTrainer):
        def _noise(self, *args: Any) -> Any:
            noise = super()._noise(*args)

            def timed(*hook_args: Any) -> Any:
                start = time.perf_counter()
                result = noise(*hook_args)
                seconds.append(time.perf_counter() - start)
                return result

            return timed

    args = QLoRANeftConfig(**common(steps), neftune_noise_alpha=5.0, clean_loss_steps=0)
    rows, lora = make_rows(), make_lora()
    return Timed(str(base), args, train_dataset=rows, processing_class=make_tokenizer(), peft_config=lora), seconds


def plain(base: Path, steps: int) -> tuple[Any, list[float]]:
    """Return TRL's trainer with the QLoRA configuration of its documentation, and transformers' noise."""
    import torch
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    args = SFTConfig(**common(steps), neftune_noise_alpha=5.0)
    trainer = SFTTrainer(
        str(base),
        args,
        train_dataset=make_rows(),
        processing_class=make_tokenizer(),
        quantization_config=nf4,
        peft_config=make_lora(),
    )
    return trainer, [0.0]


def make_lora() -> Any:
    """Return LoRA r 16 on all linear layers, for both arms."""
    from qlora_neft.base.lora import lora_config
    from qlora_neft.recipe.schema import Lora

    return lora_config(Lora(r=16, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear"))


def common(steps: int) -> dict[str, Any]:
    """Return the arguments that both arms share."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": True,
        "max_steps": steps,
        "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": BATCH // MICRO,
        "learning_rate": 2e-4,
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": None,
    }


def StepClock() -> Any:
    """Return a callback that times every optimizer step; defined here so that --help needs no transformers."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds.append(time.perf_counter() - self.start)

    return Clock()


if __name__ == "__main__":
    main()
