"""AlpacaEval's files: instructions, outputs, annotations. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NotRequired, TypeVar, cast

from typing_extensions import TypedDict

from ...errors import UserInputError, first_line
from ...files import write_json
from ..texts import read_rows

HUB_DATASET, HUB_FILE = "tatsu-lab/alpaca_eval", "alpaca_eval.json"  # 805 instructions, answered by text_davinci_003
DATASET, DATASPLIT = "custom", "eval"  # what rows are labelled if the instructions do not say


class Row(TypedDict):
    """A row of any of the files. It may have more fields, which are kept."""

    instruction: str


class Instruction(Row):
    """An instruction to answer; with ``output``, the reference model's answer to it."""

    output: NotRequired[str]
    generator: NotRequired[str | None]
    dataset: NotRequired[str]
    datasplit: NotRequired[str]


class Output(Row):
    """A model's answer."""

    output: str
    generator: NotRequired[str | None]
    dataset: NotRequired[str]
    datasplit: NotRequired[str]


class Pair(Row):
    """The reference's answer, number 1, and the model's, number 2."""

    output_1: str
    generator_1: str | None
    dataset: str
    output_2: str
    generator_2: str | None


class Annotation(Row):
    """A judge's verdict on a pair; of the pair, only what scoring needs.

    ``preference`` is 1 if the reference is better, 2 if the model is, and null without a verdict.
    """

    output_2: str
    preference: float | None


AnyRow = TypeVar("AnyRow", bound=Row)


def read_instructions(path: str | Path | None, hub_file: str = HUB_FILE) -> list[Instruction]:
    """Read rows with an ``instruction`` each; an ``input`` is appended to it after an empty line.

    Args:
        path: JSON list or JSON lines; None for AlpacaEval's 805, from the Hub.
        hub_file: Their file there, which says whose answers come with them.

    Raises:
        UserInputError: If there are none, or two are the same.
    """
    # Downloaded once, to the Hub's cache.
    file = _from_hub(hub_file) if path is None else Path(path)
    rows = _with_texts(read_rows(file, "--instructions"), ("instruction",), file, "--instructions")
    rows = [_joined(row) for row in rows]
    _by_instruction(rows, file, "--instructions")  # after joining: Alpaca repeats instructions with other inputs
    return cast("list[Instruction]", rows)


def read_outputs(path: str | Path, key: str = "--outputs") -> list[Output]:
    """Read rows with ``instruction`` and ``output``.

    Raises:
        UserInputError: If a row lacks one of them.
    """
    return cast("list[Output]", _with_texts(read_rows(path, key), ("instruction", "output"), Path(path), key))


def read_annotations(path: str | Path, key: str = "--score") -> list[Annotation]:
    """Read rows with ``instruction``, ``output_2`` and ``preference``, a number or null.

    Raises:
        UserInputError: If a row lacks one of them.
    """
    rows = _with_texts(read_rows(path, key), ("instruction", "output_2"), Path(path), key)
    for number, row in enumerate(rows, 1):
        if "preference" not in row:
            raise UserInputError(f"{key}: {str(path)!r}, entry {number} has no preference, the judge's verdict.")
        value = row["preference"]
        # bool is an int to Python; True would pass for "the reference is better".
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserInputError(
                f"{key}: {str(path)!r}, entry {number}: preference must be a number or null, got {value!r}."
            )
    return cast("list[Annotation]", rows)


