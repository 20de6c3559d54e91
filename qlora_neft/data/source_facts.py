"""A source as it is read: which format its first rows show, which template they get, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING

from ..errors import UserInputError
from ..paths import shown_path
from ..recipe.schema import Data
from .chat_template import ChatTemplate
from .columns import plain_columns
from .formats import RowReader, row_reader
from .reading import read_rows
from .sources import Row, Source
from .store import SourceFacts
from .templates import Template, resolve_template
from .worker import Outcome

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEAD = 1000  # rows by which a format is recognized


def with_reader(source: Source, *, streaming: bool) -> tuple[RowReader, Iterator[Row]]:
    """Return how a source's rows are read, as the recipe says or as the first of them show, and all rows."""
    rows = read_rows(source, streaming=streaming)
    head = list(islice(rows, HEAD))
    readable = [row.values for row in head if row.values is not None]
    if readable:
        said = (source.format, source.columns, source.roles, source.system_prompt)
        return row_reader(readable, *said, source.key, source.path), chain(head, rows)
    # If no row can be read, any format will do: each row reports what is wrong with it.
    return RowReader(plain_columns("text" if source.format == "auto" else source.format)), chain(head, rows)


def chosen_template(name: str, reader: RowReader, tokenizer: PreTrainedTokenizerBase, section: Data) -> str:
    """Return the template for the rows of a source: the stated one, or of ``auto`` one that has a place for them.

    Rows with tools, calls or thoughts, which neither Alpaca's nor Vicuna's prompt can express, get the tokenizer's
    chat template if that can.
    """
    if name != "auto" or not reader.beyond or not tokenizer.chat_template:
        return reader.template(name)
    try:
        chat = ChatTemplate(tokenizer, kwargs=section.chat_template_kwargs)
    except UserInputError:  # a template that cannot be used is refused where it is asked for
        return reader.template(name)
    can = chat.wording.takes_thoughts if reader.beyond == "thoughts" else chat.calls is not None
    return "chat" if can else reader.template(name)


@dataclass
class NotUsed:
    """Columns of a source, and keys of its messages, that nothing is read from."""

    columns: set[str] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Add those of some rows."""
        for outcome in outcomes:
            self.columns |= outcome.columns_not_used
            self.keys |= outcome.keys_not_used


def facts_of(
    source: Source, reader: RowReader, name: str, rows: int, template: Template, unused: NotUsed
) -> SourceFacts:
    """Return what is recorded of a source: ``name`` is its template's, ``rows`` how many were read."""
    return {
        "path": shown_path(source.path),
        "rows": rows,
        "format": reader.format,
        "prompt_template": resolve_template(name, reader.format),
        "weight": source.weight,
        "end": template.end,
        "end_of_call": template.end_of_call,
        "lacks_begin": template.lacks_begin,
        "shape": reader.columns.shape,
        "columns_not_used": sorted(unused.columns),
        "keys_not_used": sorted(unused.keys),
    }
