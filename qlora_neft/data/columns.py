"""Which column of a source is what: by its name, by the shape of a published data set, or as the user says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..errors import UserInputError
from ..recipe.data import COLUMNS

# Columns of each format. A source has the first format whose columns are all there.
REQUIRED_COLUMNS = {
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "text": ("text",),
}
# Columns that count beside them. Where one has another name in some data sets, that follows it.
OPTIONAL_COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    "alpaca": {"input": ("context",), "system": ("system_prompt",), "history": (), "reasoning": ()},
    "prompt-completion": {"system": ("system_prompt",), "tools": ("functions",)},
    "messages": {"system": ("system_prompt",), "tools": ("functions",)},
    "sharegpt": {"system": ("system_prompt",), "tools": ("functions",)},
    "text": {},
}


@dataclass(frozen=True)
class Shape:
    """The columns of a published data set, tried where no format's own are there.

    Attributes:
        known_from: A data set of that shape.
        columns: What each of its columns is. Names are compared without regard to capitals.
        format: The format it then has.
    """

    known_from: str
    columns: Mapping[str, str]
    format: str = "alpaca"


SHAPES = (
    Shape("databricks/databricks-dolly-15k", {"instruction": "instruction", "context": "input", "response": "output"}),
    Shape("ise-uiuc/Magicoder-Evol-Instruct-110K", {"instruction": "instruction", "response": "output"}),
    Shape("Open-Orca/OpenOrca", {"system_prompt": "system", "question": "instruction", "response": "output"}),
    Shape(
        "FreedomIntelligence/medical-o1-reasoning-SFT",
        {"question": "instruction", "complex_cot": "reasoning", "response": "output"},
    ),
    Shape("Intel/orca_dpo_pairs", {"question": "instruction", "response": "output"}),
    Shape("openai/gsm8k", {"question": "instruction", "answer": "output"}),
    Shape("meta-math/MetaMathQA", {"query": "instruction", "response": "output"}),
    Shape("AI-MO/NuminaMath-CoT", {"problem": "instruction", "solution": "output"}),
    Shape("simplescaling/s1K", {"question": "instruction", "solution": "output"}),
    Shape("pairs of prompt and response", {"prompt": "instruction", "response": "output"}),
    Shape("Muennighoff/flan", {"inputs": "instruction", "targets": "output"}),
    Shape("camel-ai/math", {"message_1": "instruction", "message_2": "output"}),
    Shape("pairs of input and output", {"input": "instruction", "output": "output"}),
    Shape("LDJnr/Capybara", {"conversation": "conversations"}, "sharegpt"),
)
# What a path's last part may be in place of a field's name: the place in a list.
NUMBER = re.compile(r"\d+")
ASKING = ("instruction", "prompt", "messages", "conversations")  # columns of ours that hold a request
COLUMNS_NAMED, LONGEST_NAME = 20, 40  # in messages


@dataclass(frozen=True)
class Columns:
    """Where a source's rows have what their format needs.

    Attributes:
        format: One of `REQUIRED_COLUMNS`.
        paths: For each of our columns, the name of theirs, then names or numbers inside it.
        shape: The published data set whose columns these are, None if they are the format's own.
        ignored: Columns that the user says are not to be read.
    """

    format: str
    paths: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shape: str | None = None
    ignored: frozenset[str] = frozenset()

    def of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row's values under our names; one that the row lacks is missing."""
        found = {ours: row[name] for ours, name in self._flat if row.get(name) is not None}
        for ours, path in self._deep:
            value = _at(row, path)
            if value is not None:
                found[ours] = value
        return found

    def not_read(self, row: Mapping[str, Any]) -> set[str]:
        """Return the names of a row's columns that are not read."""
        return set() if self._known.issuperset(row) else {str(name) for name in row.keys() - self._known}

    # Kept, as they are asked for once a row.
    @cached_property
    def _flat(self) -> list[tuple[str, str]]:
        return [(ours, path[0]) for ours, path in self.paths.items() if len(path) == 1]

    @cached_property
    def _deep(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(ours, path) for ours, path in self.paths.items() if len(path) > 1]

    @cached_property
    def _known(self) -> frozenset[str]:
        return self.ignored | {path[0] for path in self.paths.values()}


