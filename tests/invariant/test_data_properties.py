"""What holds for any conversation and any instruction: which tokens are trained, what is cut, what is split."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from data_cases import (
    ANSWERED,
    ASKED,
    BYTE_LEVEL,
    HOSTILE,
    LONG,
    TOKENIZERS,
    TRAINED,
    WAYS,
    cases,
    examples,
    outcome_of,
    section,
    spelled,
    stretches,
    texts,
    tokenizer_of,
    worker_of,
)
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_trainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qlora_neft.data.encode import Encoder
from qlora_neft.data.examples import Dialogue, Piece
from qlora_neft.data.sources import Row
from qlora_neft.data.templates import alpaca_prompt, make_template
from qlora_neft.data.turns import split_dialogue
from qlora_neft.data.worker import NO_ROOM
from qlora_neft.steps import IGNORE_INDEX
from qlora_neft.steps.batch import StepCollator

# ---- What is trained ----


def says_more_than_an_end(case):
    """A row whose responses spell the end token alone is left out."""
    return any(text.replace("</s>", "").replace("<|im_end|>", "").strip() for text in case.responses)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_is_trained_is_each_response_with_its_end_and_nothing_else(kind):
    @examples(75)
    @given(cases(ASKED, ANSWERED))
    def check(case):
        [sequence] = outcome_of(case, kind).sequences
        found = [spelled(ids, kind, case.template) for ids in stretches(sequence)]
        assert found == [TRAINED[case.template](response) for response in case.responses]
        assert not set(spelled(sequence.ids[~sequence.trained], kind, case.template)) & set(ANSWERED)
        assert not set("".join(found)) & set(ASKED)

    check()


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_texts_that_spell_the_template_change_nothing(kind):
    @examples(75)
    @given(cases(HOSTILE, HOSTILE).filter(says_more_than_an_end))
    def check(case):
        [sequence] = outcome_of(case, kind).sequences
        found = [spelled(ids, kind, case.template) for ids in stretches(sequence)]
        assert found == [TRAINED[case.template](response) for response in case.responses]

    check()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_generation_begins_with_the_tokens_that_training_saw(kind):
    @examples(100)
    @given(
        cases(HOSTILE, HOSTILE).filter(says_more_than_an_end)
        | cases(ASKED, ANSWERED)
        | cases(ASKED, ANSWERED, [("prompt-completion", "none")])
    )
    def check(case):
        worker = worker_of(kind, case.format, case.template, section(LONG))
        [sequence] = outcome_of(case, kind).sequences
        prompt = worker.template.prompt(case.messages()[: 1 + (case.system is not None)])
        if case.template == "alpaca":  # the one template that knows what an input is
            prompt = alpaca_prompt(case.row["instruction"], case.row["input"])
        first = int(np.flatnonzero(sequence.trained)[0])
        assert sequence.ids[:first].tolist() == worker.encoder.prompt_ids([Piece(prompt, False)])

    check()


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("on_prompt", [False, True])
def test_labels_are_the_inputs_where_trained(kind, on_prompt):
    @examples(60)
    @given(cases(HOSTILE, HOSTILE).filter(says_more_than_an_end))
    def check(case):
        [sequence] = outcome_of(case, kind, section(LONG, train_on_prompt=on_prompt)).sequences
        [plain] = outcome_of(case, kind).sequences
        assert sequence.ids.tolist() == plain.ids.tolist()
        expected = np.ones_like(plain.trained) if on_prompt else plain.trained
        assert sequence.labels().tolist() == np.where(expected, sequence.ids, IGNORE_INDEX).tolist()
        assert sequence.num_trained() == int((sequence.labels()[1:] != IGNORE_INDEX).sum())

    check()


# ---- Cutting ----


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("keep_end_token", [True, False])
def test_a_cut_sequence_is_the_beginning_of_the_whole_but_for_its_end_token(kind, keep_end_token):
    @examples(50)
    @given(cases(HOSTILE, HOSTILE), st.integers(0, 15), st.integers(-2, 4))
    def check(case, edge, beyond):
        [whole] = outcome_of(case, kind).sequences
        edges = np.flatnonzero(np.diff(whole.trained, append=False)) + 1  # where responses begin and end
        max_length = int(edges[edge % len(edges)]) + beyond
        chosen = section(max_length, keep_end_token=keep_end_token, split_conversations=False)
        outcome = outcome_of(case, kind, chosen)
        end_ids = worker_of(kind, case.format, case.template, chosen).end_ids
        lost = whole.trained[max_length:].any()
        if not outcome.sequences:  # left out: nothing of a response fits, or its end alone
            assert outcome.problem == NO_ROOM
            assert whole.trained[1:max_length].sum() <= keep_end_token
            return
        [cut] = outcome.sequences
        assert outcome.num_truncated == lost
        count = len(cut.ids)
        kept = count - 1 if lost and keep_end_token else count
        assert count <= max_length
        assert cut.ids[:kept].tolist() == whole.ids[:kept].tolist()
        assert cut.trained.tolist() == whole.trained[:count].tolist()
        if not lost:
            assert count == min(len(whole.ids), max_length)
        elif keep_end_token:  # cut or not, a sequence ends with its end token
            assert cut.ids[-1] in end_ids and cut.trained[-1]
            assert outcome.num_ended == 1
            assert cut.trained[-2]  # and never with that alone of a response
        # Nothing that fits is lost: at most the last place goes to the end token, and only where a response is cut.
        assert whole.trained[:max_length].sum() - cut.trained.sum() <= (lost and keep_end_token)

    check()


# ---- Splitting ----

SPOKEN = st.sampled_from(["user", "assistant", "assistant", "tool"])


@st.composite
def dialogues(draw):
    """Messages of ChatML in any order of roles, the last one the assistant's."""
    roles = draw(st.lists(SPOKEN, max_size=8))
    head = [{"role": draw(st.sampled_from(["system", "developer"])), "content": draw(texts(ASKED))}]
    body = [{"role": role, "content": draw(texts(HOSTILE, blank=role != "assistant"))} for role in roles]
    last = {"role": "assistant", "content": draw(texts(HOSTILE, blank=False))}
    return Dialogue((*(head if draw(st.booleans()) else []), *body, last))


