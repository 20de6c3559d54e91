"""Requests to a model: prompts from the command line, from standard input or from a file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapter.prompts import SYSTEM_ROLES
from ..data.columns import in_our_names, plain_columns
from ..data.conversations import turns_of
from ..data.examples import BadRow, Dialogue, Example, Instruction, Message, as_dialogue
from ..data.formats import RowReader
from ..data.messages import CALL, LOSS_KEYS, SPEAKERS
from ..data.read_local import file_rows
from ..errors import UserInputError
from ..paths import TABLE_KINDS, TEXT_KINDS, data_kind

STDIN = "-"
MAX_PROBLEMS = 10  # named per file
NO_ROLES: Mapping[str, str] = {}
PLACEHOLDER = "?"  # stands in for the response, which a prompt lacks and a row of data must have


@dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
        example: The prompt as a row of data; a response in it is ignored.
        place: Where it comes from, for messages: ``PROMPT 2``, ``line 7``.
    """

    example: Example
    place: str

    def with_system(self, system: str) -> Request:
        """Return the request with a system message, unless it has its own."""
        messages = self.messages
        if messages[0]["role"] in SYSTEM_ROLES:
            return self
        tools = self.example.tools if isinstance(self.example, Dialogue) else None
        return Request(Dialogue(({"role": "system", "content": system}, *messages), tools), self.place)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The request as a conversation that ends with it."""
        if isinstance(self.example, Dialogue):
            return self.example.messages
        return as_dialogue(self.example).messages[:1]

    def to_dict(self) -> dict[str, Any]:
        """Return ``prompt``, and ``input`` or ``messages`` if it has them, for JSON."""
        if isinstance(self.example, Dialogue):
            return {"prompt": self.messages[-1]["content"], "messages": [dict(m) for m in self.messages]}
        if isinstance(self.example, Instruction):
            given = {"input": self.example.input} if self.example.input else {}
            return {"prompt": self.example.instruction, **given}
        return {"prompt": self.example.prompt}


def requests_of_texts(texts: Iterable[str]) -> list[Request]:
    """Turn texts into requests.

    Raises:
        UserInputError: If one is blank.
    """
    return _all_good([_request({"prompt": text}, f"PROMPT {number}") for number, text in enumerate(texts, 1)])


def requests_of_stdin() -> list[Request]:
    """Read all of standard input as one request.

    Raises:
        UserInputError: If it is blank.
    """
    return _all_good([_request({"prompt": _text_of(STDIN).removesuffix("\n")}, "PROMPT (standard input)")])


@dataclass(frozen=True)
class Names:
    """What the user's names mean in rows: the ``data`` section of the run that is asked.

    Attributes:
        columns: Names of columns, to ours.
        roles: Names of speakers, to ours.
    """

    columns: Mapping[str, str | None] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)


def requests_of_file(name: str, names: Names = Names()) -> list[Request]:
    """Read the requests in a file.

    Args:
        name: A ``.txt`` file or ``-`` (standard input) with one prompt per line; or ``.jsonl``, ``.json``, ``.csv`` or
            ``.parquet`` rows with ``prompt``, or ``instruction`` (and ``input``), or ``messages``. A row that has a
            response is a request for it.
        names: What columns and speakers mean that have other names.

    Raises:
        UserInputError: If there is no such file, or it holds anything but prompts; the message names the lines.
    """
    is_data = data_kind(name) is not None
    if name != STDIN and not is_data and Path(name).suffix.lower() != ".txt":
        kinds = ", ".join((*TEXT_KINDS, *TABLE_KINDS))
        raise UserInputError(f"--file: must be a .txt, {kinds} file or -, got {name!r}.")
    if name != STDIN and not Path(name).expanduser().is_file():
        raise UserInputError(f"--file: no file at {name!r}. Paths are relative to the current directory.")
    # Problems are collected, not raised, so that one message names all bad lines.
    found = _of_rows(name, names) if is_data else _of_lines(name)
    return _all_good(list(found), f"--file: {name!r}, ")


def _of_rows(name: str, names: Names) -> Iterator[Request | str]:
    for row in file_rows(Path(name).expanduser(), "--file"):
        if row.values is None:
            yield f"{row.place} {row.problem}"
        else:
            yield _request(in_our_names(row.values, names.columns), row.place, names.roles)


def _of_lines(name: str) -> Iterator[Request | str]:
    lines = [(number, line) for number, line in enumerate(_text_of(name).splitlines(), 1) if line.strip()]
    if not lines:
        raise UserInputError(f"--file: {name!r} is empty. It needs one prompt a line.")
    for number, line in lines:
        yield _request({"prompt": line}, f"line {number}")


def _text_of(name: str) -> str:
    try:
        # utf-8-sig: editors on Windows put a byte-order mark first.
        return sys.stdin.read() if name == STDIN else Path(name).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        what = "standard input" if name == STDIN else f"--file: {name!r}"
        raise UserInputError(f"{what} cannot be read as UTF-8 text ({error}). Save it as UTF-8.") from error


def _request(row: Mapping[str, Any], place: str, roles: Mapping[str, str] = NO_ROLES) -> Request | str:
    """Return a row's request, or a line on what is wrong with it."""
    try:
        example = _example(row, roles)
        if not as_dialogue(example).messages[0]["content"].strip():
            return f"{place} is blank"
    except BadRow as error:
        return f"{place}: {error}"
    return Request(example, place)


