"""The formats that rows come in, recognized by their columns, and the example that a row of each states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..errors import UserInputError
from .conversations import read_messages, read_shared, speaks_openai
from .examples import BadRow, EmptyRow, Example, Instruction, Passage
from .values import text_of

# Columns of each format. A source has the first format whose columns are all there.
REQUIRED_COLUMNS = {
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "text": ("text",),
}
COLUMNS_NAMED, LONGEST_NAME = 20, 40  # in messages


def detect_format(rows: Sequence[Mapping[str, Any]], key: str = "data.path", path: str | None = None) -> str:
    """Return the format that fits the columns of some rows.

    Args:
        rows: Rows of one source.
        key: The name the caller wrote for the source, for messages.
        path: Where the rows are from, for messages.

    Raises:
        UserInputError: If none fits.
    """
    # Of all the rows looked at: in JSON, a row may omit what another one has.
    columns = {str(name) for row in rows for name in row}
    for name, required in REQUIRED_COLUMNS.items():
        if columns >= set(required):
            # Some data sets have OpenAI's messages in ShareGPT's column.
            return "messages" if name == "sharegpt" and speaks_openai(rows) else name
    forms = "; ".join(f"{name} needs {' and '.join(required)}" for name, required in REQUIRED_COLUMNS.items())
    where = "" if path is None else f" in {path!r}"
    raise UserInputError(f"{key}: the columns {_listed(columns)} fit no format: {forms}. Rename them{where}.")


def check_columns(rows: Sequence[Mapping[str, Any]], format: str, key: str = "data.path") -> None:
    """Check that the columns of a stated format are there.

    Raises:
        UserInputError: If one is missing from all rows.
    """
    columns = {str(name) for row in rows for name in row}
    required = REQUIRED_COLUMNS[format]
    if format == "messages" and "conversations" in columns:  # as `detect_format` allows
        return
    if not columns >= set(required):
        raise UserInputError(
            f"data.format: {format} needs the columns {' and '.join(required)}, {key} has "
            f"{_listed(columns)}. Rename them, or set data.format to what they are."
        )


def to_example(row: Mapping[str, Any], format: str) -> tuple[Example, int]:
    """Read one row.

    Args:
        row: Values by column name.
        format: One of `REQUIRED_COLUMNS`.

    Returns:
        The example, and how many turns were left out: those before the first request of a shared conversation (as
        in FastChat's training code), and those after the last response.

    Raises:
        BadRow: If the row does not fit the format.
        EmptyRow: If there is nothing to learn in it.
    """
    return _READERS[format](row)


def _instruction(row: Mapping[str, Any]) -> tuple[Example, int]:
    # Missing or null means no input, as an empty text does.
    given = "" if row.get("input") is None else row["input"]
    example = Instruction(
        text_of(row.get("instruction"), "instruction"), text_of(given, "input"), text_of(row.get("output"), "output")
    )
    if not (example.instruction + example.input).strip():
        raise EmptyRow("instruction and input are blank")
    if not example.output.strip():
        raise EmptyRow("output is blank")
    return example, 0


def _prompt_completion(row: Mapping[str, Any]) -> tuple[Example, int]:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):  # TRL's conversational form
        # TRL does not train a prompt's responses, and a `Dialogue` trains them all: refuse rather than guess.
        if any(isinstance(m, Mapping) and m.get("role") == "assistant" for m in prompt):
            raise BadRow("prompt holds an assistant's message; put the whole conversation into one column, messages")
        return read_messages({**row, "messages": [*prompt, *completion]})
    example = Passage(text_of(prompt, "prompt"), text_of(completion, "completion"))
    if not example.completion.strip():
        raise EmptyRow("completion is blank")
    return example, 0


def _plain_text(row: Mapping[str, Any]) -> tuple[Example, int]:
    text = text_of(row.get("text"), "text")
    if not text.strip():
        raise EmptyRow("text is blank")
    return Passage("", text), 0


_READERS: dict[str, Callable[[Mapping[str, Any]], tuple[Example, int]]] = {
    "alpaca": _instruction,
    "prompt-completion": _prompt_completion,
    "messages": read_messages,
    "sharegpt": read_shared,
    "text": _plain_text,
}


def _listed(columns: Iterable[str]) -> str:
    """List column names on one line, each cut short: in a table without a header they are a row of data."""
    names = [name if name.isprintable() and len(name) <= LONGEST_NAME else _cut(name) for name in sorted(columns)]
    more = len(names) - COLUMNS_NAMED
    return ", ".join(names[:COLUMNS_NAMED] + [f"and {more} more"] * (more > 0)) or "(none)"


def _cut(name: str) -> str:
    return repr(name[:LONGEST_NAME] + "..." * (len(name) > LONGEST_NAME))
