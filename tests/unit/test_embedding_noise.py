"""Token flips and singular values against computations of everything with everything."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_neft.errors import UserInputError
from qlora_neft.evaluation.embeddings import table as table_module
from qlora_neft.evaluation.embeddings.flips import noised, token_flips, whole_vocabulary
from qlora_neft.evaluation.embeddings.spectrum import clean_blocks, noised_blocks, similarity_spectrum
from qlora_neft.evaluation.embeddings.table import EmbeddingTable
from qlora_neft.noise.neftune import NEFTuneNoise
from qlora_neft.steps.sequences import SequenceSpan

V, D = 300, 24


@pytest.fixture(scope="module")
def weight():
    """Clustered, so that some tokens have near neighbours and others have none."""
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(60, D, generator=draw)
    spread = torch.rand(V, 1, generator=draw) ** 3
    return centres[torch.arange(V) % 60] + spread * torch.randn(V, D, generator=draw)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks also in small tables, the last one not full."""
    for name, size in (("POINTS_AT_ONCE", 64), ("ROWS_AT_ONCE", 128)):
        monkeypatch.setattr(table_module, name, size)
    monkeypatch.setattr("qlora_neft.evaluation.embeddings.flips.POINTS_AT_ONCE", 64)
    monkeypatch.setattr("qlora_neft.evaluation.embeddings.spectrum.ROWS_AT_ONCE", 128)


def sequences_of(lengths, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(V, (length,), generator=draw) for length in lengths]


def every_distance(weight, ids, alpha, ordinal, seed, distribution):
    """(L, V) from each noised embedding to every embedding, in float64; noise by the hook of training."""
    hook = NEFTuneNoise([SequenceSpan(0, slice(0, len(ids)), len(ids), ordinal)], alpha, seed, 0, distribution)
    noisy = hook(torch.nn.Identity(), (), weight[ids][None])[0]
    return torch.cdist(noisy.double(), weight.double(), compute_mode="donot_use_mm_for_euclid_dist")


@pytest.mark.parametrize("distribution", ["uniform", "gaussian", "bernoulli"])
def test_flips_are_those_of_comparing_everything(weight, distribution):
    sequences = sequences_of([3, 40, 90, 17])
    alphas = [0.0, 2.0, 8.0, 30.0]
    found = token_flips(EmbeddingTable(weight), sequences, alphas, seed=5, distribution=distribution)
    for alpha, one in zip(alphas, found, strict=True):
        expected = []
        for ordinal, ids in enumerate(sequences):
            nearest = every_distance(weight, ids, alpha, ordinal, 5, distribution).argmin(dim=1)
            expected.append(int((nearest != ids).sum()))
        assert one.flipped == expected and one.lengths == [3, 40, 90, 17]
        assert one.share == sum(expected) / 150
        assert one.share_per_sequence == pytest.approx(
            sum(n / length for n, length in zip(expected, (3, 40, 90, 17), strict=True)) / 4
        )
    assert found[0].flipped == [0, 0, 0, 0] and 0 < found[1].share < found[2].share < found[3].share


def test_flips_name_the_token_that_is_nearest(weight):
    [ids] = sequences_of([80])
    [found] = token_flips(EmbeddingTable(weight), [ids], [20.0])
    nearest = every_distance(weight, ids, 20.0, 0, 0, "uniform").argmin(dim=1)
    flipped = [(int(a), int(b)) for a, b in zip(ids, nearest, strict=True) if a != b]
    assert sorted(found.pairs.elements()) == sorted(flipped) and len(flipped) > 10


def test_tokens_far_from_all_others_are_not_searched():
    apart = torch.eye(200) * 3  # every distance is 3 sqrt(2)
    sequences = whole_vocabulary(EmbeddingTable(apart), 50)
    few, many = token_flips(EmbeddingTable(apart), sequences, [1.0, 300.0])
    assert few.searched == 0 and few.share == 0
    assert many.searched == 200 and many.share > 0


def test_every_token_of_the_vocabulary_counts_once(weight):
    sequences = whole_vocabulary(EmbeddingTable(weight), 64)
    assert [len(ids) for ids in sequences] == [64] * 5
    assert torch.cat(sequences).tolist() == [*range(V), *range(20)]
    [found] = token_flips(EmbeddingTable(weight), sequences, [10.0], max_tokens=V)
    assert found.lengths == [64, 64, 64, 64, V - 4 * 64]
    expected = 0
    for ordinal, ids in enumerate(sequences):
        nearest = every_distance(weight, ids, 10.0, ordinal, 0, "uniform").argmin(dim=1)
        expected += int((nearest != ids)[: found.lengths[ordinal]].sum())
    assert sum(found.flipped) == expected > 0
    assert len(whole_vocabulary(EmbeddingTable(weight), 1000)) == 1  # longer than the vocabulary


