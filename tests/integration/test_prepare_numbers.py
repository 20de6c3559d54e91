"""What is held out, how sources are mixed, and whether the report's numbers are those of the sequences."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from data_cases import CHATML, LLAMA2
from data_files import TOKENIZER, plain, prepare, talks, texts, write
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny import byte_tokenizer

from qlora_neft.data.gate import PLACES_NAMED
from qlora_neft.data.report import MAX_BINS, histogram, padding_waste, percentiles, sequence_lengths


def shuffled(rows):
    return random.Random(1).sample(rows, len(rows))


# ---- Held out ----


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_about_the_fraction_is_held_out_and_the_same_rows_in_any_order(tmp_path, fraction):
    rows = plain(2000)
    data = prepare(write(tmp_path / "a.jsonl", rows), eval_fraction=fraction)
    assert abs(len(data.eval) - 2000 * fraction) < 3 * (2000 * fraction * (1 - fraction)) ** 0.5
    assert len(data.train) + len(data.eval) == 2000
    other = prepare(write(tmp_path / "b.jsonl", shuffled(rows)), eval_fraction=fraction)
    assert sorted(texts(other.eval)) == sorted(texts(data.eval))
    assert sorted(texts(other.train)) == sorted(texts(data.train))
    # Nor does it matter which rows are beside them.
    part = prepare(write(tmp_path / "c.jsonl", rows[:100]), eval_fraction=fraction)
    assert set(texts(part.eval)) == set(texts(data.eval)) & {
        row["prompt"] + row["completion"] + "</s>" for row in rows[:100]
    }


def test_a_larger_fraction_holds_out_the_same_and_more(tmp_path):
    source = write(tmp_path / "a.jsonl", plain(500))
    few, more = (set(texts(prepare(source, eval_fraction=fraction).eval)) for fraction in (0.1, 0.3))
    assert few < more


def test_repeated_rows_are_all_on_one_side_of_any_source(tmp_path):
    rows = plain(300)
    sources = write(tmp_path / "a.jsonl", shuffled(rows * 3)), write(tmp_path / "b.jsonl", rows)
    data = prepare(*sources, eval_fraction=0.3)
    sides = Counter(texts(data.train)), Counter(texts(data.eval))
    assert not sides[0].keys() & sides[1].keys()
    assert set(sides[0].values()) == set(sides[1].values()) == {4}
    assert not [line for line in data.report["warnings"] if "held-out" in line]


def test_the_pieces_of_a_conversation_are_on_one_side(tmp_path):
    data = prepare(write(tmp_path / "a.jsonl", talks(200)), eval_fraction=0.3, max_length=300)
    train, held_out = Counter(data.train["row"]), Counter(data.eval["row"])
    assert not train.keys() & held_out.keys()
    assert sorted(train.keys() | held_out.keys()) == list(range(1, 201))
    assert min([*train.values(), *held_out.values()]) >= 2


def test_rows_that_are_held_out_elsewhere_and_trained_on_are_told(tmp_path):
    rows = plain(40)
    train = write(tmp_path / "a.jsonl", rows)
    eval_source = replace(write(tmp_path / "e.jsonl", [*rows[5:12], *plain(9, "other ")]), key="data.eval_path")
    data = prepare(train, eval_path=eval_source.path)
    assert (len(data.train), len(data.eval)) == (40, 16)
    assert data.report["warnings"] == [
        "data.eval_path: 7 held-out rows are training rows as well; the held-out loss is too good by them."
    ]
    assert prepare(train, eval_path=write(tmp_path / "n.jsonl", plain(9, "new ")).path).report["warnings"] == []


def test_overlap_is_counted_in_held_out_rows_and_with_what_is_trained_on(tmp_path):
    train = replace(write(tmp_path / "a.jsonl", plain(50)), weight=0.2)
    data = prepare(train, eval_path=write(tmp_path / "e.jsonl", plain(50) * 2).path)
    both = 2 * len(data.train)
    assert 0 < both < 50
    assert [line for line in data.report["warnings"] if line.startswith(f"data.eval_path: {both} held-out rows are")]


# ---- Mixture ----


def counts_by_row(data):
    return Counter(zip(data.train["source"], data.train["row"], strict=True))


def test_a_weight_of_two_uses_every_row_twice(tmp_path):
    data = prepare(
        write(tmp_path / "a.jsonl", plain(30)), replace(write(tmp_path / "b.jsonl", plain(20, "b")), weight=2)
    )
    assert counts_by_row(data) == {**{(0, n): 1 for n in range(1, 31)}, **{(1, n): 2 for n in range(1, 21)}}
    assert data.report["train"]["source_rows"] == 50 and data.report["rows"] == 70
    assert data.report["train"]["duplicates"] == 0  # meant so


def test_half_a_weight_takes_about_half_the_same_in_any_order_and_in_wholes_and_halves(tmp_path):
    rows = plain(1000)

    def taken(name, some, weight):
        return Counter(texts(prepare(replace(write(tmp_path / name, some), weight=weight)).train))

    half = taken("a.jsonl", rows, 0.5)
    assert abs(len(half) - 500) < 48 and set(half.values()) == {1}
    assert taken("b.jsonl", shuffled(rows), 0.5) == half
    more = taken("a.jsonl", rows, 2.5)
    assert len(more) == 1000
    assert {text for text, count in more.items() if count == 3} == half.keys()
    assert set(more.values()) == {2, 3}


def test_half_a_weight_and_holding_out_choose_apart(tmp_path):
    source = replace(write(tmp_path / "a.jsonl", plain(1000)), weight=0.5)
    data = prepare(source, eval_fraction=0.4)
    assert abs(len(data.eval) - 400) < 47  # held-out rows are not thinned out
    assert abs(len(data.train) - 300) < 44


def test_every_source_has_its_own_format_and_template_and_its_rows_are_found_in_it(tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text(LLAMA2)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    files = {
        "alpaca": [{"instruction": f"alpaca {n}", "output": "x"} for n in range(3)],
        "vicuna": [{"instruction": f"vicuna {n}", "output": "x"} for n in range(3)],
        "chat": [{"messages": m} for m in messages("chat", 4)],
        str(own): [{"conversations": m} for m in messages("own", 2)],
        "auto": plain(5, "ready "),
    }
    sources = [
        replace(write(tmp_path / f"{i}.jsonl", rows), prompt_template=name)
        for i, (name, rows) in enumerate(files.items())
    ]
    data = prepare(*sources, tokenizer=tokenizer)
    found = [(d["format"], d["prompt_template"], d["rows"], d["end"]) for d in data.report["sources"]]
    assert found == [
        ("alpaca", "alpaca", 3, "</s>"),
        ("alpaca", "vicuna", 3, "</s>"),
        ("messages", "chat", 4, "<|im_end|>"),
        ("messages", str(own), 2, "</s>"),
        ("prompt-completion", "none", 5, "</s>"),
    ]
    marks = (
        "### Instruction:\nalpaca {}\n",
        "USER: vicuna {} ",
        "<|im_start|>user\nchat {}<|im_end|>",
        "[INST] own {} ",
        "ready {} is",
    )
    assert sum(d["rows"] for d in data.report["sources"]) == len(data.train)
    for ids, source, row in zip(data.train["input_ids"], data.train["source"], data.train["row"], strict=True):
        assert marks[source].format(row - 1) in tokenizer.decode(ids)
    assert data.stop_token_ids == (258, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert data.largest_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert data.chat_template == LLAMA2
    assert len([line for line in data.report["warnings"] if "responses end with <|im_end|>" in line]) == 1


def messages(mark, count):
    return [[{"role": "user", "content": f"{mark} {n}"}, {"role": "assistant", "content": "x"}] for n in range(count)]


# ---- The report ----


@pytest.fixture(scope="module")
def varied(tmp_path_factory):
    """Long-tailed data with every kind of row, weighted, and what was prepared of it."""
    folder = tmp_path_factory.mktemp("varied")
    draw = random.Random(0)
    rows = plain(300) + [
        {"prompt": "q" * draw.randint(1, 90), "completion": "r" * int(draw.paretovariate(0.7))} for _ in range(200)
    ]
    rows += [
        *rows[:11],
        *({"prompt": "p", "completion": " "} for _ in range(3)),
        {"prompt": "p" * 400, "completion": "r"},
    ]
    sources = replace(write(folder / "a.jsonl", rows), weight=1.5), write(folder / "b.jsonl", talks(40))
    return prepare(*sources, eval_fraction=0.25, max_length=300)


@pytest.mark.parametrize("part", ["train", "eval"])
def test_the_reports_numbers_are_those_of_the_sequences(varied, part):
    dataset, report = getattr(varied, part), varied.report[part]
    lengths = [len(ids) for ids in dataset["input_ids"]]
    assert sequence_lengths(dataset).tolist() == lengths
    assert report["rows"] == len(dataset) == sum(report["histogram"]["counts"])
    assert report["tokens"] == sum(lengths)
    assert report["trained_tokens"] == sum(label != -100 for labels in dataset["labels"] for label in labels[1:])
    assert report["share_trained"] == report["trained_tokens"] / report["tokens"]
    assert report["ended"] == sum(labels[-1] == 258 for labels in dataset["labels"])
    assert report["dropped"] == report["empty"] + report["without_room"] + report["unfit"]
    assert report["truncated_fraction"] == report["truncated"] / report["source_rows"]
    assert max(lengths) <= 300 and report["lengths"]["max"] == max(lengths)


def test_every_row_is_counted_on_one_side_and_by_what_became_of_it(varied):
    report = varied.report
    train, held_out = report["train"], report["eval"]
    assert train["source_rows"] + held_out["source_rows"] == sum(d["rows"] for d in report["sources"]) == 555
    assert train["empty"] + held_out["empty"] == 3
    assert train["without_room"] + held_out["without_room"] == 1
    assert train["duplicates"] + held_out["duplicates"] >= 11
    for part, dataset in ((train, varied.train), (held_out, varied.eval)):
        used = len(set(zip(dataset["source"], dataset["row"], strict=True)))
        assert used == part["source_rows"] - part["dropped"]  # with 1.5 as weight, each at least once
    assert train["sha256"] != held_out["sha256"]
    assert {name: train[name] for name in ("rows", "tokens", "trained_tokens", "truncated")}.items() <= report.items()
    [line] = [line for line in report["warnings"] if "repeated" in line]
    assert line.count("repeats row") == PLACES_NAMED


LENGTHS = st.lists(st.integers(1, 5000), min_size=1, max_size=200).map(np.array)
ANY = hypothesis_settings(derandomize=True, deadline=None, max_examples=100, database=None)


@ANY
@given(LENGTHS)
def test_percentiles_are_lengths_in_order_and_bins_hold_every_length(lengths):
    found = percentiles(lengths)
    values = [found[name] for name in ("min", "p5", "p25", "p50", "p75", "p95", "p99", "max")]
    assert values == sorted(values) and set(values) <= set(lengths.tolist())
    assert values[0] == lengths.min() and values[-1] == lengths.max()
    assert (lengths <= found["p50"]).mean() >= 0.5 and (lengths <= found["p95"]).mean() >= 0.95
    assert found["mean"] == pytest.approx(lengths.mean(), abs=0.051)
    bins = histogram(lengths)
    edges, counts = bins["edges"], bins["counts"]
    assert len(edges) == len(counts) + 1 <= MAX_BINS + 1
    expected = [int(((lengths >= low) & (lengths < high)).sum()) for low, high in pairwise(edges)]
    assert counts == expected and sum(counts) == len(lengths)


@ANY
@given(LENGTHS, st.integers(1, 32), st.integers(1, 16), st.sampled_from([None, 64, 4096]))
def test_padding_waste_is_a_share_and_splitting_by_length_never_adds_to_it(lengths, batch_size, max_rows, max_tokens):
    waste = padding_waste(lengths, batch_size, max_rows, max_tokens, padding_free=False)
    assert 0 <= waste["as_run"] <= waste["random_batches"] < 1
    assert padding_waste(lengths, batch_size, max_rows, max_tokens, padding_free=True)["as_run"] == 0


def test_on_long_tailed_data_most_padding_is_saved(varied):
    lengths = sequence_lengths(varied.train)
    waste = padding_waste(lengths, 16, 8, 600, padding_free=False)
    assert waste["random_batches"] > 0.5 and waste["as_run"] < waste["random_batches"] / 2
    # Counted by hand, over the same steps.
    order = np.random.default_rng(0).permutation(len(lengths))
    steps = [lengths[order[start : start + 16]] for start in range(0, len(order), 16)]
    padded = sum(len(step) * step.max() for step in steps)
    assert waste["random_batches"] == pytest.approx(1 - lengths.sum() / padded, abs=1e-4)


def test_a_report_of_one_row_and_of_text_alone(tmp_path):
    data = prepare(write(tmp_path / "a.jsonl", [{"text": "abc"}]))
    assert texts(data.train) == ["abc</s>"]
    assert data.train["labels"] == [TOKENIZER("abc</s>")["input_ids"]]
    assert (data.report["tokens"], data.report["trained_tokens"]) == (4, 3)
