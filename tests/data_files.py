"""Small data files, and the preparation of them on the byte tokenizer."""

from __future__ import annotations

import json

from tiny import byte_tokenizer

from qlora_neft.data.prepare import prepare_data
from qlora_neft.data.sources import training_sources
from qlora_neft.recipe.schema import Data

TOKENIZER = byte_tokenizer()
ANYTHING = dict.fromkeys(("max_dropped_fraction", "max_truncated_fraction", "max_duplicate_fraction"), 1.0)


def source_of(path, *, key="data.path", **stated):
    """The source that a data section with these keys names, also one that no recipe may state."""
    [source] = training_sources(Data.model_construct(path=path, **stated), key)
    return source


def write(path, rows):
    """The source of a file of rows; a row that is text is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return source_of(str(path))


def plain(count, mark=""):
    """Rows that say different things."""
    return [{"prompt": f"{mark}{n} is", "completion": f" {n * n}."} for n in range(count)]


def talks(count):
    """Conversations of six exchanges, about 400 tokens of bytes."""
    said = (("human", "asks"), ("gpt", "answers at some length"))
    return [
        {"conversations": [{"from": who, "value": f"{n} {i} {what}"} for i in "abcdef" for who, what in said]}
        for n in range(count)
    ]


def section_of(*sources, **stated):
    """A data section of some sources and further keys; it lets anything through the gate unless a key says less."""
    first, *mixture = [{name: value for name, value in vars(source).items() if name != "key"} for source in sources]
    return Data(**{"max_length": 256, **ANYTHING, **first, "mixture": mixture, **stated})


def prepare(*sources, tokenizer=TOKENIZER, key="data.path", refuse=True, num_proc=1, progress=None, **stated):
    """Prepared data of some sources; ``stated`` are further keys of the data section."""
    section = section_of(*sources, **stated)
    return prepare_data(tokenizer, section, key=key, refuse=refuse, num_proc=num_proc, progress=progress)


def texts(dataset):
    """The text of each sequence."""
    return [TOKENIZER.decode(ids) for ids in dataset["input_ids"]]