def _example(row: Mapping[str, Any], roles: Mapping[str, str]) -> Example:
    """Return a row as an example; one that has no response gets a placeholder.

    Raises:
        BadRow: If it is not a prompt.
    """
    # TRL's conversational rows have a list of messages as prompt.
    if isinstance(row.get("prompt"), list):
        row = {"messages": row["prompt"], "tools": row.get("tools")}
    for column, format in (("messages", "messages"), ("conversations", "sharegpt")):
        if row.get(column) is not None:
            return _conversation(row, column, format, roles)
    if row.get("prompt") is not None:
        kept = {name: row[name] for name in ("prompt", "system") if row.get(name) is not None}
        return _without_placeholder(_read({**kept, "completion": PLACEHOLDER}, "prompt-completion"))
    if row.get("instruction") is not None:
        return _without_placeholder(_read({**row, "output": PLACEHOLDER}, "alpaca"))
    names = ", ".join(sorted(map(str, row)))[:200] or "none"
    raise BadRow(f"needs prompt, or instruction, or messages; its fields are {names}")


def _without_placeholder(example: Example) -> Example:
    """Return the request alone of a row that is a conversation, with a system message or earlier exchanges."""
    return Dialogue(example.messages[:-1], example.tools) if isinstance(example, Dialogue) else example


def _read(row: Mapping[str, Any], format: str, roles: Mapping[str, str] = NO_ROLES) -> Example:
    return RowReader(plain_columns(format), roles).read(row).example


def _conversation(row: Mapping[str, Any], column: str, format: str, roles: Mapping[str, str]) -> Dialogue:
    """Return a conversation without its last response, or all of it if it ends with a request."""
    # What training makes of single turns is of no matter here.
    turns = [{key: turn[key] for key in turn if key not in LOSS_KEYS} for turn in turns_of(row[column], column)]
    # Some data sets keep role and content under the name `conversations`.
    if format == "sharegpt" and "from" not in turns[-1]:
        format = "messages"
    role, text = ("from", "value") if format == "sharegpt" else ("role", "content")
    # The formats of training data demand a response; a placeholder lets their checks run on the rest.
    last = str(turns[-1].get(role))
    if (roles.get(last) or SPEAKERS.get(last.lower())) not in ("assistant", CALL):
        turns.append({role: "assistant", text: PLACEHOLDER})
    example = _read({**row, column: turns}, format, roles)
    assert isinstance(example, Dialogue)  # as both formats give
    asked = example.messages[:-1]
    # The result of a tool is answered as a request is.
    if not asked or asked[-1]["role"] not in ("user", "tool"):
        raise BadRow(f"{column} hold no request before the last response")
    return Dialogue(asked, example.tools)


def _all_good(found: Sequence[Request | str], where: str = "") -> list[Request]:
    problems = [problem for problem in found if isinstance(problem, str)]
    if problems:
        more = [f"and {len(problems) - MAX_PROBLEMS} more"] * (len(problems) > MAX_PROBLEMS)
        raise UserInputError(where + "\n  ".join([*problems[:MAX_PROBLEMS], *more]))
    return [request for request in found if isinstance(request, Request)]
