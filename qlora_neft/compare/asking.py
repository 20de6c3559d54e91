"""How a sweep measures its runs: what they are asked, who judges, and what is stored of it. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import UserInputError
from ..evaluation.alpaca.files import Output, read_instructions
from ..evaluation.alpaca.judges import ANNOTATOR, PROGRAM
from ..evaluation.defaults import (
    ANSWER_TOKENS,
    HELD_OUT,
    HELD_OUT_REFERENCE,
    RECITED_TOKENS,
    greedy,
    prompts_made,
)
from ..evaluation.texts import chunk_of_run

ASKING = ("text", "alpaca")  # the measures that ask instructions


@dataclass(frozen=True)
class Asking:
    """What the measures of a sweep need to know.

    Attributes:
        instructions: A file, `HELD_OUT` for each run's own held-out prompts, or None for AlpacaEval's 805.
        rows: Use only the first N of them; 0 for all.
        judge: The alpaca_eval package or a local model; None without the measure ``alpaca``.
        annotator: The package's annotator.
        reference: File of the answers to compare with; None for those that belong to the judge.
    """

    instructions: str | None = None
    rows: int = 0
    judge: str | None = None
    annotator: str = ANNOTATOR
    reference: str | None = None

    @classmethod
    def of(cls, text: str) -> Asking:
        """Read back what `to_text` wrote."""
        return cls(**json.loads(text))

    def to_text(self) -> str:
        """Return it as one line, for the process that measures."""
        return json.dumps(asdict(self))

    @property
    def is_on_held_out_rows(self) -> bool:
        """Whether the runs' own held-out prompts are asked."""
        return self.instructions == HELD_OUT

    def differs(self, name: str, folder: Path, measure: Mapping[str, Any]) -> bool:
        """Whether a stored measure was made in another way than this sweep makes it.

        One whose making is not recorded, of an earlier version, stays: the results say so.
        """
        made = measure.get("made")
        return isinstance(made, dict) and any(made.get(key) != value for key, value in self._made(name, folder).items())

    def _made(self, name: str, folder: Path) -> dict[str, Any]:
        """Return what is known of a measure's making before it is made."""
        if name == "overfit":
            return greedy(RECITED_TOKENS)
        if name not in ASKING:
            return {}
        found = greedy(ANSWER_TOKENS) | self.prompts
        if name == "text":
            return found | {"chunk": chunk_of_run(folder)}
        if self.judge == PROGRAM:
            return found | {"judge": self.annotator}
        judge = Path(str(self.judge)).expanduser()
        return found | {"judge": judge.resolve().name if judge.is_dir() else self.judge}

    @cached_property
    def prompts(self) -> dict[str, Any]:
        """What is stored of the instructions; empty for held-out prompts, which each run reads from its own rows.

        Raises:
            UserInputError: If they cannot be read.
        """
        if self.is_on_held_out_rows:
            return {}
        rows = read_instructions(self.instructions)
        return prompts_made([row["instruction"] for row in (rows[: self.rows] if self.rows else rows)])


def check_asking(asking: Asking, measures: list[str]) -> list[str]:
    """Refuse what would fail after the first run has trained.

    Returns:
        What a reader of the results must know.

    Raises:
        UserInputError: If an option has no effect, instructions cannot be read, or there is no judge.
    """
    given = {"--judge": asking.judge, "--reference": asking.reference}
    unused = [option for option, value in given.items() if value is not None and "alpaca" not in measures]
    if unused:
        raise UserInputError(f"{', '.join(unused)}: no effect without --measure alpaca. Add it, or omit {unused[0]}.")
    if not any(name in ASKING for name in measures):
        if asking.instructions is not None or asking.rows:
            raise UserInputError("--instructions, --rows: no effect without --measure text or alpaca. Omit them.")
        return []
    if "alpaca" not in measures:
        _ = asking.prompts  # read for its errors alone
        return []
    if asking.judge is None:
        raise UserInputError(
            "--judge: --measure alpaca needs one. Give alpaca_eval, the package, with an --annotator; or a local model."
        )
    from ..evaluation.alpaca.judge import check_judging

    own: list[Output] = [{"instruction": "", "output": "", "generator": HELD_OUT_REFERENCE}]
    reference = Path(asking.reference) if asking.reference else own if asking.is_on_held_out_rows else None
    return check_judging(asking.judge, reference, asking.instructions, asking.annotator)