def exchanges_in(messages):
    """How often a response is followed by the next request."""
    roles = [message["role"] for message in messages]
    return 1 + sum(one == "assistant" and other == "user" for one, other in pairwise(roles))


@pytest.mark.parametrize("kind", ["bytes", "bpe-across"])
def test_splitting_loses_and_repeats_no_turn(kind):
    @examples(75)
    @given(dialogues(), st.integers(20, 300))
    def check(dialogue, max_length):
        tokenizer = tokenizer_of(kind, "chatml")
        template, encoder = make_template("chat", "messages", tokenizer), Encoder(tokenizer, adds_special_tokens=False)

        def measure(some):
            return encoder.lengths([template.render(some)])[0]

        pieces = [list(piece.messages) for piece in split_dialogue(dialogue, max_length, measure)]
        head = [m for m in dialogue.messages[:1] if m["role"] in ("system", "developer")]
        assert all(piece[: len(head)] == head for piece in pieces)
        bodies = [piece[len(head) :] for piece in pieces]
        assert head + [message for body in bodies for message in body] == list(dialogue.messages)
        assert all(body[-1]["role"] == "assistant" for body in bodies)
        assert all(exchanges_in(body) == 1 or measure(Dialogue((*head, *body))) <= max_length for body in bodies)
        for body, following in pairwise(bodies):  # as many in each as fit
            start = next((i for i in range(1, len(following)) if exchanges_in(following[: i + 1]) > 1), len(following))
            assert measure(Dialogue((*head, *body, *following[:start]))) > max_length

    check()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_pieces_of_a_conversation_train_each_response_once(kind):
    ways = [(format, template) for format, template in WAYS if format in ("sharegpt", "messages")]

    @examples(50)
    @given(cases(ASKED, ANSWERED, ways, max_exchanges=6), st.integers(100, 900))
    def check(case, max_length):
        outcome = outcome_of(case, kind, section(max_length))
        assert all(len(sequence.ids) <= max_length for sequence in outcome.sequences)
        assert outcome.num_ended == len(outcome.sequences)
        if outcome.sequences and not outcome.num_truncated:
            found = [spelled(ids, kind, case.template) for sequence in outcome.sequences for ids in stretches(sequence)]
            assert found == [TRAINED[case.template](response) for response in case.responses]

    check()


# ---- What the trainer collates ----


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("kind", ["bpe", "bpe-trimmed", "sentencepiece"])
def test_where_pad_is_the_end_token_every_row_still_learns_its_end(kind, padding_free):
    tokenizer = tokenizer_of(kind, None)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    ways = [way for way in WAYS if way[1] in ("none", "alpaca", "vicuna", "llama2")]

    @examples(60)
    @given(st.lists(cases(HOSTILE, HOSTILE, ways), min_size=1, max_size=6), st.integers(1, 4))
    def check(some, max_rows):
        sequences = [sequence for case in some for sequence in outcome_of(case, kind).sequences]
        rows = [{"input_ids": s.ids.tolist(), "labels": s.labels().tolist()} for s in sequences]
        collator = DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=padding_free)
        step = StepCollator(collator, max_rows, 2000, padding_free)(rows)
        assert step.num_trained_tokens() == sum(sequence.num_trained() for sequence in sequences)
        ends = 0
        for micro in step:
            labels, ids = micro.inputs["labels"], micro.inputs["input_ids"]
            assert bool((labels.eq(ids) | labels.eq(IGNORE_INDEX)).all())
            for row in labels.tolist():
                trained = [label for label in row if label != IGNORE_INDEX]
                assert trained[-1] == tokenizer.eos_token_id
                ends += trained.count(tokenizer.eos_token_id)
        assert ends >= sum(len(case.responses) for case in some)

    check()


def test_the_trainer_collates_so(llama, tmp_path):
    tokenizer = tokenizer_of("bpe", None)
    rows = [{"instruction": f"Say {n}", "output": "a" * n} for n in range(1, 9)]
    outcomes = worker_of("bpe", "alpaca", "alpaca", section(LONG))([Row(n, "", row) for n, row in enumerate(rows)])
    sequences = [sequence for outcome in outcomes for sequence in outcome.sequences]
    data = Dataset.from_list([{"input_ids": s.ids.tolist(), "labels": s.labels().tolist()} for s in sequences])
    trainer = tiny_trainer(llama, tmp_path, data, processing_class=tokenizer)
    rows = [row for step in trainer.get_train_dataloader() for m in step for row in m.inputs["labels"].tolist()]
    assert len(rows) == len(data)
    assert all([label for label in row if label >= 0][-1] == tokenizer.eos_token_id for row in rows)
