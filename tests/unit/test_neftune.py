"""NEFTune's arithmetic: scale, schedule, keyed draws, and the hook that adds them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from qlora_neft.noise.neftune import (
    NEFTuneNoise,
    NoiseStatistics,
    alpha_at,
    expected_norm,
    lookup_scale,
    noise_scale,
    noisy_embeddings,
)
from qlora_neft.noise.streams import keyed_rng, preserved_rng, stream_key
from qlora_neft.steps.sequences import SequenceSpan

WIDTH = 48


def span(length, ordinal=0, row=0, start=0):
    return SequenceSpan(row, slice(start, start + length), length, ordinal)


def noise_of(output, spans, **settings):
    """What a hook with these settings makes of an embedding's output."""
    return NEFTuneNoise(spans, **{"alpha": 5.0, "seed": 1, "step": 0, **settings})(nn.Identity(), (), output)


def draw(length=20, ordinal=0, **settings):
    """The noise of one sequence alone, (L, D)."""
    return noise_of(torch.zeros(1, length, WIDTH), [span(length, ordinal)], **settings)[0]


# ---- Scale ----


@pytest.mark.parametrize(("alpha", "length", "width"), [(5, 10, 4096), (15, 1, 1), (0, 7, 64), (10.0, 512, 5120)])
def test_scale_is_alpha_over_the_root_of_length_times_width(alpha, length, width):
    scale = noise_scale(alpha, length, width)
    assert scale**2 * length * width == pytest.approx(alpha**2)


@pytest.mark.parametrize("distribution", ["uniform", "gaussian", "bernoulli"])
@pytest.mark.parametrize("length", [3, 40])
def test_expected_norm_is_the_mean_norm_of_many_draws(distribution, length):
    norms = torch.stack([draw(length, k, distribution=distribution).norm() for k in range(400)])
    components = length * WIDTH
    # One norm scatters by less than alpha / sqrt(2 * components); the mean of 400 by a twentieth of that.
    assert norms.mean().item() == pytest.approx(
        expected_norm(5.0, distribution), abs=5 * 5.0 / math.sqrt(2 * components) / 20
    )


def test_expected_norm_is_alpha_over_root_three_or_alpha():
    assert expected_norm(12.0, "uniform") ** 2 * 3 == pytest.approx(144)
    assert expected_norm(12.0, "gaussian") == expected_norm(12.0, "bernoulli") == 12


def test_uniform_draws_fill_their_interval_and_gaussian_ones_do_not_stop_there():
    bound = noise_scale(5.0, 500, WIDTH)
    uniform, gaussian = draw(500), draw(500, distribution="gaussian")
    assert 0.999 * bound < uniform.abs().max() <= bound * (1 + 1e-6)
    quarter = (uniform < -bound / 2).float().mean().item()
    assert quarter == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / uniform.numel()))
    assert gaussian.std().item() == pytest.approx(bound, rel=0.03)
    assert gaussian.abs().max() > 3 * bound


def test_bernoulli_draws_have_one_size_and_both_signs():
    bound, drawn = noise_scale(5.0, 500, WIDTH), draw(500, distribution="bernoulli")
    torch.testing.assert_close(drawn.abs(), torch.full_like(drawn, bound), rtol=1e-6, atol=0)
    positive = (drawn > 0).float().mean().item()
    assert positive == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(drawn.numel()))


@pytest.mark.parametrize("distribution", ["uniform", "gaussian", "bernoulli"])
def test_the_mirror_image_is_exact(distribution):
    assert torch.equal(draw(distribution=distribution, sign=-1.0), -draw(distribution=distribution))


# ---- Schedule ----


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("start", "end"), [(15.0, 0.0), (0.0, 10.0), (5.0, 5.0)])
def test_a_schedule_goes_from_alpha_to_the_final_alpha_without_turning_back(schedule, start, end):
    values = [alpha_at(step, 11, start, end, schedule) for step in range(11)]
    assert values[0] == start
    assert values[-1] == pytest.approx(end)
    assert values[5] == pytest.approx((start + end) / 2)
    steps = [b - a for a, b in pairwise(values)]
    assert all(change * (end - start) > 0 for change in steps) if start != end else not any(steps)


def test_linear_and_cosine_differ_where_they_should():
    quarter = 25 / 100
    assert alpha_at(25, 101, 8.0, 0.0, "linear") == pytest.approx(8 * (1 - quarter))
    assert alpha_at(25, 101, 8.0, 0.0, "cosine") == pytest.approx(8 * (1 + math.cos(math.pi * quarter)) / 2)