def plain_columns(format: str) -> Columns:
    """Return the columns of a format under its own names."""
    ours = (*REQUIRED_COLUMNS[format], *OPTIONAL_COLUMNS[format])
    # OpenAI's messages in ShareGPT's column, as some data sets have them.
    ours = (*ours, "conversations") if format == "messages" else ours
    return Columns(format, {name: (name,) for name in ours})


def in_our_names(row: Mapping[str, Any], stated: Mapping[str, str | None]) -> dict[str, Any]:
    """Return a row that need not have all columns, such as a request without its response, under our names.

    Args:
        row: Values by the names of columns.
        stated: ``data.columns``. Of a row without any column of ours, those of a published data set are known too.
    """
    named = {str(name).strip(): value for name, value in row.items()}
    paths = {ours: _path(theirs, list(named)) for theirs, ours in stated.items() if ours is not None}
    given = {ours: _at(named, path) for ours, path in paths.items() if path is not None}
    kept = {name: value for name, value in named.items() if stated.get(name, name) == name}
    found = {**kept, **{ours: value for ours, value in given.items() if value is not None}}
    folded = {name.casefold(): value for name, value in found.items() if value is not None}
    if found.keys().isdisjoint(ASKING):
        known = ({ours: folded[name] for name, ours in s.columns.items() if name in folded} for s in SHAPES)
        found |= next((theirs for theirs in known if not theirs.keys().isdisjoint(ASKING)), {})
    for ours, others in [pair for columns in OPTIONAL_COLUMNS.values() for pair in columns.items()]:
        values = [folded[name] for name in others if name in folded]
        found |= {ours: values[0]} if values and found.get(ours) is None else {}
    return found


def find_columns(
    rows: Sequence[Mapping[str, Any]],
    format: str = "auto",
    stated: Mapping[str, str | None] | None = None,
    key: str = "data.path",
    path: str | None = None,
) -> Columns:
    """Find out which columns of some rows are what.

    Args:
        rows: Rows of one source.
        format: The format the recipe states, or ``auto``.
        stated: Names of the user's columns (dotted inside objects) to ours, ``data.columns``; to None if not read.
        key: The name the caller wrote for the source, for messages.
        path: Where the rows are from, for messages.

    Raises:
        UserInputError: If no format fits, the stated one does not, or there is no column of a stated name.
    """
    # Of all the rows looked at: in JSON, a row may omit what another one has.
    names = list(dict.fromkeys(str(name) for row in rows for name in row))
    given = _given(rows, names, stated or {}, key, path)
    ignored = frozenset(path[0] for path in given.ignored)
    own = {name.strip(): (name,) for name in names if name.strip() in COLUMNS and name not in ignored}
    found = {**{ours: path for ours, path in own.items() if path not in given.taken}, **given.paths}
    wanted = [format] if format != "auto" else list(REQUIRED_COLUMNS)
    for name in wanted:
        if set(REQUIRED_COLUMNS[name]) <= found.keys():
            return _made(name, found, names, ignored)
    if format == "messages" and "conversations" in found:
        return _made(format, found, names, ignored)
    folded = {name.strip().casefold(): name for name in reversed(names) if name not in ignored}
    for shape in SHAPES:
        theirs = {ours: (folded[name],) for name, ours in shape.columns.items() if name in folded}
        # Columns that the user has named are what the user says, and the shape has the others.
        theirs = {ours: path for ours, path in theirs.items() if ours not in given.paths and path not in given.taken}
        if len(theirs) == len(shape.columns) and format in ("auto", shape.format):
            return _made(shape.format, {**found, **theirs}, names, ignored, shape.known_from)
    raise UserInputError(_unknown(names, format, found, key, path))


