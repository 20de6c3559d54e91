"""Commands that write answers are killed or interrupted: the same command goes on, with the same answers in the end."""

from __future__ import annotations

import signal
import subprocess
from functools import partial
from pathlib import Path

from .bench import LONGEST, Bench, contents
from .fault import Fault, hold

PROMPTS, BATCH = 40, 4


def generate(bench: Bench, name: str, number: int) -> int:
    """Send a signal to ``generate --file`` after some answers."""
    place = bench.new()
    place.mkdir()
    prompts, answers, whole = (place / file for file in ("prompts.txt", f"answers.{name}", f"whole.{name}"))
    prompts.write_text("".join(f"Repeat {n}\n" for n in range(PROMPTS)))
    words = ("generate", str(bench.finished), "--file", str(prompts), "--max-new-tokens", "12")
    words = (*words, "--batch-size", str(BATCH), "--output")
    bench.said(*words, str(whole))
    process = bench.start("-P", "-m", "qlora_neft", *words, str(answers), stderr=subprocess.PIPE)
    listed = answers.with_name(f".{answers.name}.list")
    bench.until(lambda: _lines(listed) > BATCH, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=LONGEST)
    code = -number if number == signal.SIGKILL else 128 + number
    hold(process.returncode == code, f"it ended with {process.returncode} instead of {code}: {said.strip()[-300:]}")
    hold(number == signal.SIGKILL or said.rstrip().splitlines()[-1].startswith(("interrupted: ", "  ")), "it said not")
    before = contents(place)
    said = bench.said(*words, str(answers), "--repetition-penalty", "1", code=2)
    hold("repetition_penalty" in said, f"other settings were not refused by name: {said.strip()[-300:]}")
    hold(contents(place) == before, "the refusal changed files")
    printed = bench.said(*words, str(answers))
    hold("going on behind" in printed, "it began anew")
    hold(answers.read_bytes() == whole.read_bytes(), "other answers than those of the undisturbed command")
    return 0


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


KIND = "a command that writes answers is stopped"
FAULTS = [
    Fault(KIND, "`kill -9`, JSON lines", partial(generate, name="jsonl", number=signal.SIGKILL)),
    Fault(KIND, "`kill -9`, text", partial(generate, name="text", number=signal.SIGKILL)),
    Fault(KIND, "SIGINT", partial(generate, name="jsonl", number=signal.SIGINT)),
    Fault(KIND, "SIGTERM", partial(generate, name="jsonl", number=signal.SIGTERM)),
]
