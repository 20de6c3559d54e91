"""Finding each sequence of a batch, whatever collator made it."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorWithFlattening
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qlora_neft.steps.sequences import UnknownSequenceBoundaries, count_tokens, find_sequences

LENGTHS = [5, 9, 1, 7]


def rows(lengths=LENGTHS):
    """Every token id occurs once, so that a span can be told by what it covers."""
    ids = iter(range(1, 1 + sum(lengths)))
    made = [[next(ids) for _ in range(length)] for length in lengths]
    return [{"input_ids": row, "labels": list(row)} for row in made]


def covered(batch, **kwargs):
    """Token ids under each span, ordinals checked on the way."""
    spans = find_sequences(batch, **kwargs)
    assert [span.ordinal for span in spans] == list(range(len(spans)))
    found = [batch["input_ids"][span.row, span.tokens].tolist() for span in spans]
    assert [span.length for span in spans] == [len(ids) for ids in found]
    return found


def ids_of(features):
    return [row["input_ids"] for row in features]


def batch_of(mask, positions=None):
    mask = torch.tensor(mask)
    batch = {"input_ids": torch.arange(mask.numel()).reshape(mask.shape), "attention_mask": mask}
    return batch if positions is None else {**batch, "position_ids": torch.tensor(positions)}


@pytest.mark.parametrize("multiple", [None, 8, 64])
def test_rows_padded_right(multiple):
    collate = DataCollatorForLanguageModeling(pad_token_id=0, pad_to_multiple_of=multiple)
    assert covered(collate(rows())) == ids_of(rows())


def test_rows_padded_left():
    assert covered(batch_of([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]])) == [[2, 3], [4, 5, 6, 7], [11]]


def test_a_padded_row_is_a_slice_so_that_noise_is_added_without_indexing():
    spans = find_sequences(batch_of([[0, 1, 1, 0]]))
    assert spans[0].tokens == slice(1, 3)


def test_holes_in_a_mask_are_no_tokens():
    assert covered(batch_of([[1, 1, 0, 0, 1, 0], [1, 1, 1, 1, 1, 1]]))[0] == [0, 1, 4]
    assert count_tokens(find_sequences(batch_of([[1, 1, 0, 0, 1, 0]]))) == 3


def test_a_row_of_padding_only_is_no_sequence():
    assert covered(batch_of([[1, 1], [0, 0], [1, 0]])) == [[0, 1], [4]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_a_mask_of_any_type_will_do(dtype):
    batch = batch_of([[1, 1, 0]])
    batch["attention_mask"] = batch["attention_mask"].to(dtype)
    assert covered(batch) == [[0, 1]]


def test_position_ids_that_restart_part_a_row():
    batch = {
        "input_ids": torch.arange(10).reshape(2, 5),
        "position_ids": torch.tensor([[0, 1, 0, 1, 2], [0, 0, 1, 2, 0]]),
    }
    assert covered(batch) == [[0, 1], [2, 3, 4], [5], [6, 7, 8], [9]]


def test_position_ids_under_a_mask_part_only_its_real_tokens():
    batch = batch_of([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], [[0, 0, 0, 1, 0, 1], [0, 1, 2, 3, 0, 0]])
    assert covered(batch) == [[2, 3], [4, 5], [6, 7, 8, 9]]


@pytest.mark.parametrize("multiple", [None, 16, 64])
def test_a_batch_flattened_by_trl_with_pads_at_its_end(multiple):
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, pad_to_multiple_of=multiple)
    batch = collate(rows())
    assert "attention_mask" not in batch
    assert (batch["input_ids"].shape[1] > sum(LENGTHS)) == (multiple is not None)
    assert covered(batch, num_tokens=sum(LENGTHS)) == ids_of(rows())
    del batch["cu_seq_lens_q"]  # as an older collator: by position_ids alone
    assert covered(batch, num_tokens=sum(LENGTHS)) == ids_of(rows())


@pytest.mark.parametrize("flash", [False, True])
def test_a_batch_flattened_by_transformers(flash):
    collate = DataCollatorWithFlattening(return_position_ids=not flash, return_flash_attn_kwargs=flash)
    batch = collate(rows())
    assert ("cu_seq_lens_q" in batch, "position_ids" in batch) == (flash, not flash)
    assert covered(batch) == ids_of(rows())


@pytest.mark.parametrize("padding_free", [False, True])
def test_documents_of_packed_rows(padding_free):
    documents = ids_of(rows([3, 4, 2, 5, 1]))
    packed = [
        {"input_ids": documents[0] + documents[1], "seq_lengths": [3, 4]},
        {"input_ids": documents[2] + documents[3] + documents[4], "seq_lengths": [2, 5, 1]},
    ]
    collate = DataCollatorForLanguageModeling(
        pad_token_id=0, padding_free=padding_free, return_position_ids=not padding_free
    )
    assert covered(collate(packed), num_tokens=15) == documents


def test_a_batch_without_boundaries_is_refused_with_a_remedy():
    with pytest.raises(UnknownSequenceBoundaries, match="neither attention_mask nor position_ids") as caught:
        find_sequences({"input_ids": torch.zeros(1, 4)})
    assert "packing_strategy='bfd'" in str(caught.value)


def test_a_mask_of_another_shape_is_refused():
    batch = {"input_ids": torch.zeros(2, 4), "attention_mask": torch.ones(2, 1, 4, 4)}
    with pytest.raises(UnknownSequenceBoundaries, match=r"must be \(B, T\) = \(2, 4\) like input_ids, got"):
        find_sequences(batch)


def test_a_shifted_span_differs_in_its_ordinal_alone():
    span = find_sequences(batch_of([[1, 1, 0]]))[0]
    later = span.shifted(10)
    assert (later.ordinal, span.ordinal) == (10, 0)
    assert (later.row, later.tokens, later.length) == (span.row, span.tokens, span.length)
