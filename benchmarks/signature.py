"""The paper's signature on small pretrained models: what alpha does to the losses, and to reciting the training data.

    python benchmarks/signature.py --models MODELS --data ALPACA.json --runs RUNS [--only stories-memorise]

Alpha 0, 5, 10 and 15 with three seeds each, as `qlora-neft sweep`, where a model memorises (128 rows, 25 epochs) and in
the paper's own regime (800 rows, 3 epochs). Rows are Alpaca's, those short enough for the model. Every sweep can be
interrupted: the same command goes on. Each leaves sweep.md, sweep.png and results.json in its folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from qlora_neft.data.templates import alpaca_prompt
from qlora_neft.files.bundled import resolve_bundled

RECIPE, ALPHAS, SEEDS = "llama2-7b-alpaca", "0,5,10,15", 3
MIN_RESPONSE_TOKENS = 24  # shorter ones say little about reciting
COMMON = (
    "model.revision=main",
    "lora.r=64",
    "lora.lora_alpha=16",
    "lora.lora_dropout=0",
    "train.effective_batch_size=16",
    "train.learning_rate=5e-3",
    "train.lr_scheduler_type=cosine",
    "train.max_grad_norm=1.0",
    "data.max_length=256",
    "machine.per_device_train_batch_size=16",
    "machine.max_tokens_per_micro_batch=4096",
    "machine.per_device_eval_batch_size=32",
    "machine.eval_answers=0",
    "machine.eval_steps=100000",  # before and after are measured anyway
    "machine.clean_loss_steps=0",
)
REGIMES = {
    "memorise": ("train.num_train_epochs=25", "data.split=train[:128]"),
    "paper": ("train.num_train_epochs=3", "data.split=train[:800]"),
}


@dataclass(frozen=True)
class Base:
    """A base and how Alpaca's rows are put to it.

    Attributes:
        folder: Name below MODELS, or a bundled model.
        held_out: Slice of its rows.
        longest: Tokens of prompt and response.
        has_template: Whether the rows get Alpaca's prompt; a character-level model has no room for it.
    """

    folder: str
    held_out: str
    longest: int
    has_template: bool


BASES = {
    "stories": Base("stories260K", "train[1500:1628]", 223, True),
    "baby": Base("babyllama361", "train[1000:1128]", 200, False),
    "demo": Base("bundled:demo/base", "train[1500:1628]", 223, True),
}


def main() -> None:
    """Run the sweeps that are asked for, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder of small pretrained models")
    parser.add_argument("--data", type=Path, required=True, help="Alpaca rows, a JSON list")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the sweeps")
    names = [f"{base}-{regime}" for base in BASES for regime in REGIMES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        base, regime = name.split("-")
        sweep(options, BASES[base], base, regime)


def sweep(options: argparse.Namespace, base: Base, name: str, regime: str) -> None:
    """One base in one regime."""
    model = base.folder if base.folder.startswith("bundled:") else str(options.models / base.folder)
    rows = options.runs / f"{name}.json"
    if not rows.exists():
        rows.write_text(json.dumps(short_rows(json.loads(options.data.read_text(encoding="utf-8")), base, model)))
    words = [f"neftune.noise_alpha={ALPHAS}", f"model.name_or_path={model}", f"data.path={rows}"]
    words += [f"data.eval_split={base.held_out}", *COMMON, *REGIMES[regime]]
    if not base.has_template:
        words += ["data.format=prompt-completion", "data.prompt_template=auto"]
    place = ["--seeds", str(SEEDS), "--measure", "rows,overfit", "--output-dir", str(options.runs / f"{name}-{regime}")]
    command = [sys.executable, "-m", "qlora_neft", "sweep", RECIPE, *words, *place]
    print(shlex.join(command[1:]), file=sys.stderr)
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def short_rows(rows: list[dict[str, Any]], base: Base, model: str) -> list[dict[str, Any]]:
    """Rows that fit, in the order of the file; without a template those without an input, as prompt and completion."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_bundled(model))

    def ids(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    made = _with_template if base.has_template else _bare
    found = []
    for row in rows:
        prompt, shaped = made(row)
        response = ids(row["output"])
        is_spelled = tokenizer.unk_token_id not in ids(prompt + row["output"])
        if shaped and is_spelled and MIN_RESPONSE_TOKENS <= len(response) <= base.longest - len(ids(prompt)):
            found.append(shaped)
    return found


def _with_template(row: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    return alpaca_prompt(row["instruction"], row["input"]), row if row["output"].strip() else None


def _bare(row: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    prompt = row["instruction"].strip() + "\n"
    usable = row["output"].strip() and not row["input"]
    return prompt, {"prompt": prompt, "completion": row["output"].strip()} if usable else None


if __name__ == "__main__":
    main()
