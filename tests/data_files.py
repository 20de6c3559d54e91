"""Small data files, and the preparation of them on the byte tokenizer."""

from __future__ import annotations

import json

from tiny import byte_tokenizer

from qlora_neft.data.gate import Limits
from qlora_neft.data.prepare import prepare_data
from qlora_neft.data.sources import Source
from qlora_neft.data.worker import Settings

SETTINGS = Settings(256)
TOKENIZER = byte_tokenizer()
ANYTHING = Limits(1.0, 1.0, 1.0)


def write(path, rows):
    """The source of a file of rows; a row that is text is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return Source(str(path))


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


def prepare(*sources, tokenizer=TOKENIZER, settings=SETTINGS, **options):
    """Prepared data, whatever is wrong with it unless limits are given."""
    options = {"limits": ANYTHING, "num_proc": 1, **options}
    return prepare_data(tokenizer, sources=sources, settings=settings, **options)


def texts(dataset):
    """The text of each sequence."""
    return [TOKENIZER.decode(ids) for ids in dataset["input_ids"]]
