"""SymNoise: each step sees its noise and the mirror image of it, however the step is run."""

from __future__ import annotations

import math

import pytest
import torch
from noise_probe import NoiseProbe
from tiny import adapter_weights, assert_learned_alike, losses, max_difference, mixed_rows, tiny_trainer

from qlora_neft.trainer import QLoRANeftConfig

ALPHA, WIDTH, ROWS = 5.0, 64, mixed_rows(16, seed=3)
SYMNOISE = {"neftune_symmetric": True, "neftune_distribution": "bernoulli"}
RUN = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "max_steps": 2}


def trained(model, folder, **overrides):
    trainer = tiny_trainer(model, folder, ROWS, **{**RUN, **overrides})
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory):
    """Steps in one piece."""
    return trained(llama, tmp_path_factory.mktemp("whole"), max_tokens_per_micro_batch=10_000, **SYMNOISE)


@pytest.mark.parametrize("distribution", ["bernoulli", "uniform", "gaussian"])
def test_the_second_pass_adds_the_mirror_image(llama, tmp_path, distribution):
    trainer = tiny_trainer(
        llama, tmp_path, ROWS, **{**RUN, "max_steps": 1}, neftune_symmetric=True, neftune_distribution=distribution
    )
    probe = NoiseProbe(trainer)
    trainer.train()
    found = probe.by_sequence(ROWS)
    assert len(found) == len(ROWS)
    for ids, (first, second) in found.items():
        # The probe subtracts the lookup again, which rounds.
        torch.testing.assert_close(first, -second, rtol=0, atol=1e-6)
        if distribution == "bernoulli":
            bound = torch.full_like(first, ALPHA / math.sqrt(len(ids) * WIDTH))
            torch.testing.assert_close(first.abs(), bound, rtol=0, atol=1e-6)
            assert first.norm().item() == pytest.approx(ALPHA, rel=1e-4)


def losses_of_passes(trainer):
    """Train; the loss of each pass over a micro-batch, summed over its tokens."""
    forward, found = trainer.compute_loss, []

    def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = forward(model, inputs, return_outputs, num_items_in_batch)
        found.append((loss[0] if return_outputs else loss).item() * float(num_items_in_batch))
        return loss

    trainer.compute_loss = compute_loss
    trainer.train()
    return found


def test_the_step_is_the_mean_of_both(llama, tmp_path):
    one_step = {**RUN, "max_steps": 1, "max_tokens_per_micro_batch": 10_000, "lora_dropout": 0.1}
    with_both = tiny_trainer(llama, tmp_path / "a", ROWS, **one_step, **SYMNOISE)
    with_one = tiny_trainer(llama, tmp_path / "b", ROWS, **one_step, neftune_distribution="bernoulli")
    first, second = losses_of_passes(with_both)
    [alone] = losses_of_passes(with_one)
    assert first == pytest.approx(alone, rel=1e-5) and first != pytest.approx(second, rel=1e-5)
    assert losses(with_both)[0] == pytest.approx((first + second) / 2 / first * losses(with_one)[0], rel=1e-4)
    assert with_both.tokens_seen == with_one.tokens_seen


@pytest.mark.parametrize(
    "way",
    [
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        {"padding_free": True},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_how_it_is_run_changes_nothing(llama, tmp_path, whole, way):
    split = trained(llama, tmp_path / "split", **{"max_tokens_per_micro_batch": 10_000, **SYMNOISE, **way})
    assert_learned_alike(split, whole)


def test_without_noise_there_is_nothing_to_mirror(llama, tmp_path):
    plain = trained(llama, tmp_path / "a", neftune_noise_alpha=None)
    zero = trained(llama, tmp_path / "b", neftune_noise_alpha=0.0, **SYMNOISE)
    assert max_difference(adapter_weights(zero), adapter_weights(plain)) == 0


def test_it_is_not_combined_with_freelb(tmp_path):
    freelb = {"neftune_adversarial_steps": 2, "neftune_adversarial_step_size": 1.0}
    with pytest.raises(ValueError, match="neftune_symmetric: cannot be combined"):
        QLoRANeftConfig(str(tmp_path), neftune_symmetric=True, **freelb)
