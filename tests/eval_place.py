"""A finished run's folder with its data, instructions and other data beside it, for the tests of eval."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from command_line import invoke, never_stopped

OTHER = [{"instruction": f"Say {word}", "input": "", "output": word * 2} for word in ("moon", "sun", "a", "sea")]
ASKED = [{"instruction": f"Say {n}", "dataset": "mine", "output": f"{n}!"} for n in range(7)]
FAST = ("--max-new-tokens", "12", "--batch-size", "3")


def make_place(llama: Path, folder: Path) -> Path:
    """A copy of a finished run and its data, which may be written to."""
    shutil.copytree(never_stopped(llama).parent, folder)
    (folder / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in OTHER))
    (folder / "asked.json").write_text(json.dumps(ASKED))
    return folder


def found(*arguments: str) -> dict[str, Any]:
    """What a verb under eval prints with --json."""
    code, stdout, stderr = invoke("eval", *arguments, "--json")
    assert code == 0, stderr
    return json.loads(stdout)
