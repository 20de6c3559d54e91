"""Our training step on a CPU against plain `SFTTrainer` QLoRA: same NF4 base, same rows, one run.

    python benchmarks/cpu_step.py --output cpu_step.json
    python benchmarks/cpu_step.py --arms ours unfused tuned --width 1024 --layers 2 --tokens 512 --batch 2

Each arm runs in processes of its own, in the order A B B A, so that drift of the machine affects all alike. ``plain``
is what a user gets from TRL with a QLoRA configuration: bf16 autocast, bf16 LoRA, activation checkpointing; ``tuned``
the same set by hand to what a CPU does best, float32 without checkpointing; ``unfused`` ours on PEFT's path
(``fused_lora=False``). On a CPU with native bf16, set ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 to see what
others get.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VOCABULARY = 2048
ROWS = 64
WARM_UP = 1  # steps not counted
ARMS = ("ours", "unfused", "plain", "tuned")


@dataclass(frozen=True)
class Size:
    """What is trained: a Llama of so many layers, and steps of so many sequences.

    ``tokens`` is the length of every row; 0 for lengths spread like those of instructions.
    """

    width: int
    layers: int
    tokens: int
    batch: int
    micro: int


def main() -> None:
    """Run all arms and print, and optionally write, the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", choices=ARMS, help="run one arm and print its figures as JSON")
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=["ours", "plain"], help="arms to compare")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=0, help="tokens of every row; 0: 20 to 200, spread")
    parser.add_argument("--batch", type=int, default=16, help="sequences of an optimizer step")
    parser.add_argument("--micro", type=int, default=4, help="sequences of a forward pass, at most")
    parser.add_argument("--base", type=Path, help="folder of the base (made if missing)")
    parser.add_argument("--steps", type=int, default=4, help="counted optimizer steps per run")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    micro = min(options.micro, options.batch)
    size = Size(options.width, options.layers, options.tokens, options.batch, micro)
    if options.arm:
        print(json.dumps(run_arm(options.arm, options.base, options.steps, size)))
        return
    with tempfile.TemporaryDirectory() as folder:
        base = options.base or make_base(Path(folder) / "base", size)
        order = [*options.arms, *reversed(options.arms)]
        runs = [(arm, spawn(arm, base, options.steps, size)) for arm in order]
    result = compare(runs, size)
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def compare(runs: list[tuple[str, dict[str, Any]]], size: Size) -> dict[str, Any]:
    """Return medians of the arms, and the ratios of the others' to ours."""
    arms = list(dict.fromkeys(name for name, _ in runs))
    by_arm = {arm: [figures for name, figures in runs if name == arm] for arm in arms}
    others = [arm for arm in arms if arm != "ours"]
    seconds = {arm: [s for figures in of for s in figures["step_seconds"]] for arm, of in by_arm.items()}
    median = {arm: statistics.median(values) for arm, values in seconds.items()}
    memory = {arm: max(figures["peak_bytes"] for figures in of) for arm, of in by_arm.items()}
    return {
        "step_seconds_median": median,
        "step_seconds_range": {arm: [min(values), max(values)] for arm, values in seconds.items()},
        **{f"{arm}_over_ours": median[arm] / median["ours"] for arm in others},
        "noise_share_of_a_step": statistics.median(figures["noise_share"] for figures in by_arm["ours"]),
        "peak_bytes": memory,
        **{f"peak_ours_over_{arm}": memory["ours"] / memory[arm] for arm in others},
        "model": {"hidden_size": size.width, "layers": size.layers, "vocabulary": VOCABULARY},
        "step": {"sequences": size.batch, "micro_batch": size.micro, "tokens_per_row": size.tokens or "20 to 200"},
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


def spawn(arm: str, base: Path, steps: int, size: Size) -> dict[str, Any]:
    """Run one arm in a process of its own."""
    command = [sys.executable, __file__, "--arm", arm, "--base", str(base), "--steps", str(steps)]
    for name, value in asdict(size).items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def make_base(folder: Path, size: Size) -> Path:
    """Save a random Llama as a checkpoint; speed does not depend on the weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        intermediate_size=2 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        max_position_embeddings=max(512, size.tokens),
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_rows(size: Size) -> Any:
    """Return tokenized rows."""
    from datasets import Dataset

    draw = random.Random(0)
    lengths = [size.tokens or draw.randint(20, 200) for _ in range(ROWS)]
    rows = [[draw.randrange(4, VOCABULARY) for _ in range(length)] for length in lengths]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def make_tokenizer() -> Any:
    """Return a tokenizer in name only: the rows are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def run_arm(arm: str, base: Path, steps: int, size: Size) -> dict[str, Any]:
    """Train one arm for a few steps; return seconds per step, share of the noise, and peak resident set."""
    if arm in ("ours", "unfused"):
        trainer, noise_seconds = ours(base, steps + WARM_UP, size, fused=arm == "ours")
    else:
        trainer, noise_seconds = plain(base, steps + WARM_UP, size, tuned=arm == "tuned")
    clock = StepClock()
    trainer.add_callback(clock)
    trainer.train()
    counted = clock.seconds[WARM_UP:]
    return {
        "step_seconds": counted,
        "noise_share": sum(noise_seconds) / sum(clock.seconds),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def ours(base: Path, steps: int, size: Size, *, fused: bool) -> tuple[Any, list[float]]:
    """`QLoRANeftTrainer` as it comes, or on PEFT's path."""
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

    args = QLoRANeftConfig(**common(steps, size), neftune_noise_alpha=5.0, clean_loss_steps=0, fused_lora=fused)
    rows, lora = make_rows(size), make_lora()
    return Timed(str(base), args, train_dataset=rows, processing_class=make_tokenizer(), peft_config=lora), seconds


def plain(base: Path, steps: int, size: Size, *, tuned: bool) -> tuple[Any, list[float]]:
    """Return TRL's trainer with the QLoRA configuration of its documentation, and transformers' noise.

    ``tuned``: in float32 throughout, without checkpointing.
    """
    import torch
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32 if tuned else torch.bfloat16,
    )
    by_hand = {"bf16": False, "gradient_checkpointing": False, "model_init_kwargs": {"dtype": "float32"}}
    args = SFTConfig(**common(steps, size), neftune_noise_alpha=5.0, **(by_hand if tuned else {}))
    trainer = SFTTrainer(
        str(base),
        args,
        train_dataset=make_rows(size),
        processing_class=make_tokenizer(),
        quantization_config=nf4,
        peft_config=make_lora(),
    )
    if tuned:  # TRL has cast the adapters to bf16
        for param in trainer.model.parameters():
            if param.requires_grad:
                param.data = param.data.float()
    return trainer, [0.0]


def make_lora() -> Any:
    """Return LoRA r 16 on all linear layers, for both arms."""
    from qlora_neft.base.lora import lora_config
    from qlora_neft.recipe.schema import Lora

    return lora_config(Lora(r=16, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear"))


def common(steps: int, size: Size) -> dict[str, Any]:
    """Return the arguments that both arms share."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": True,
        "max_steps": steps,
        "per_device_train_batch_size": size.micro,
        "gradient_accumulation_steps": size.batch // size.micro,
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
