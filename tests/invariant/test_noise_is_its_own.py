"""Invariant 2: a sequence's noise depends on (seed, step, ordinal) and its own length, and on nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from noise_probe import NoiseProbe
from tiny import WIDTH, mixed_rows, rows_of_lengths, tiny_trainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

ALPHA = 5.0
ROWS = mixed_rows(16, seed=3)


def noise_of_run(model, tmp_path, rows=ROWS, **overrides) -> dict:
    overrides = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "max_steps": 2, **overrides}
    trainer = tiny_trainer(model, tmp_path, rows, **overrides)
    probe = NoiseProbe(trainer)
    trainer.train()
    found = probe.by_sequence(rows)
    assert len(found) == len({tuple(row) for row in rows["input_ids"]})
    for pads in probe.padding():
        assert pads.abs().sum() == 0, "padding must receive exactly zero"
    return found


def assert_same_noise(a: dict, b: dict) -> None:
    for ids, visits in a.items():
        assert len(visits) == len(b[ids])
        for x, y in zip(visits, b[ids], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


class PadLeft:
    """A user's own collator, padding on the left."""

    def __call__(self, features):
        width = max(len(row["input_ids"]) for row in features)
        pad = {"input_ids": 256, "labels": -100, "attention_mask": 0}
        batch = {
            key: [[pad[key]] * (width - len(row["input_ids"])) + values(row) for row in features]
            for key, values in {
                "input_ids": lambda row: list(row["input_ids"]),
                "labels": lambda row: list(row["labels"]),
                "attention_mask": lambda row: [1] * len(row["input_ids"]),
            }.items()
        }
        return {key: torch.tensor(value) for key, value in batch.items()}


HOW_IT_IS_RUN = {
    "1x16": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16},
    "4x4": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "64 tokens at a time": {"max_tokens_per_micro_batch": 64},
    "padded to a multiple": {"pad_to_multiple_of": 64},
    "padded on the left": {"data_collator": PadLeft()},
    "flattened": {"padding_free": True},
    "flattened in fours": {"padding_free": True, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "flattened and padded": {"padding_free": True, "pad_to_multiple_of": 64},
    "with dropout": {"lora_dropout": 0.3},
    "evaluated every step": {"eval_dataset": mixed_rows(5, seed=9), "eval_strategy": "steps", "eval_steps": 1},
    "checkpointed": {"gradient_checkpointing": True},
    "two workers": {"dataloader_num_workers": 2},
}


@pytest.fixture(scope="module")
def in_one_piece(llama, tmp_path_factory):
    """The noise of a run whose steps are not split."""
    return noise_of_run(llama, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("how", HOW_IT_IS_RUN.values(), ids=HOW_IT_IS_RUN.keys())
def test_noise_is_the_same_however_it_is_run(llama, tmp_path, in_one_piece, how):
    assert_same_noise(in_one_piece, noise_of_run(llama, tmp_path, **how))


def test_noise_has_the_published_scale_for_each_sequence_alone(llama, tmp_path):
    rows = rows_of_lengths([8, 40, 160, 20], seed=1)
    noise = noise_of_run(llama, tmp_path, rows, per_device_train_batch_size=4, max_steps=1)
    for ids, (drawn,) in noise.items():
        bound = ALPHA / math.sqrt(len(ids) * WIDTH)  # the paper: Uniform(-1, 1) times this
        assert drawn.abs().max() <= bound * (1 + 1e-4)
        assert drawn.abs().max() > 0.98 * bound
        assert drawn.pow(2).mean().sqrt().item() == pytest.approx(bound / math.sqrt(3), rel=0.08)
        assert drawn.mean().abs() < 5 * bound / math.sqrt(3 * drawn.numel())


def test_gaussian_noise_has_unit_variance_under_the_same_scale(llama, tmp_path):
    rows = rows_of_lengths([160, 40], seed=1)
    noise = noise_of_run(llama, tmp_path, rows, neftune_distribution="gaussian", max_steps=1)
    for ids, (drawn,) in noise.items():
        sigma = ALPHA / math.sqrt(len(ids) * WIDTH)
        assert drawn.std().item() == pytest.approx(sigma, rel=0.08)
        assert drawn.abs().max() > 2 * sigma  # a uniform draw never gets here


def test_documents_of_a_packed_row_keep_their_own_length(llama, tmp_path):
    rows = rows_of_lengths([9, 17, 33, 21, 12, 28, 40, 15], seed=5)
    trainer = tiny_trainer(llama, tmp_path, rows, packing=True, max_length=64, max_steps=1, shuffle_dataset=False)
    probe = NoiseProbe(trainer)
    trainer.train()
    found = probe.by_sequence(rows)
    assert len(found) == len(rows)
    for ids, visits in found.items():
        bound = ALPHA / math.sqrt(len(ids) * WIDTH)
        for drawn in visits:
            assert 0.95 * bound < drawn.abs().max() <= bound * (1 + 1e-4)


def test_packing_without_boundaries_is_refused(llama, tmp_path):
    with pytest.raises(ValueError, match=r"packing_strategy: 'wrapped' keeps no sequence boundaries"):
        tiny_trainer(llama, tmp_path, packing=True, packing_strategy="wrapped", max_length=64)


def test_a_collator_without_boundaries_is_refused(llama, tmp_path):
    class NoMask(DataCollatorForLanguageModeling):
        def __call__(self, features, return_tensors=None):
            batch = super().__call__(features)
            del batch["attention_mask"]
            return batch

    trainer = tiny_trainer(llama, tmp_path, data_collator=NoMask(pad_token_id=256))
    with pytest.raises(ValueError, match="neither attention_mask nor position_ids nor cu_seq_lens_q"):
        trainer.train()


def test_steps_seeds_and_ordinals_draw_differently(llama, tmp_path):
    rows = rows_of_lengths([20] * 4, seed=2)
    one = noise_of_run(llama, tmp_path, rows, per_device_train_batch_size=4)
    other_seed = noise_of_run(llama, tmp_path, rows, per_device_train_batch_size=4, seed=8)
    draws = [visit for visits in [*one.values(), *other_seed.values()] for visit in visits]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert (a - b).abs().max() > 0.01


def test_two_forwards_of_one_micro_batch_see_one_draw(llama, tmp_path):
    rows = rows_of_lengths([20, 30], seed=2)
    overrides = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 1}
    with pytest.warns(FutureWarning, match="label_smoothing_factor"):
        trainer = tiny_trainer(llama, tmp_path, rows, label_smoothing_factor=0.1, **overrides)
    probe = NoiseProbe(trainer)
    trainer.train()
    assert len(probe.calls) == 2
    torch.testing.assert_close(probe.calls[0][1], probe.calls[1][1], rtol=0, atol=0)


def test_scaled_embeddings_get_the_noise_before_the_scaling(architecture_dir, tmp_path):
    rows = rows_of_lengths([12, 40], seed=4)
    plain = noise_of_run(architecture_dir("llama"), tmp_path, rows, max_steps=1)
    scaled = noise_of_run(architecture_dir("gemma3"), tmp_path, rows, max_steps=1)
    for ids, (drawn,) in plain.items():
        torch.testing.assert_close(scaled[ids][0], drawn, rtol=0, atol=1e-5)
