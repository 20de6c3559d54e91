"""Which tokens of a row are trained and with what weight: turns, prompts, lengths, chunks."""

from __future__ import annotations

import json
from itertools import chain

import numpy as np
import pytest
from data_cases import section
from tiny import byte_tokenizer

from qlora_neft.data.cut import cut_parts, cut_to_length, split_into_chunks
from qlora_neft.data.encode import Encoded, Encoder
from qlora_neft.data.examples import Dialogue, EmptyRow, Piece
from qlora_neft.data.prepare import prepare_data
from qlora_neft.data.sources import Row
from qlora_neft.data.turns import last_exchanges, narrowed
from qlora_neft.data.worker import RowWorker
from qlora_neft.recipe.schema import Data
from qlora_neft.steps import LOSS_WEIGHTS

TOKENIZER = byte_tokenizer()
DIALOGUE = [
    ("user", "U1"),
    ("assistant", "A1"),
    ("user", "U2"),
    ("assistant", "A2"),
    ("user", "U3"),
    ("assistant", "A3"),
]


def messages(*without, **others):
    """A conversation in which some responses have weight 0."""
    turns = [{"role": role, "content": text} for role, text in DIALOGUE]
    return {"messages": [turn | ({"weight": 0} if turn["content"] in without else {}) for turn in turns], **others}


def outcome(row, format="messages", template="vicuna", tokenizer=TOKENIZER, **stated):
    worker = RowWorker(tokenizer, format, template, section(stated.pop("max_length", 1000), **stated))
    [found] = worker([Row(1, "line 1", row)])
    return found


def trained_texts(found, tokenizer=TOKENIZER):
    """The trained stretches of each sequence."""
    texts = []
    for sequence in found.sequences:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], sequence.trained, [0]])))
        texts.append([tokenizer.decode(sequence.ids[a:b]).strip() for a, b in edges.reshape(-1, 2)])
    return texts


# ---- Turns ----

RESPONSES = ["A1</s>", "A2</s>", "A3</s>"]


@pytest.mark.parametrize(
    ("without", "train_on", "expected"),
    [
        ((), "responses", RESPONSES),
        ((), "last-response", RESPONSES[2:]),
        (("A1",), "responses", RESPONSES[1:]),
        (("A1", "A2"), "responses", RESPONSES[2:]),
        (("A3",), "responses", RESPONSES[:2]),
        (("A1",), "last-response", RESPONSES[2:]),
    ],
)
def test_a_row_and_the_recipe_say_which_responses_are_trained(without, train_on, expected):
    found = outcome(messages(*without), train_on=train_on)
    assert trained_texts(found) == [expected]
    # What comes after the last trained response would train nothing.
    assert found.turns_left_out == (2 if without == ("A3",) else 0)


@pytest.mark.parametrize("format", ["messages", "sharegpt"])
@pytest.mark.parametrize("key", [{"weight": 0}, {"train": False}, {"loss_mask": 0}])
def test_every_spelling_of_a_turns_weight_counts(key, format):
    row = messages()
    if format == "sharegpt":
        names = {"user": "human", "assistant": "gpt"}
        row = {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in row["messages"]]}
    row[next(iter(row))][1] |= key
    assert trained_texts(outcome(row, format)) == [RESPONSES[1:]]


def test_a_row_without_a_trained_response_is_named():
    assert outcome(messages("A1", "A2", "A3")).problem == "empty"
    found = outcome(messages("A3"), train_on="last-response")
    assert (found.problem, found.reason) == ("empty", "has no response that is trained")


@pytest.mark.parametrize("stated", [{"train_on": "all"}, {"prompt_loss_weight": 1.0}, {"train_on_prompt": True}])
def test_a_response_with_weight_0_is_trained_by_nothing(stated):
    [sequence] = outcome(messages("A1"), **stated).sequences
    assert TOKENIZER.decode(sequence.ids[~sequence.trained]) == " A1</s>"
    assert sequence.weights is None


def test_prompts_count_as_much_as_the_recipe_says():
    [sequence] = outcome(messages("A1"), prompt_loss_weight=0.25).sequences
    by_weight = {w: TOKENIZER.decode(sequence.ids[sequence.weights == w]) for w in (0, 0.25, 1)}
    assert by_weight[0] == " A1</s>" and by_weight[1] == " A2</s> A3</s>"
    assert by_weight[0.25].endswith("USER: U1 ASSISTANT:USER: U2 ASSISTANT:USER: U3 ASSISTANT:")
    assert (sequence.trained == (sequence.weights > 0)).all()