@dataclass(frozen=True)
class _Given:
    paths: dict[str, tuple[str, ...]]
    ignored: list[tuple[str, ...]]

    @property
    def taken(self) -> set[tuple[str, ...]]:
        return set(self.paths.values())


def _given(
    rows: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    stated: Mapping[str, str | None],
    key: str,
    path: str | None,
) -> _Given:
    paths, ignored = {}, []
    for theirs, ours in stated.items():
        place = _path(theirs, names)
        # A field inside an object may be missing from some rows, but not from all that were looked at.
        if place is None or all(_at(row, place) is None for row in rows):
            where = key if path is None else f"{key}: {path!r}"
            raise UserInputError(f"data.columns: {theirs!r} is no column of {where}, which has {listed(names)}.")
        if ours is None:
            ignored.append(place)
        else:
            paths[ours] = place
    return _Given(paths, ignored)


def _path(name: str, names: Sequence[str]) -> tuple[str, ...] | None:
    """Return where a name leads: a column's own name, also one with dots in it, or one with a path behind it."""
    stripped = {known.strip(): known for known in reversed(names)}
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        column = ".".join(parts[:count])
        if column in names or column.strip() in stripped:
            return (column if column in names else stripped[column.strip()], *parts[count:])
    return None


def _at(row: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = row.get(path[0])
    for part in path[1:]:
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list | tuple) and NUMBER.fullmatch(part):
            value = value[int(part)] if int(part) < len(value) else None
        else:
            return None
    return value


def _made(
    format: str,
    found: Mapping[str, tuple[str, ...]],
    names: Sequence[str],
    ignored: frozenset[str],
    shape: str | None = None,
) -> Columns:
    required = REQUIRED_COLUMNS[format]
    paths = {ours: found[ours] for ours in required if ours in found}
    if format == "messages" and "conversations" in found:
        paths["conversations"] = found["conversations"]
    folded = {name.strip().casefold(): name for name in reversed(names) if name not in ignored}
    taken = {path[0] for path in paths.values()}
    for ours, others in OPTIONAL_COLUMNS[format].items():
        other = next((folded[name] for name in others if folded.get(name) not in (None, *taken)), None)
        if ours in found and found[ours] not in paths.values():
            paths[ours] = found[ours]
        elif ours not in found and other is not None:
            paths[ours] = (other,)
    return Columns(format, paths, shape, ignored)


def _unknown(
    names: Sequence[str], format: str, found: Mapping[str, tuple[str, ...]], key: str, path: str | None
) -> str:
    where = "" if path is None else f" of {path!r}"
    # Possible whatever the source is: nobody renames the columns of a dataset on the Hub.
    wanted = REQUIRED_COLUMNS.get(format, ("instruction", "output"))
    example = ", ".join(f"YOUR_COLUMN: {ours}" for ours in wanted if ours not in found)
    advice = f"Say what they are with data.columns={{{example}}}"
    if format == "auto":
        forms = "; ".join(f"{name} needs {' and '.join(required)}" for name, required in REQUIRED_COLUMNS.items())
        return f"{key}: the columns {listed(names)}{where} fit no format: {forms}. {advice}."
    needed = " and ".join(REQUIRED_COLUMNS[format])
    return (
        f"data.format: {format} needs the columns {needed}, {key}{'' if path is None else f': {path!r}'} has "
        f"{listed(names)}. {advice}, or set data.format to what they are."
    )


def listed(columns: Iterable[str]) -> str:
    """Return names on one line, each cut short: in a table without a header they are a row of data."""
    names = [name if name.isprintable() and len(name) <= LONGEST_NAME else _cut(name) for name in sorted(columns)]
    more = len(names) - COLUMNS_NAMED
    return ", ".join(names[:COLUMNS_NAMED] + [f"and {more} more"] * (more > 0)) or "(none)"


def _cut(name: str) -> str:
    return repr(name[:LONGEST_NAME] + "..." * (len(name) > LONGEST_NAME))
