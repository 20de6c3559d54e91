"""Small pretrained models and short Alpaca rows for measurements on a CPU: how rows are put to a model, and the sweeps.

Neither models nor rows are part of this repository.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from qlora_neft.bundled import resolve_bundled
from qlora_neft.data.templates import alpaca_prompt

RECIPE = "llama2-7b-alpaca"
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
    "machine.per_device_train_batch_size=16",
    "machine.max_tokens_per_micro_batch=4096",
    "machine.per_device_eval_batch_size=32",
    "machine.eval_answers=0",
    "machine.eval_steps=100000",  # before and after are measured anyway
    "machine.clean_loss_steps=0",
)


@dataclass(frozen=True)
class Base:
    """A base and how Alpaca's rows are put to it.

    Attributes:
        folder: Name below the folder of models, or a bundled model.
        held_out: Slice of its rows.
        longest: Tokens of prompt and response.
        has_template: Whether the rows get Alpaca's prompt; a character-level model has no room for it.
    """

    folder: str
    held_out: str
    longest: int
    has_template: bool

    def path(self, models: Path) -> str:
        """What ``model.name_or_path`` is."""
        return self.folder if self.folder.startswith("bundled:") else str(models / self.folder)

    def words(self, models: Path, rows: Path) -> list[str]:
        """Overrides that name the model and its rows."""
        bare = [] if self.has_template else ["data.format=prompt-completion", "data.prompt_template=auto"]
        return [f"model.name_or_path={self.path(models)}", f"data.path={rows}", *bare]


BASES = {
    "stories": Base("stories260K", "train[1500:1628]", 223, True),
    "baby": Base("babyllama361", "train[1000:1128]", 200, False),
    "demo": Base("bundled:demo/base", "train[1500:1628]", 223, True),
}


def write_rows(
    path: Path, data: Path, base: Base, models: Path, *, unlike: Collection[str] = (), most: int = 0
) -> Path:
    """Write the rows of a file that fit a base, once.

    Args:
        path: File to write; left as it is where it is there.
        data: Alpaca's format, a JSON list.
        base: What they must fit.
        models: Folder of models.
        unlike: Instructions to leave away.
        most: The first so many; 0 for all.
    """
    if not path.exists():
        rows = [row for row in json.loads(data.read_text(encoding="utf-8")) if row["instruction"] not in unlike]
        found = _short(rows, base, base.path(models))
        path.write_text(json.dumps(found[:most] if most else found), encoding="utf-8")
    return path


def run_sweep(words: Sequence[str], folder: Path, *options: str) -> None:
    """``qlora-neft sweep`` of the recipe; what is finished there is not done again."""
    qlora_neft("sweep", RECIPE, *words, "--output-dir", str(folder), *options)


def runs_of(folder: Path) -> list[Path]:
    """Folders of a sweep's finished runs."""
    return sorted(path.parent for path in folder.glob("*/summary.json"))


def qlora_neft(*words: str) -> str:
    """A verb in a process of its own; what it prints on standard output."""
    print(shlex.join(["qlora-neft", *words]), file=sys.stderr)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "qlora_neft", *words]
    return subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout


def _short(rows: list[dict[str, Any]], base: Base, model: str) -> list[dict[str, Any]]:
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
    kept = {key: row[key] for key in ("instruction", "input", "output")}
    return alpaca_prompt(row["instruction"], row["input"]), kept if row["output"].strip() else None


def _bare(row: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    prompt = row["instruction"].strip() + "\n"
    usable = row["output"].strip() and not row["input"]
    return prompt, {"prompt": prompt, "completion": row["output"].strip()} if usable else None
