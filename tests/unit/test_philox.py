"""Keyed numbers are the same integers however they are computed, and random."""

from __future__ import annotations

import math

import pytest
import torch

from qlora_neft.noise.streams import FLOATS_AT_ONCE, _parts, normal_draws, uniform_by_tensors, uniform_draws

CPU = torch.device("cpu")
KEYS = [(0, 0), (1, 2), (2**64 - 1, 2**63 + 12345), (7, (123 << 32) | 5)]


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000, 4097])
def test_tensor_operations_give_numpys_numbers_bit_for_bit(count):
    counts = [count, 3, count + 1, 16]
    by_numpy = [draw.clone() for draw in uniform_draws(counts, KEYS, CPU)]
    by_tensors = uniform_by_tensors(counts, KEYS, CPU)
    for a, b in zip(by_numpy, by_tensors, strict=True):
        assert torch.equal(a, b)


def test_a_prefix_of_a_draw_is_the_shorter_draw():
    (long,) = [draw.clone() for draw in uniform_draws([500], [(3, 4)], CPU)]
    (short,) = uniform_draws([123], [(3, 4)], CPU)
    assert torch.equal(long[:123], short)


def test_every_part_of_the_key_matters():
    neighbours = [(5, 9), (6, 9), (5, 10), (5 + 2**32, 9), (5, 9 + 2**32), (5 + 2**63, 9)]
    draws = [draw.clone() for draw in uniform_draws([64] * len(neighbours), neighbours, CPU)]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert (a - b).abs().max() > 0.1


def test_uniform_draws_are_uniform():
    n = 200_000
    (draw,) = uniform_draws([n], [(11, 12)], CPU)
    assert draw.min() >= 0 and draw.max() < 1
    assert draw.mean().item() == pytest.approx(0.5, abs=5 / math.sqrt(12 * n))
    counts = torch.histc(draw, bins=100, min=0, max=1)
    chi_squared = ((counts - n / 100) ** 2 / (n / 100)).sum().item()
    assert 60 < chi_squared < 150  # 99 degrees of freedom; each bound is beyond 3 standard deviations
    correlation = torch.corrcoef(torch.stack((draw[:-1], draw[1:])))[0, 1].item()
    assert abs(correlation) < 5 / math.sqrt(n)


def test_normal_draws_are_normal():
    n = 200_001
    (draw,) = normal_draws([n], [(11, 12)], CPU)
    assert len(draw) == n and torch.isfinite(draw).all()
    assert draw.mean().item() == pytest.approx(0, abs=5 / math.sqrt(n))
    assert draw.var().item() == pytest.approx(1, abs=5 * math.sqrt(2 / n))
    assert (draw.abs() > 1.959964).float().mean().item() == pytest.approx(0.05, abs=0.003)
    assert (draw**4).mean().item() == pytest.approx(3, abs=0.12)


def test_parts_cover_everything_once_within_bounds():
    counts = [FLOATS_AT_ONCE // 3] * 7 + [2 * FLOATS_AT_ONCE, 5]
    parts = list(_parts(counts))
    assert [count for part in parts for count in counts[part]] == counts
    assert all(sum(counts[part]) <= FLOATS_AT_ONCE or len(counts[part]) == 1 for part in parts)
    assert len(parts) < len(counts)