def test_constant_never_changes():
    assert {alpha_at(step, 100, 7.0, None, "constant") for step in range(100)} == {7.0}


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_run_of_one_step_uses_alpha(schedule):
    assert alpha_at(0, 1, 5.0, None if schedule == "constant" else 0.0, schedule) == 5.0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_stays_at_its_end(schedule):
    assert alpha_at(500, 10, 5.0, 1.0, schedule) == pytest.approx(1.0)


# ---- Keyed draws ----


def test_the_same_key_draws_the_same_noise_whatever_was_drawn_between():
    first = draw(20, 3, seed=5, step=2)
    torch.rand(100)
    torch.manual_seed(99)
    assert torch.equal(first, draw(20, 3, seed=5, step=2))


def test_drawing_leaves_the_global_stream_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 2},
        {"step": 1},
        {"ordinal": 1},
        {"seed": 1 + 2**32},  # the same low 32 bits, all that a CPU generator reads of a seed
        {"step": 2**20},
        {"ordinal": 2**20},
        {"distribution": "gaussian"},
        {"distribution": "bernoulli"},
    ],
    ids=str,
)
def test_every_part_of_the_key_changes_the_draw(other):
    assert (draw() - draw(**other)).abs().max() > 0.01


def test_no_two_sequences_of_a_run_share_their_noise():
    starts = set()
    for step in range(50):
        batch = noise_of(torch.zeros(40, 1, 3), [span(1, j, row=j) for j in range(40)], step=step)
        starts |= {tuple(row) for row in batch[:, 0].tolist()}
    assert len(starts) == 50 * 40  # three components of 24 bits each: chance has no say


def test_coordinates_do_not_run_into_each_other():
    keys = {stream_key("dropout", 1, 23), stream_key("dropout", 12, 3), stream_key("other", 1, 23)}
    assert len(keys | {stream_key("dropout", 23, 1), stream_key("dropout", 1, 2, 3)}) == 5


def test_dropout_keys_hardly_collide_in_the_32_bits_that_a_cpu_generator_reads():
    keys = [stream_key("dropout", seed, step, j) for seed in range(4) for step in range(64) for j in range(32)]
    assert all(0 <= key < 2**63 for key in keys)
    distinct = len({key % 2**32 for key in keys})
    expected_collisions = len(keys) ** 2 / 2 / 2**32  # 0.008: one collision would already be suspicious
    assert len(keys) - distinct <= expected_collisions


def test_keyed_rng_puts_the_global_stream_back_and_repeats_itself():
    device = torch.device("cpu")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with keyed_rng(2**40 + 1, device):
        a = torch.rand(4)
    with keyed_rng(2**40 + 1, device):
        b = torch.rand(4)
    assert torch.equal(a, b)
    assert torch.equal(before, torch.get_rng_state())


def test_preserved_rng_puts_streams_back_after_an_exception():
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="size"), preserved_rng():
        torch.rand(3) + torch.rand(4)
    assert torch.equal(before, torch.get_rng_state())


def test_a_draw_does_not_depend_on_the_place_in_the_batch():
    alone = draw(7, 4)
    batch = noise_of(torch.zeros(3, 30, WIDTH), [span(30, 0), span(9, 1, row=1), span(7, 4, row=2, start=11)])
    assert torch.equal(batch[2, 11:18], alone)


# ---- The hook ----


def test_padding_receives_nothing():
    noisy = noise_of(torch.zeros(2, 10, WIDTH), [span(10), span(4, 1, row=1, start=6)])
    assert noisy[1, :6].abs().sum() == 0
    assert (noisy[1, 6:] == 0).sum() == 0


def test_holes_in_a_mask_receive_nothing_and_do_not_count():
    columns = torch.tensor([0, 1, 4, 7])
    output = torch.randn(1, 9, WIDTH)
    noisy = noise_of(output, [SequenceSpan(0, columns, 4, 2)])
    torch.testing.assert_close(noisy[0, columns] - output[0, columns], draw(4, 2), rtol=0, atol=1e-6)
    others = [2, 3, 5, 6, 8]
    assert torch.equal(noisy[0, others], output[0, others])


