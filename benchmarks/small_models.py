"""Small pretrained models and short Alpaca rows for measurements on a CPU, and the sweeps that use them.

Prompts have no template: in the tokens of a small tokenizer it would be longer than the rows. The demo's base learns
the demo's rows instead of Alpaca's, whose tokens it hardly knows.

Neither the models nor the rows are part of this repository.
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

from qlora_neft.paths import resolve_bundled

MIN_RESPONSE_TOKENS = 24  # shorter responses say little about reciting
MAX_CHARACTERS = 1000  # longer rows fit none of the bases
COMMON = (
    "lora.lora_dropout=0",
    "train.effective_batch_size=16",
    "train.lr_scheduler_type=cosine",
    "train.max_grad_norm=1.0",
    "machine.per_device_train_batch_size=16",
    "machine.max_tokens_per_micro_batch=4096",
    "machine.per_device_eval_batch_size=100",
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
        longest: Tokens of prompt and response. Steps cost time in proportion.
        recipe: Shipped recipe that is started from.
        has_own_rows: Whether the recipe's own rows are learned, with its template, and its numbers kept.
    """

    folder: str
    held_out: str
    longest: int
    recipe: str = "llama2-7b-alpaca"
    has_own_rows: bool = False

    def path(self, models: Path) -> str:
        """Value of ``model.name_or_path``."""
        return self.folder if self.folder.startswith("bundled:") else str(models / self.folder)

    def words(self, models: Path, rows: Path) -> list[str]:
        """Overrides that name the model, its rows, and how fast it learns them."""
        if self.has_own_rows:
            return []
        bare = ["data.format=prompt-completion", "data.prompt_template=auto"]
        adapter = ["lora.r=64", "lora.lora_alpha=16", "train.learning_rate=5e-3"]
        return [f"model.name_or_path={self.path(models)}", "model.revision=main", f"data.path={rows}", *bare, *adapter]


BASES = {
    "stories": Base("stories260K", "train[800:928]", 104),
    "baby": Base("babyllama361", "train[1000:1128]", 200),
    "demo": Base("bundled:demo/base", "", 200, recipe="demo", has_own_rows=True),
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


def run_sweep(recipe: str, words: Sequence[str], folder: Path, *options: str) -> None:
    """``qlora-neft sweep`` of a recipe; what is finished there is not done again."""
    qlora_neft("sweep", recipe, *words, "--output-dir", str(folder), *options)


def runs_of(folder: Path) -> list[Path]:
    """Return the folders of a sweep's finished runs."""
    return sorted(path.parent for path in folder.glob("*/summary.json"))


def qlora_neft(*words: str) -> str:
    """Run a verb in a process of its own and return its standard output."""
    print(shlex.join(["qlora-neft", *words]), file=sys.stderr)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "qlora_neft", *words]
    return subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout


def _short(rows: list[dict[str, Any]], base: Base, model: str) -> list[dict[str, Any]]:
    """Return the rows without an input that fit, in the order of the file, as they are or as prompt and completion."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_bundled(model))
    found = []
    for row in rows:
        prompt, completion = row["instruction"].strip() + "\n", row["output"].strip()
        if row["input"] or len(completion) > MAX_CHARACTERS:
            continue
        asked, answered = (tokenizer(text)["input_ids"] for text in (prompt, completion))
        is_spelled = tokenizer.unk_token_id not in asked + answered
        if is_spelled and MIN_RESPONSE_TOKENS <= len(answered) <= base.longest - len(asked):
            found.append(row if base.has_own_rows else {"prompt": prompt, "completion": completion})
    return found