def test_tokens_of_one_embedding_are_not_each_others_flips(weight):
    doubled = torch.cat([weight[:50], weight[:50], -torch.zeros(1, D), torch.zeros(1, D)])
    table = EmbeddingTable(doubled)
    assert table.vocabulary == 102 and len(table.rows) == 51
    once = torch.cat([weight[:50], torch.zeros(1, D)])
    ids = torch.arange(50)
    [found] = token_flips(table, [ids + 50], [90.0])
    [expected] = token_flips(EmbeddingTable(once), [ids], [90.0])
    assert found.flipped == expected.flipped and sum(found.flipped) > 0
    assert found.pairs == expected.pairs  # named by the first token that has the embedding
    with pytest.raises(UserInputError, match="two different rows"):
        EmbeddingTable(torch.ones(5, D))


def test_an_embedding_with_nan_is_refused(weight):
    broken = weight.clone()
    broken[170, 3] = math.nan
    with pytest.raises(UserInputError, match="NaN"):
        EmbeddingTable(broken)


def test_the_ratio_of_norms_is_the_expected_one(weight):
    sequences = sequences_of([100] * 20)
    [found] = token_flips(EmbeddingTable(weight), sequences, [6.0])
    expected = sum(6 / math.sqrt(3) / weight[ids].norm().item() for ids in sequences) / 20
    assert found.noise_to_embedding == pytest.approx(expected, rel=0.01)


def test_bf16_tables_are_computed_with_in_float32(weight):
    sequences = sequences_of([50, 50])
    half = weight.bfloat16()
    low, full = (token_flips(EmbeddingTable(w), sequences, [9.0])[0] for w in (half, half.float()))
    assert low.flipped == full.flipped and low.noise_to_embedding == full.noise_to_embedding > 0


@pytest.mark.parametrize("count", [V, 10])
def test_singular_values_are_those_of_the_whole_matrix(weight, count):
    part = weight[:count]
    found = similarity_spectrum(clean_blocks(EmbeddingTable(part)), D)
    for values, rows in ((found.inner_product, part), (found.cosine, torch.nn.functional.normalize(part, dim=1))):
        expected = torch.linalg.svdvals(rows.double() @ rows.double().T)[: min(count, D)]
        assert values == pytest.approx(expected.tolist(), rel=1e-5)
    assert sum(found.cosine) == pytest.approx(count, rel=1e-5)  # the trace: every token is like itself


def test_noise_lifts_every_singular_value_alike():
    """E[(E + n)^T (E + n)] = E^T E + V s^2 I, where s^2 = alpha^2 / (3 L d)."""
    weight = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 2, 16)
    table, alpha, length = EmbeddingTable(weight), 12.0, 40
    clean = similarity_spectrum(clean_blocks(table), 16).inner_product
    blocks = noised_blocks(table, noised(table, whole_vocabulary(table, length), alpha))
    noisy = similarity_spectrum(blocks, 16).inner_product
    lift = 4000 * alpha**2 / (3 * length * 16)
    assert len(noisy) == 16 and lift > clean[-1]
    for before, after in zip(clean, noisy, strict=True):
        assert after - before == pytest.approx(lift, abs=0.05 * (before + lift))


def test_memory_does_not_grow_with_the_square_of_the_vocabulary():
    """A whole table of distances would be 8,000^2 float32 numbers, 244 MiB."""
    script = """if True:
        import resource, torch
        from qlora_neft.evaluation.embeddings.flips import token_flips, whole_vocabulary
        from qlora_neft.evaluation.embeddings.spectrum import clean_blocks, similarity_spectrum
        from qlora_neft.evaluation.embeddings.table import EmbeddingTable
        weight = torch.randn(8000, 32)
        torch.linalg.eigvalsh(torch.eye(8) @ torch.eye(8))  # what is loaded for the first product stays
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        table = EmbeddingTable(weight)
        [found] = token_flips(table, whole_vocabulary(table, 50), [40.0], max_tokens=8000)
        similarity_spectrum(clean_blocks(table), 32)
        print(found.searched, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    searched, kibibytes = map(int, done.stdout.split())
    assert searched > 7000 and kibibytes < 128 * 1024