def test_earlier_responses_of_a_prompt_are_prompt():
    turns = messages()["messages"]
    row = {"prompt": turns[:3], "completion": turns[3:4]}
    assert trained_texts(outcome(row, "prompt-completion")) == [["A2</s>"]]
    [sequence] = outcome(row, "prompt-completion", prompt_loss_weight=0.5).sequences
    assert TOKENIZER.decode(sequence.ids[sequence.weights == 1]) == " A2</s>"
    assert sequence.trained.all()
    assert outcome(row, "prompt-completion", train_on="all").sequences[0].trained.all()


def test_without_flags_nothing_is_narrowed():
    dialogue = Dialogue(tuple(messages()["messages"]))
    assert narrowed(dialogue, "responses", trains_prompts=False) == (dialogue, 0)
    with pytest.raises(EmptyRow, match="no response that is trained"):
        narrowed(Dialogue(dialogue.messages, None, (True, False) * 3), "responses", trains_prompts=False)


def test_a_last_response_keeps_as_much_before_it_as_fits():
    dialogue = Dialogue(tuple(messages()["messages"]))
    for room, count in ((6, 6), (5, 4), (3, 2), (1, 2)):
        assert len(last_exchanges(dialogue, room, lambda d: len(d.messages)).messages) == count
    whole = outcome(messages(), train_on="last-response")
    length = len(whole.sequences[0].ids)
    found = outcome(messages(), train_on="last-response", max_length=length - 1)
    assert trained_texts(found) == [["A3</s>"]]
    assert "U2" in TOKENIZER.decode(found.sequences[0].ids) and "U1" not in TOKENIZER.decode(found.sequences[0].ids)


def test_a_piece_without_a_trained_turn_is_left_out():
    length = len(outcome({"messages": messages()["messages"][:2]}).sequences[0].ids)
    assert trained_texts(outcome(messages("A2"), max_length=length)) == [["A1</s>"], ["A3</s>"]]


# ---- Lengths ----


def qlora_row(source, target, source_max_len, target_max_len):
    """``DataCollatorForCausalLM`` of ``qlora.py`` (github.com/artidoro/qlora), for one row and without padding."""
    source = TOKENIZER(TOKENIZER.bos_token + source, add_special_tokens=False)["input_ids"][:source_max_len]
    target = TOKENIZER(target + TOKENIZER.eos_token, add_special_tokens=False)["input_ids"][:target_max_len]
    return source + target, [-100] * len(source) + target


@pytest.mark.parametrize(("source", "target"), [(50, 20), (10, 50), (50, 50), (3, 3), (20, 9), (19, 10)])
def test_two_lengths_are_those_of_qloras_collator(source, target):
    row = {"prompt": "p" * source, "completion": "r" * target}
    begins = tokenizer_that_begins()
    lengths = {"max_prompt_length": 20, "max_response_length": 10, "max_length": 30}
    [sequence] = outcome(row, "prompt-completion", "auto", begins, keep_end_token=False, **lengths).sequences
    ids, labels = qlora_row(row["prompt"], row["completion"], 20, 10)
    assert (sequence.ids.tolist(), sequence.labels().tolist()) == (ids, labels)
    found = outcome(row, "prompt-completion", "auto", begins, **lengths)
    [kept] = found.sequences
    assert kept.ids.tolist() == (ids if ids[-1] == TOKENIZER.eos_token_id else [*ids[:-1], TOKENIZER.eos_token_id])
    assert (found.num_truncated, "prompt cut" in found.marks) == (target + 1 > 10, source + 1 > 20)