class RowsFile(Generic[AnyRow]):
    """Rows by instruction, kept in a file that is written whole or not at all.

    Args:
        path: The file; rows that it already holds are kept.
        key: What the caller wrote, for messages.
        order: Instructions, in the order of the file; rows of other instructions come last.
        made_by: Fields that say how each row was made; a file with other values of them is refused.
        named: Further fields that every row is given.

    Attributes:
        rows: By instruction.

    Raises:
        UserInputError: If the file does not hold such rows, or they were made differently.
    """

    def __init__(
        self,
        path: Path,
        key: str,
        order: Sequence[str],
        made_by: Mapping[str, Any],
        named: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.key, self.order, self.made_by, self.named = path, key, list(order), made_by, named or {}
        if not path.parent.is_dir():
            raise UserInputError(f"{key}: there is no folder {str(path.parent)!r}. Create it first.")
        stored = _with_texts(read_rows(path, key), ("instruction",), path, key) if path.exists() else []
        for row in stored:  # before anything is answered: mixing two models' rows would spoil both
            self._check(row)
        self.rows = cast("dict[str, AnyRow]", _by_instruction(stored, path, key))

    def missing(self) -> list[str]:
        """Return the instructions without a row, in order."""
        return [name for name in self.order if name not in self.rows]

    def add(self, rows: Sequence[AnyRow]) -> None:
        """Keep rows and write the file."""
        self.rows |= {row["instruction"]: row for row in rows}
        # Stored rows get the fields too, which a caller may have renamed since (the folder moved).
        for name, row in self.rows.items():
            self.rows[name] = cast("AnyRow", {**row, **self.named, **self.made_by})
        # Rows that this call does not ask for (--rows) are kept, behind those that it does.
        asked = set(self.order)
        write_json(self.path, [*self.ordered(), *(row for name, row in self.rows.items() if name not in asked)])

    def ordered(self) -> list[AnyRow]:
        """Return the rows asked for, in order."""
        return [self.rows[name] for name in self.order if name in self.rows]

    def _check(self, row: Mapping[str, Any]) -> None:
        differing = [
            _difference(name, row.get(name), now) for name, now in self.made_by.items() if row.get(name) != now
        ]
        if differing:
            raise UserInputError(
                f"{self.key}: {str(self.path)!r} holds rows made differently: {'; '.join(differing)}. Give another "
                "file, or delete this one."
            )


def _difference(name: str, was: Any, now: Any) -> str:
    """Say how two values of a field differ; if both hold a JSON object as text, key by key."""
    try:
        old, new = json.loads(was), json.loads(now)  # `metadata`: name the setting, not two long texts
    except (TypeError, ValueError):
        old = new = None
    if not isinstance(old, dict) or not isinstance(new, dict):
        return f"{name} was {was!r}, is now {now!r}"
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{key} was {old.get(key)!r}, is now {new.get(key)!r}" for key in keys)


def _with_texts(rows: Sequence[Any], names: Sequence[str], path: Path, key: str) -> list[dict[str, Any]]:
    """Check that all rows are objects with a text under each name; the first that is not is refused by its number."""
    for number, row in enumerate(rows, 1):
        for name in names:
            if not isinstance(row, dict) or not isinstance(row.get(name), str):
                raise UserInputError(f"{key}: {str(path)!r}, entry {number} must have {name}, a text.")
    return list(rows)


def _joined(row: dict[str, Any]) -> dict[str, Any]:
    more = row.get("input")  # Alpaca's own format; AlpacaEval has instruction alone
    return {**row, "instruction": f"{row['instruction']}\n\n{more}"} if isinstance(more, str) and more else row


def _by_instruction(rows: Sequence[dict[str, Any]], path: Path, key: str) -> dict[str, dict[str, Any]]:
    """Index rows by their instruction; one that occurs twice is refused."""
    found = {row["instruction"]: row for row in rows}  # the instruction is what AlpacaEval joins files by
    if len(found) < len(rows):
        raise UserInputError(f"{key}: {str(path)!r} has {len(rows) - len(found)} instructions twice; each must differ.")
    return found


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    try:
        return Path(hf_hub_download(HUB_DATASET, name, repo_type="dataset"))
    except (OSError, HTTPError) as error:
        raise UserInputError(
            f"--instructions: AlpacaEval's instructions cannot be downloaded from the Hub ({HUB_DATASET}, {name}). "
            f"Give a local JSON file of objects with an instruction. ({first_line(error)})"
        ) from error
