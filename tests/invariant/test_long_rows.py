"""Rows far longer than a sequence: what is kept of them is what would have been kept of the whole, in little memory."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import pytest
from data_cases import TOKENIZERS, examples, section, tokenizer_of
from hypothesis import given
from hypothesis import strategies as st

from qlora_neft.data import shorten
from qlora_neft.data.parallel import CHUNK, CHUNK_SIZE, map_rows
from qlora_neft.data.sources import Row, row_size
from qlora_neft.data.worker import RowWorker

WORDS = (
    "hen",
    "egg ",
    "un",
    "der\n",
    " ",
    "  ",
    "b",
    "ab" * 9,
    "Я",
    "中文",
    "🙂",
    "e" * 70,
    " " * 90,
    "</s>",
    ":=",
    "7",
)


@st.composite
def long_texts(draw):
    """A text of some hundreds of characters to some thousands; also one word without a space."""
    words = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12))
    return "".join(words) * draw(st.sampled_from([1, 20, 150, 400]))


@st.composite
def rows(draw):
    first, second, third = draw(long_texts()), draw(long_texts()), draw(long_texts())
    if draw(st.booleans()):
        return "prompt-completion", {"prompt": first, "completion": second + "."}
    talk = [("human", first), ("gpt", second + "."), ("human", "And?"), ("gpt", third + ".")]
    return "sharegpt", {"conversations": [{"from": who, "value": text} for who, text in talk]}


LIMITS = [
    {"max_length": 24},
    {"max_length": 40, "keep_end_token": False},
    {"max_length": 40, "split_conversations": False},
    {"max_length": 64, "max_prompt_length": 9, "max_response_length": 20},
    {"max_length": 30, "prompt_loss_weight": 0.5},
    {"max_length": 30, "train_on": "last-response"},
]


@given(rows(), st.sampled_from(LIMITS), st.sampled_from(TOKENIZERS))
@examples(120)
def test_what_is_kept_of_a_long_row_is_what_would_have_been_kept(row, limits, kind):
    format, values = row
    chosen = section(**limits)
    worker = RowWorker(tokenizer_of(kind, "none"), format, "auto", chosen)
    [found] = worker([Row(1, "line 1", values)])
    worker.encoder.most = None
    [whole] = worker([Row(1, "line 1", values)])
    assert [s.ids.tolist() for s in found.sequences] == [s.ids.tolist() for s in whole.sequences]
    assert [s.trained.tolist() for s in found.sequences] == [s.trained.tolist() for s in whole.sequences]
    assert [s.loss_weights().tolist() for s in found.sequences] == [s.loss_weights().tolist() for s in whole.sequences]
    assert replace(found, sequences=(), reason="") == replace(whole, sequences=(), reason="")


def test_text_whose_tokens_depend_on_what_follows_is_left_whole():
    piece = shorten.Piece("a" * 100_000, True)
    # Ids that count from the end of the text, as a tokenizer may merge a run of letters from either end.
    assert shorten.shortened([piece], 20, lambda text: list(range(len(text), 0, -1))) == [piece]
    [cut] = shorten.shortened([piece], 20, lambda text: [0] * len(text))
    assert len(cut.text) < 10_000 and cut.trained


@pytest.mark.parametrize("count", [1, 40])
def test_memory_follows_what_is_kept(count):
    text = "a hen counts its eggs " * (4_000_000 // 22 // count)
    worker = RowWorker(tokenizer_of("bytes", "none"), "prompt-completion", "auto", section(max_length=64))
    given_rows = [Row(n, f"line {n}", {"prompt": "Go", "completion": f"{n} {text}"}) for n in range(count)]
    tracemalloc.start()
    outcomes = worker(given_rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(len(outcome.sequences[0].ids) == 64 for outcome in outcomes)
    assert peak < 6 * 4_000_000  # a few copies of the text; tokens and their places would take 200 bytes a character


def test_chunks_are_bounded_by_text_as_well_as_by_rows():
    sizes = [10] * (CHUNK + 1) + [CHUNK_SIZE * 2] + [CHUNK_SIZE // 3] * 4
    chunks = list(map_rows(list, sizes, 1, lambda size: size))
    assert [len(chunk) for chunk in chunks] == [CHUNK, 1, 1, 3, 1]
    assert [size for chunk in chunks for size in chunk] == sizes
    assert row_size(Row(1, "line 1", {"a": "xyz", "b": [{"c": "de", "d": 7}], "e": None})) == 5