def tokenizer_that_begins():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    special = [(tokenizer.bos_token, tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=special
    )
    return tokenizer


def test_each_response_has_a_length_of_its_own():
    #          0  1  2  3  4  5  6  7  8  9
    trained = [0, 0, 0, 1, 1, 1, 1, 0, 1, 1]
    excluded = np.array([0, 1, 1, 0, 0, 0, 0, 0, 0, 0], dtype=bool)
    given = Encoded(np.arange(10, dtype=np.int32), np.array(trained, dtype=bool))
    cut = cut_parts(given, 2, 2, keep_end_token=True)
    assert (cut.sequence.ids.tolist(), cut.prompt_cut, cut.response_cut) == ([0, 1, 3, 6, 7, 8, 9], True, True)
    cut = cut_parts(Encoded(given.ids, given.trained, None, excluded), 2, 3, keep_end_token=False)
    assert (cut.sequence.ids.tolist(), cut.prompt_cut, cut.response_cut) == ([0, 1, 2, 3, 7, 8, 9], False, True)
    assert cut_parts(given, 3, 4, keep_end_token=True).sequence is given


@pytest.mark.parametrize(("room", "ends"), [(6, False), (10, False), (11, True), (14, True)])
@pytest.mark.parametrize("key", ["max_length", "max_response_length"])
def test_what_is_cut_inside_a_thought_gets_no_end(room, ends, key):
    pieces = [Piece("ab", False), Piece("<t>c</t>defghijkl</s>", True, whole_from=len("<t>c</t>"))]
    [encoded] = Encoder(TOKENIZER, adds_special_tokens=False).encode([pieces])
    if key == "max_length":
        cut, _ = cut_to_length(encoded, room, keep_end_token=True)
    else:
        cut = cut_parts(encoded, None, room - 2, keep_end_token=True).sequence
    assert len(cut.ids) == room and cut.trained[2:].all()
    assert (cut.ids[-1] == TOKENIZER.eos_token_id) == ends


# ---- Long texts ----


@pytest.mark.parametrize("begins", [False, True], ids=["no begin token", "begin token"])
@pytest.mark.parametrize("length", [15, 16, 29, 30, 31, 46, 47, 61])
def test_long_text_becomes_chunks_that_hold_each_token_once(length, begins):
    tokenizer = tokenizer_that_begins() if begins else TOKENIZER
    text = "".join(chr(97 + i % 26) for i in range(length))
    found = outcome({"text": text}, "text", "auto", tokenizer, max_length=16, split_text=True)
    head = [tokenizer.bos_token_id] * begins
    ids = [sequence.ids.tolist() for sequence in found.sequences]
    assert all(chunk[: len(head)] == head and len(chunk) <= 16 for chunk in ids)
    assert [*chain(*(chunk[len(head) :] for chunk in ids))] == tokenizer(text + "</s>", add_special_tokens=False)[
        "input_ids"
    ]
    assert all(len(chunk) - len(head) > 1 for chunk in ids)  # more than an end token
    assert all(sequence.trained[len(head) :].all() for sequence in found.sequences)
    assert found.num_ended == 1 and found.num_truncated == 0
    assert found.num_chunks == (len(ids) if len(ids) > 1 else 0)


def test_text_that_fits_is_left_whole_and_other_rows_are_not_split():
    given = Encoded(np.arange(8, dtype=np.int32), np.ones(8, dtype=bool))
    assert split_into_chunks(given, 8) == [given]
    row = {"prompt": "p", "completion": "r" * 40}
    assert len(outcome(row, "prompt-completion", "auto", max_length=16, split_text=True).sequences) == 1
    assert len(outcome({"text": "r" * 40}, "text", "auto", max_length=16).sequences) == 1


# ---- In the report, on disk and in the gate ----


def test_chunks_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "r" * n}) + "\n" for n in (5, 40, 70)))
    part = prepare_data(TOKENIZER, Data(path=str(tmp_path / "a.jsonl"), max_length=16, split_text=True)).report["train"]
    assert (part["source_rows"], part["texts_split"], part["chunks"], part["truncated"]) == (3, 2, 8, 0)


def test_weights_are_stored_where_there_are_any(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "ab", "completion": "c"}) + "\n")
    stated = Data(path=str(tmp_path / "a.jsonl"), max_length=16)
    for weight, expected in ((0.0, None), (1.0, None), (0.5, [0.5, 0.5, 1.0, 1.0])):
        data = prepare_data(TOKENIZER, stated.model_copy(update={"prompt_loss_weight": weight}))
        assert data.train[0].get(LOSS_WEIGHTS) == expected
        assert data.report["settings"]["prompt_loss_weight"] == weight


def test_a_row_that_would_train_its_end_alone_is_refused(tmp_path):
    rows = [{"prompt": f"{n}", "completion": "c"} for n in range(3)] + [{"prompt": "x", "completion": "</s>"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stated = Data(path=str(tmp_path / "a.jsonl"), max_length=16)
    refused = prepare_data(TOKENIZER, stated, refuse=False).report
    [problem] = refused["problems"]
    assert (
        "in 1 of 4 rows no token of the response is trained but the one that ends it: line 4: only the end token of "
        "the response would be trained. Let no token hold" in problem
    )
    allowed = prepare_data(TOKENIZER, stated.model_copy(update={"max_dropped_fraction": 0.25})).report
    assert "1 of 4 rows left out, as data.max_dropped_fraction allows: line 4: only the end" in allowed["warnings"][0]
    assert (allowed["train"]["only_end"], allowed["train"]["dropped"], allowed["rows"]) == (1, 1, 3)