@pytest.mark.parametrize("tokens", [slice(0, 12), torch.tensor([*range(11), 13])], ids=["slice", "indices"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_from_the_float32_sum(tokens, dtype):
    output = torch.randn(1, 14, WIDTH).to(dtype)
    noisy = noise_of(output, [SequenceSpan(0, tokens, 12, 0)])
    exact = output[0, tokens].float() + draw(12)
    assert noisy.dtype == dtype
    assert torch.equal(noisy[0, tokens], exact.to(dtype))
    rounded_twice = output[0, tokens] + draw(12).to(dtype)
    assert not torch.equal(noisy[0, tokens], rounded_twice)  # the difference this test is about


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_of_the_embedding_is_left_alone(dtype):
    output = torch.randn(2, 6, WIDTH).to(dtype)
    before = output.clone()
    assert not torch.equal(noise_of(output, [span(6), span(3, 1, row=1)]), before)
    assert torch.equal(output, before)


def test_gradients_pass_through_a_leaf_that_requires_them():
    output = torch.randn(1, 5, WIDTH, requires_grad=True)
    noise_of(output, [span(5)]).sum().backward()
    assert torch.equal(output.grad, torch.ones_like(output))


@pytest.mark.parametrize("width", [1, 3, 257])
def test_any_width_and_a_single_token_will_do(width):
    noisy = noise_of(torch.zeros(1, 1, width), [span(1)])
    assert 0 < noisy.abs().max() <= 5 / math.sqrt(width)


def test_a_batch_without_sequences_passes_through():
    output = torch.randn(1, 4, WIDTH)
    assert torch.equal(noise_of(output, []), output)


def test_the_scale_of_the_lookup_multiplies_the_noise():
    torch.testing.assert_close(draw(scale=8.0), 8 * draw(), rtol=1e-6, atol=0)


def test_lookup_scale_is_one_but_for_modules_that_scale_themselves():
    plain = nn.Embedding(4, 16)
    assert lookup_scale(plain) == 1.0
    plain.embed_scale = 4.0
    assert lookup_scale(plain) == 4.0
    plain.to(torch.bfloat16).embed_scale = torch.tensor(math.sqrt(1000))  # Gemma: as the forward rounds it
    assert lookup_scale(plain) == torch.tensor(math.sqrt(1000)).to(torch.bfloat16).item()


# ---- Statistics ----


def test_statistics_are_the_norms_of_noise_and_clean_embeddings():
    statistics, output = NoiseStatistics(), torch.randn(2, 9, WIDTH)
    spans = [span(9), span(4, 1, row=1)]
    noisy = noise_of(output, spans, statistics=statistics)
    noise = [(noisy - output)[s.row, s.tokens].norm() for s in spans]
    clean = [output[s.row, s.tokens].norm() for s in spans]
    norm, ratio = statistics.means()
    assert norm == pytest.approx((sum(noise) / 2).item(), rel=1e-5)
    assert ratio == pytest.approx((sum(n / c for n, c in zip(noise, clean, strict=True)) / 2).item(), rel=1e-5)


def test_no_measurement_has_no_mean():
    assert NoiseStatistics().means() is None


def test_the_measured_norm_agrees_with_the_expected_one_where_the_embedding_scales():
    statistics = NoiseStatistics()
    noise_of(torch.ones(1, 200, WIDTH), [span(200)], scale=8.0, statistics=statistics)
    assert statistics.means()[0] == pytest.approx(expected_norm(5.0, "uniform"), rel=0.05)


# ---- The context ----


def test_the_hook_lives_inside_the_block_only_whatever_ends_it():
    embedding = nn.Embedding(10, WIDTH)
    ids = torch.tensor([[1, 2, 3]])
    clean = embedding(ids)
    noise = NEFTuneNoise([span(3)], alpha=5.0, seed=0, step=0)
    for error in (None, RuntimeError, KeyboardInterrupt):
        try:
            with noisy_embeddings(embedding, noise):
                assert (embedding(ids) - clean).abs().max() > 0.01
                if error:
                    raise error
        except (RuntimeError, KeyboardInterrupt):
            pass
        assert torch.equal(embedding(ids), clean)
        assert not embedding._forward_hooks


def test_no_noise_registers_no_hook():
    embedding = nn.Embedding(10, WIDTH)
    with noisy_embeddings(embedding, None):
        assert not embedding._forward_hooks


def test_hooks_that_were_there_before_see_the_noise():
    embedding, seen = nn.Embedding(10, WIDTH), []
    embedding.register_forward_hook(lambda module, args, output: seen.append(output))
    with noisy_embeddings(embedding, NEFTuneNoise([span(3)], alpha=5.0, seed=0, step=0)):
        result = embedding(torch.tensor([[1, 2, 3]]))
    assert seen[0] is result
