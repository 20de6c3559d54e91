"""FreeLB: K passes, noise that climbs the loss inside its ball, and NEFTune at K = 1."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import adapter_weights, assert_learned_alike, gradient_norms, losses, max_difference, mixed_rows, tiny_trainer

from qlora_neft.noise.freelb import Perturbation
from qlora_neft.noise.neftune import NEFTuneNoise
from qlora_neft.steps.sequences import SequenceSpan
from qlora_neft.trainer import QLoRANeftConfig

ALPHA, ROWS = 5.0, mixed_rows(16, seed=3)
FREELB = {"neftune_adversarial_steps": 3, "neftune_adversarial_step_size": 2.0}
RUN = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "max_steps": 2}


def trained(model, folder, **overrides):
    trainer = tiny_trainer(model, folder, ROWS, **{**RUN, **overrides})
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory):
    """Steps in one piece."""
    return trained(llama, tmp_path_factory.mktemp("whole"), max_tokens_per_micro_batch=10_000, **FREELB)


def perturbation(step_size=2.0, scale=1.0):
    spans = [SequenceSpan(0, slice(0, 5), 5, 0), SequenceSpan(1, torch.tensor([0, 2, 3]), 3, 1)]
    return Perturbation(NEFTuneNoise(spans, ALPHA, seed=1, step=0, scale=scale), step_size)


def climb(made, embeds, direction):
    """One pass whose loss is linear in the noise, and the ascent after it."""
    (made(None, (), embeds) * direction).sum().backward()
    made.ascend()
    return made.delta.detach()


def test_the_first_pass_adds_neftunes_noise():
    made, embeds = perturbation(), torch.randn(2, 6, 8)
    torch.testing.assert_close(made(None, (), embeds), made.noise(None, (), embeds), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1.0, 8.0])  # Gemma's embeddings are scaled behind the lookup
def test_noise_climbs_the_loss_and_stays_in_its_ball(scale):
    made, embeds, direction = perturbation(scale=scale), torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    made(None, (), embeds)
    before = made.delta.detach().clone()
    moved = climb(made, embeds, direction)
    for span in made.noise.spans:
        place = span.row, span.tokens
        rise = ((moved - before)[place] * direction[place]).sum()
        assert rise > 0
        straight = before[place] + 2.0 * scale * direction[place] / direction[place].norm()
        factor = min(1.0, ALPHA * scale / straight.norm().item())
        torch.testing.assert_close(moved[place], straight * factor)
    for _ in range(5):
        moved = climb(made, embeds, direction)
    assert [norm.item() for norm in made.norms()] == pytest.approx([ALPHA, ALPHA], rel=1e-5)  # on the sphere by now
    padding = torch.ones(2, 6, dtype=torch.bool)
    for span in made.noise.spans:
        padding[span.row, span.tokens] = False
    assert padding.sum() == 4 and moved[padding].abs().sum() == 0


@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
def test_a_gradient_that_is_no_direction_moves_nothing(bad):
    made, embeds = perturbation(), torch.randn(2, 6, 8)
    made(None, (), embeds)
    before = made.delta.detach().clone()
    made.delta.grad = torch.full_like(before, bad)
    made.ascend()
    torch.testing.assert_close(made.delta.detach(), before, rtol=0, atol=0)


def counted(trainer):
    """Train; how many micro-batches went forward and backward."""
    forward, calls = trainer.compute_loss, []

    def compute_loss(model, *args, **kwargs):
        calls.append(model.training)
        return forward(model, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    assert all(calls)
    return len(calls)


def test_the_step_is_the_mean_of_its_passes(llama, tmp_path):
    """With steps too short to move anything, three passes are one, and cost three forwards and backwards."""
    still = {**FREELB, "neftune_adversarial_step_size": 1e-12}
    neftune = tiny_trainer(llama, tmp_path / "a", ROWS, lora_dropout=0.1, **RUN)
    freelb = tiny_trainer(llama, tmp_path / "b", ROWS, lora_dropout=0.1, **RUN, **still)
    assert counted(freelb) == 3 * counted(neftune)
    assert losses(freelb) == pytest.approx(losses(neftune), rel=1e-5)
    assert gradient_norms(freelb) == pytest.approx(gradient_norms(neftune), rel=1e-4)
    assert max_difference(adapter_weights(freelb), adapter_weights(neftune)) < 1e-5
    assert freelb.tokens_seen == neftune.tokens_seen


def test_it_trains_on_a_higher_loss_than_neftune(llama, tmp_path):
    neftune, freelb = trained(llama, tmp_path / "a"), trained(llama, tmp_path / "b", **FREELB)
    assert losses(freelb)[0] > losses(neftune)[0] + 1e-3
    entry = next(entry for entry in freelb.state.log_history if "neftune_adversarial_norm" in entry)
    assert entry["neftune_norm"] == pytest.approx(ALPHA / math.sqrt(3), rel=0.05)
    assert entry["neftune_norm"] < entry["neftune_adversarial_norm"] <= ALPHA * 1.0001


@pytest.mark.parametrize(
    "way",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        {"max_tokens_per_micro_batch": 64},
        {"padding_free": True},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_how_it_is_run_changes_nothing(llama, tmp_path, whole, way):
    split = trained(llama, tmp_path / "split", **{"max_tokens_per_micro_batch": 10_000, **FREELB, **way})
    assert_learned_alike(split, whole)


def test_without_noise_there_is_nothing_to_climb(llama, tmp_path):
    plain = trained(llama, tmp_path / "a", neftune_noise_alpha=None)
    zero = trained(llama, tmp_path / "b", neftune_noise_alpha=0.0, **FREELB)
    assert max_difference(adapter_weights(zero), adapter_weights(plain)) == 0


@pytest.mark.parametrize(("steps", "size"), [(1, 2.0), (3, None), (3, 0.0), (3, math.inf), (0, None)])
def test_a_step_size_belongs_to_more_than_one_pass(tmp_path, steps, size):
    with pytest.raises(ValueError, match="neftune_adversarial_step"):
        QLoRANeftConfig(str(tmp_path), neftune_adversarial_steps=steps, neftune_adversarial_step_size=size)
