"""Dropout masks belong to the sequence: the same bits however they are computed and wherever its tokens lie."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from qlora_neft.fused.masks import LEVELS, Mask, Places, keep_rate, kept_by_tensors, threshold_of
from qlora_neft.noise.streams import sixteens, uniform_draws
from qlora_neft.steps.sequences import SequenceSpan

CPU = torch.device("cpu")
HOLES = torch.tensor([0, 2, 5])


def kept(spans, shape, features, *, seed=3, step=8, module=5, p=0.3, dtype=torch.float32):
    """The mask of a micro-batch, (M, features)."""
    mask = Mask(Places.of(spans, shape, seed, step), module, threshold_of(p))
    return mask.kept(features, dtype, CPU).clone()


@pytest.mark.parametrize("features", [1, 16, 20, 48])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensor_operations_give_numpys_bits(features, dtype):
    spans = [SequenceSpan(0, slice(2, 7), 5, 4), SequenceSpan(1, HOLES, 3, 9)]
    mask = Mask(Places.of(spans, (2, 7), 2**40 + 1, 8), 5, threshold_of(0.3))
    by_numpy = mask.kept(features, dtype, CPU)
    assert by_numpy.dtype == dtype and set(by_numpy.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(by_numpy.bool(), kept_by_tensors(mask, features, CPU))


@pytest.mark.parametrize("features", [16, 20])
def test_a_sequence_has_its_mask_wherever_it_lies(features):
    alone = kept([SequenceSpan(0, slice(0, 3), 3, 9)], (1, 3), features)
    left = kept([SequenceSpan(0, slice(5, 8), 3, 9), SequenceSpan(1, slice(0, 8), 8, 2)], (2, 8), features)
    flat = kept([SequenceSpan(0, slice(0, 4), 4, 1), SequenceSpan(0, slice(4, 7), 3, 9)], (1, 10), features)
    holes = kept([SequenceSpan(1, HOLES, 3, 9)], (2, 6), features)
    assert torch.equal(alone, left[5:8]) and torch.equal(alone, flat[4:7]) and torch.equal(alone, holes[6 + HOLES])
    assert not left[:5].any() and not flat[7:].any()  # padding keeps nothing


def test_every_part_of_the_key_matters():
    def drawn(*, ordinal=9, **key):
        return kept([SequenceSpan(0, slice(0, 8), 8, ordinal)], (1, 8), 64, p=0.5, **key)

    draws = [drawn(), drawn(ordinal=10), drawn(seed=4), drawn(step=9), drawn(module=6), drawn(module=5 + 2**32)]
    for a, b in combinations(draws, 2):
        assert 0.4 < (a == b).float().mean() < 0.6  # of 512 independent bits
    assert 0.4 < (draws[0][0] == draws[0][1]).float().mean() < 0.6  # and so do positions


def test_the_masks_are_not_the_noise():
    (noise,) = uniform_draws([64], [(3, 7)], CPU)
    bits = sixteens(128, (3, 7), (0, 0, 1))
    assert ((noise.numpy() * 2**8).astype(int) != bits[1::2] >> 8).mean() > 0.9  # the noise's upper bits


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_as_many_are_dropped_as_asked_for(p):
    n = 256 * 400
    share = kept([SequenceSpan(0, slice(0, 256), 256, 1)], (1, 256), 400, p=p).mean().item()
    assert share == pytest.approx(keep_rate(threshold_of(p)), abs=5 * (p * (1 - p) / n) ** 0.5)
    assert keep_rate(threshold_of(p)) == pytest.approx(1 - p, abs=0.5 / LEVELS)
