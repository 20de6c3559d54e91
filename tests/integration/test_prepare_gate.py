"""What the gate says about data: each problem and warning with its numbers, and that its remedies are remedies."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from data_cases import CHATML, tokenizer_of
from data_files import ANYTHING, TOKENIZER, plain, prepare, write
from tiny import byte_tokenizer

from qlora_neft.data.gate import DataRefused
from qlora_neft.recipe.schema import Data

LIMITS = {name: Data.model_fields[name].default for name in ANYTHING}
EMPTY = {"prompt": "p", "completion": " "}
NO_END = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def said(rows, tmp_path, **options):
    """Problems and warnings of rows, with the path left out of them."""
    options = {"max_length": 60, **LIMITS, **options}
    source = rows if hasattr(rows, "path") else write(tmp_path / "a.jsonl", rows)
    data = prepare(source, refuse=False, **options)
    lines = [
        [line.replace(repr(source.path), "PATH") for line in data.report[kind]] for kind in ("problems", "warnings")
    ]
    if data.report["problems"]:
        with pytest.raises(DataRefused) as caught:
            prepare(source, **options)
        assert caught.value.problems == data.report["problems"] and caught.value.report == data.report
    return lines


def long_row(n=0, response=80):
    return {"prompt": f"p{n}", "completion": "r" * response}


def roomless(n=0):
    return {"prompt": f"{n}" * 80, "completion": "r"}


# ---- Problems ----


def test_rows_that_cannot_be_read_are_named_whatever_is_allowed(tmp_path):
    rows = ["{", *plain(3), {"prompt": "p", "completion": 7}, "[1]"]
    problems, warnings = said(rows, tmp_path, **ANYTHING)
    assert problems == [
        "data.path: PATH: 3 of 6 rows cannot be read: line 1 is not JSON (Expecting property name enclosed in double "
        "quotes); line 5: completion is int '7'; line 6 is list '[1]'. Every example must be a JSON object with named "
        "fields. Fix or remove them."
    ]
    assert warnings == []


def test_only_the_first_rows_of_a_kind_are_named(tmp_path):
    [problem], _ = said([*plain(2), *["{"] * 9], tmp_path)
    assert problem.count("is not JSON") == 5 and "; and 4 more. Fix" in problem


def test_a_length_without_room_for_any_response(tmp_path):
    problems, _ = said([roomless(n) for n in range(3)], tmp_path)
    assert problems == [
        "data.max_length: 60 tokens leave no room for a response in any row of data.path: PATH. Raise it."
    ]
    # As for the rows that can be read.
    problems, _ = said([roomless(), "{"], tmp_path)
    assert [problem.split(":")[0] for problem in problems] == ["data.path", "data.max_length"]


def test_empty_rows_and_rows_without_room_or_place(tmp_path):
    rows = [*plain(6), EMPTY, roomless()]
    problems, _ = said(rows, tmp_path)
    assert problems == [
        "data.path: PATH: 1 of 8 rows empty, without text or response: line 7: completion is blank. 1 of 8 rows "
        "without a trained token: line 8: 82 tokens, none of the response within 60; more than "
        "data.max_dropped_fraction=0.01 of all. Raise data.max_length, or remove them, or leave out so many with "
        "data.max_dropped_fraction=0.25."
    ]
    conversation = {"messages": [{"role": role, "content": "a"} for role in ("user", "assistant") * 2]}
    exchange = {"messages": conversation["messages"][:2]}
    source = replace(write(tmp_path / "m.jsonl", [conversation, exchange]), prompt_template="alpaca")
    [problem], _ = said(source, tmp_path, max_length=300)
    assert (
        "1 of 2 rows without a place in the prompt template: line 1 is a conversation (user, assistant, user,"
        in problem
    )
    assert problem.endswith(
        "Choose another data.prompt_template, or remove them, or leave out so many with data.max_dropped_fraction=0.5."
    )


def test_nothing_is_said_to_be_left_out_of_nothing(tmp_path):
    [problem], _ = said([EMPTY] * 2, tmp_path)
    assert problem.endswith("of all. Remove them.")
    assert said([EMPTY] * 2, tmp_path, **ANYTHING)[0] == [
        "data.path: PATH: no row is left to train on. Give other data."
    ]
    source = replace(write(tmp_path / "w.jsonl", plain(1)), weight=1e-9)
    assert said(source, tmp_path)[0] == ["data.path: PATH: no row is left to train on. Give other data."]


FRACTIONS = [(1, 2), (1, 3), (2, 3), (3, 7), (1, 16), (11, 90), (2, 101), (101, 102)]


@pytest.mark.parametrize(("bad", "count"), FRACTIONS)
@pytest.mark.parametrize("name", ["max_dropped_fraction", "max_truncated_fraction"])
def test_the_fraction_that_is_named_is_enough_and_not_much_more(tmp_path, name, bad, count):
    made = roomless if name == "max_dropped_fraction" else long_row
    source = write(tmp_path / "a.jsonl", [made(n) for n in range(bad)] + plain(count - bad))
    limits = ANYTHING | {name: 0.01}
    [problem], _ = said(source, tmp_path, **limits)
    assert f"{bad} of {count} rows" in problem
    [value] = re.findall(rf"with data\.{name}=(\S+)\.$", problem)
    assert bad / count <= float(value) <= min(1, 1.1 * bad / count)
    assert said(source, tmp_path, **limits | {name: float(value)})[0] == []


def test_cut_responses(tmp_path):
    rows = [long_row(0), long_row(1), long_row(2), *plain(1)]
    problems, _ = said(rows, tmp_path)
    assert problems == [
        "data.max_length: 3 of 4 rows (75.0%) of data.path: PATH cut inside a response at 60 tokens, more than "
        "data.max_truncated_fraction=0.5: line 1; line 2; line 3. Raise data.max_length, or allow it with "
        "data.max_truncated_fraction=0.75."
    ]
    assert said(rows, tmp_path, max_length=100)[0] == []


def test_repeated_rows(tmp_path):
    problems, _ = said([*plain(1)] * 4, tmp_path)
    assert problems == [
        "data.path: PATH: 3 of 4 rows (75.0%) repeated, more than data.max_duplicate_fraction=0.5: line 2 repeats row "
        "1; line 3 repeats row 1; line 4 repeats row 1. Remove them, or raise it; to use data several times on purpose "
        "there are train.num_train_epochs and data.weight."
    ]
    assert said([*plain(1)] * 4, tmp_path, max_duplicate_fraction=0.75)[0] == []
    assert said(replace(write(tmp_path / "w.jsonl", plain(1)), weight=4), tmp_path) == [[], []]


def test_responses_that_are_all_cut_without_their_end(tmp_path):
    rows = [long_row(n) for n in range(3)]
    whole = {"max_truncated_fraction": 1.0}
    problems, _ = said(rows, tmp_path, keep_end_token=False, **whole)
    assert problems == [
        "data.keep_end_token: every response of data.path: PATH is cut, so the model would never learn to stop. Set it "
        "to true, or raise data.max_length."
    ]
    assert said(rows, tmp_path, **whole)[0] == []
    assert said(rows, tmp_path, max_length=100, keep_end_token=False, **whole)[0] == []


def test_pieces_without_room_do_not_hide_that_all_the_others_are_cut(tmp_path):
    turns = [("human", "q" * 400), ("gpt", "r"), ("human", "q"), ("gpt", "r" * 200)]
    row = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    [problem], _ = said([row], tmp_path, max_length=250, keep_end_token=False, max_truncated_fraction=1.0)
    assert problem.startswith("data.keep_end_token: every response of")


def test_a_template_that_ends_no_response(tmp_path):
    (tmp_path / "own.jinja").write_text(NO_END)
    rows = [
        {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "a"}]} for n in range(3)
    ]
    source = replace(write(tmp_path / "a.jsonl", rows), prompt_template=str(tmp_path / "own.jinja"))
    assert said(source, tmp_path)[0] == [
        "data.prompt_template: no response of data.path: PATH ends with a trained end token, so the model would never "
        "learn to stop. Let the template write the tokenizer's end token behind each response."
    ]
    (tmp_path / "own.jinja").write_text(NO_END.replace("+ '\\n'", "+ eos_token"))
    assert said(source, tmp_path)[0] == []


def test_a_fraction_that_leaves_one_side_without_rows(tmp_path):
    problems, _ = said(plain(2), tmp_path, eval_fraction=1e-6)
    assert problems == [
        "data.eval_fraction: 1e-06 of 2 rows leaves no rows on one side. Give more rows or another fraction."
    ]
    assert len(said(plain(2), tmp_path, eval_fraction=1 - 1e-6)[0]) == 1
    assert said(plain(200), tmp_path, eval_fraction=0.5)[0] == []


def test_all_problems_come_at_once_those_of_held_out_rows_too(tmp_path):
    rows = ["{", EMPTY, *[long_row()] * 8]
    eval_source = write(tmp_path / "e.jsonl", [*plain(1), roomless()])
    source = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataRefused) as caught:
        prepare(source, eval_path=eval_source.path, max_length=60, keep_end_token=False, **LIMITS)
    starts = [
        f"data.path: {source.path!r}: 1 of 10 rows cannot be read",
        f"data.path: {source.path!r}: 1 of 10 rows empty",
        "data.keep_end_token: every response",
        f"data.path: {source.path!r}: 7 of 10 rows (70.0%) repeated",
        "data.max_length: 8 of 10 rows (80.0%)",
        f"data.eval_path: {eval_source.path!r}: 1 of 2 rows without a trained token",
    ]
    problems = caught.value.problems
    assert [problem[: len(start)] for problem, start in zip(problems, starts, strict=True)] == starts
    assert str(caught.value) == "the data has 6 problems:\n  " + "\n  ".join(problems)
    one = DataRefused(problems[:1], {})
    assert str(one) == problems[0]


def test_several_sources_are_named_by_their_files(tmp_path):
    one, other = write(tmp_path / "a.jsonl", [*plain(3), EMPTY]), write(tmp_path / "b.jsonl", [*plain(1), EMPTY])
    with pytest.raises(DataRefused) as caught:
        prepare(one, other, **LIMITS)
    [problem] = caught.value.problems
    assert problem.startswith(
        "data.path: 2 of 6 rows empty, without text or response: a.jsonl, line 4: completion is blank"
    )
    assert "; b.jsonl, line 2: completion is blank;" in problem
    data = prepare(one, other)
    assert "data.path: 1 row repeated: b.jsonl, line 1 repeats row 1 of source 1." in data.report["warnings"]


# ---- Warnings ----


def test_good_data_is_passed_in_silence(tmp_path):
    assert said(plain(9), tmp_path) == [[], []]


@pytest.mark.parametrize(
    ("rows", "warning"),
    [
        (
            [{"prompt": "a</s>b", "completion": "c"}],
            "1 row with the spelling of a special token, read as that token: line 1.",
        ),
        (
            [{"prompt": "a", "completion": "c\ufffd"}, *plain(1)],
            "1 row with U+FFFD, the mark of text that was decoded wrongly: line 1.",
        ),
        ([*plain(3), *plain(2)], "2 rows repeated: line 4 repeats row 1; line 5 repeats row 2."),
    ],
)
def test_suspicious_rows_are_named(tmp_path, rows, warning):
    assert said(rows, tmp_path) == [[], [f"data.path: PATH: {warning}"]]


def test_a_file_name_may_hold_braces(tmp_path):
    source = write(tmp_path / "{n} {of} {0}.jsonl", [*plain(3), *plain(1)])
    assert said(source, tmp_path) == [[], ["data.path: PATH: 1 row repeated: line 4 repeats row 1."]]


def test_a_token_across_the_beginning_of_a_response_is_told(tmp_path):
    rows = [{"prompt": "a:", "completion": "=b"}, {"prompt": "a:", "completion": "c"}]
    warning = (
        "data.path: PATH: in 1 row a token would reach from prompt into response; the two are tokenized apart: line 1."
    )
    assert said(rows, tmp_path, tokenizer=tokenizer_of("bpe", None)) == [[], [warning]]
    assert said(rows, tmp_path, tokenizer=TOKENIZER) == [[], []]
    rows = [{"prompt": "x ", "completion": "a"}]
    warning = "data.path: PATH: in 1 row the space that ends the prompt is trained as the response's first: line 1."
    assert said(rows, tmp_path, tokenizer=tokenizer_of("sentencepiece", None)) == [[], [warning]]


def test_what_is_left_out_as_allowed_is_told(tmp_path):
    _, warnings = said([*plain(6), EMPTY, roomless()], tmp_path, max_dropped_fraction=0.25)
    assert warnings == [
        "data.path: PATH: 2 of 8 rows left out, as data.max_dropped_fraction allows: line 7: completion is blank; line "
        "8: 82 tokens, none of the response within 60."
    ]


def test_turns_that_are_left_out_are_counted(tmp_path):
    turns = [("gpt", "hi"), ("human", "a"), ("gpt", "b"), ("human", "bye")]
    rows = [{"conversations": [{"from": who, "value": f"{n} {text}"} for who, text in turns]} for n in range(3)]
    assert said(rows, tmp_path, max_length=300) == [
        [],
        ["data.path: PATH: 6 turns left out (before the first request, or after the last trained response)."],
    ]


def test_cut_responses_are_told_from_one_in_a_hundred(tmp_path):
    warning = "data.max_length: 1 of 100 rows (1.0%) cut inside a response."
    assert said([long_row(), *plain(99)], tmp_path) == [[], [warning]]
    assert said([long_row(), *plain(100)], tmp_path) == [[], []]


def test_few_trained_tokens_are_told(tmp_path):
    rows = [{"prompt": "p" * 149, "completion": "r"}]
    warning = "data.path: PATH: 1.3% of the tokens are trained; the rest is prompt."
    assert said(rows, tmp_path, max_length=300) == [[], [warning]]
    fewer = [{"prompt": "p" * 239, "completion": "r"}]
    [[], [line]] = said(fewer, tmp_path, max_length=300)
    assert line.startswith(
        "data.path: PATH: 0.8% of the tokens are trained; the rest is prompt. So few are mostly a mistake"
    )
    assert said(rows, tmp_path, max_length=300, train_on_prompt=True) == [[], []]


def test_an_end_that_is_not_the_tokenizers_is_told(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    assert said(rows, tmp_path, tokenizer=tokenizer) == [
        [],
        [
            "data.prompt_template: responses end with <|im_end|>, and the tokenizer's end token is </s>: a program "
            "that stops at the latter alone will let the model run on."
        ],
    ]
    tokenizer.eos_token = "<|im_end|>"
    assert said(rows, tmp_path, tokenizer=tokenizer) == [[], []]
