"""Splitting one optimizer step into micro-batches, and numbering its sequences."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qlora_neft.steps.batch import StepBatch, StepCollator, split_rows

RANDOM = random.Random(0)
STEPS = [[RANDOM.randint(1, 60) for _ in range(RANDOM.randint(1, 24))] for _ in range(60)]
LIMITS = [(1, None), (4, None), (64, 100), (3, 80), (64, 20)]


def collator(**kwargs):
    return DataCollatorForLanguageModeling(pad_token_id=0, **kwargs)


def features_of(lengths):
    """Rows whose tokens are all the number of the row, from 1."""
    return [{"input_ids": [n] * length, "labels": [n] * length} for n, length in enumerate(lengths, 1)]


def size(part, lengths, padded):
    return len(part) * max(lengths[i] for i in part) if padded else sum(lengths[i] for i in part)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(("max_rows", "max_tokens"), LIMITS)
def test_every_row_once_and_limits_kept_but_for_one_long_row_alone(max_rows, max_tokens, padded):
    for lengths in STEPS:
        parts = split_rows(lengths, max_rows, max_tokens, padded=padded)
        assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
        for part in parts:
            assert 1 <= len(part) <= max_rows
            assert max_tokens is None or len(part) == 1 or size(part, lengths, padded) <= max_tokens


@pytest.mark.parametrize(("max_rows", "max_tokens"), LIMITS)
def test_longest_rows_come_first_and_like_goes_with_like(max_rows, max_tokens):
    for lengths in STEPS:
        order = [lengths[i] for part in split_rows(lengths, max_rows, max_tokens) for i in part]
        assert order == sorted(lengths, reverse=True)


def test_rows_of_one_length_keep_their_order():
    assert split_rows([7] * 5, max_rows=2) == [[0, 1], [2, 3], [4]]


def test_a_row_over_the_limit_gets_a_micro_batch_of_its_own():
    assert split_rows([500, 3, 4], max_rows=8, max_tokens=10) == [[0], [2, 1]]


def test_padding_counts_where_there_is_padding():
    lengths = [10, 2, 2]  # padded to three tens, or fourteen in a row
    assert split_rows(lengths, 8, 14, padded=True) == [[0], [1, 2]]
    assert split_rows(lengths, 8, 14, padded=False) == [[0, 1, 2]]


def test_no_micro_batch_is_left_for_the_next_without_need():
    for lengths in STEPS:
        parts = split_rows(lengths, 4, 100)
        for part, following in pairwise(parts):
            assert len(part) == 4 or size([*part, following[0]], lengths, True) > 100


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("limits", LIMITS)
def test_ordinals_survive_the_sort(limits, padding_free):
    for lengths in STEPS[:20]:
        step = StepCollator(collator(padding_free=padding_free), *limits, padding_free)(features_of(lengths))
        seen = {}
        for micro in step:
            for span in micro.spans:
                tokens = micro.inputs["input_ids"][span.row, span.tokens]
                assert tokens.unique().numel() == 1
                seen[span.ordinal] = (int(tokens[0]), span.length)
        assert seen == {n - 1: (n, length) for n, length in enumerate(lengths, 1)}


@pytest.mark.parametrize("padding_free", [False, True])
def test_packed_documents_are_numbered_through_their_rows(padding_free):
    collate = collator(padding_free=padding_free, return_position_ids=not padding_free)
    packed = [
        {"input_ids": [1, 1], "seq_lengths": [2]},
        {"input_ids": [2, 2, 2, 3, 4, 4], "seq_lengths": [3, 1, 2]},
        {"input_ids": [5, 6, 6, 6], "seq_lengths": [1, 3]},
    ]
    for max_rows in (1, 2, 3):
        step = StepCollator(collate, max_rows, padding_free=padding_free)(packed)
        first = {span.ordinal: int(m.inputs["input_ids"][span.row, span.tokens][0]) for m in step for span in m.spans}
        assert first == {ordinal: ordinal + 1 for ordinal in range(6)}
        assert (step.num_sequences(), step.num_tokens()) == (6, 12)


def test_pads_at_the_end_of_a_flattened_batch_are_no_sequences():
    collate = collator(padding_free=True, pad_to_multiple_of=32)
    step = StepCollator(collate, 4, padding_free=True)(features_of([5, 9, 3]))
    assert step.micro_batches[0].inputs["input_ids"].shape == (1, 32)
    assert [span.length for span in step.micro_batches[0].spans] == [9, 5, 3]
    assert step.num_tokens() == 17


@pytest.mark.parametrize("limits", LIMITS)
def test_counts_do_not_depend_on_the_split(limits):
    lengths = [4, 30, 11, 11, 2, 25]
    features = features_of(lengths)
    for row in features:
        row["labels"] = [-100] * (len(row["labels"]) // 2) + row["labels"][len(row["labels"]) // 2 :]
    step = StepCollator(collator(), *limits)(features)
    assert step.num_sequences() == len(lengths)
    assert step.num_tokens() == sum(lengths)
    # Half of a row is prompt; the first token of a row has nothing to predict it.
    assert step.num_trained_tokens() == sum(length - max(1, length // 2) for length in lengths)


def test_each_micro_batch_is_padded_to_its_own_longest_row():
    step = StepCollator(collator(), max_rows=2)(features_of([3, 50, 4, 48]))
    assert [micro.inputs["input_ids"].shape for micro in step] == [(2, 50), (2, 4)]


def test_a_step_stays_on_the_cpu_until_its_turn():
    step = StepCollator(collator(), max_rows=2)(features_of([3, 5, 4]))
    assert step.to(torch.device("meta")) is step
    assert step.micro_batches[0].inputs["input_ids"].device.type == "cpu"


def test_a_ready_made_batch_is_a_step_of_one():
    step = StepBatch.of(collator()(features_of([3, 5])))
    assert (len(step), step.num_sequences(), step.num_tokens(), step.num_trained_tokens()) == (1, 2, 8, 6)


def test_a_batch_without_boundaries_is_a_step_without_spans():
    inputs = {"input_ids": torch.zeros(1, 4), "labels": torch.zeros(1, 4)}
    step = StepBatch.of(inputs)
    assert step.micro_batches[0].spans is None
    assert (step.num_sequences(), step.num_tokens(), step.num_trained_tokens()) == (0, 0, 3)


def test_a_collator_that_pops_keys_does_not_disturb_the_numbering():
    def popping(features):
        rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in features]
        for row in features:
            row.pop("input_ids")
        return collator()(rows)

    step = StepCollator(popping, max_rows=1)(features_of([2, 6, 4]))
    assert [micro.spans[0].ordinal for micro in step] == [1, 2, 0]
