"""The invariants on a CUDA device. Skipped without one; run with: pytest -m gpu"""

from __future__ import annotations

import pytest
import torch
from gpu_device import DEVICE, ON_DEVICE, needs_cuda, needs_device
from noise_probe import NoiseProbe
from tiny import adapter_weights, losses, max_difference, mixed_rows, tiny_trainer

from qlora_neft.base.nf4 import frozen_fingerprints
from qlora_neft.base.precision import resolve_precision
from qlora_neft.noise.streams import uniform_by_tensors, uniform_draws

pytestmark = [
    pytest.mark.gpu,
    needs_device,
]
ROWS = mixed_rows(32, seed=11)
STEP_OF_16 = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}


def trained(model, tmp_path, **overrides):
    trainer = tiny_trainer(model, tmp_path, ROWS, **{**ON_DEVICE, **overrides})
    trainer.train()
    return trainer


def test_a_gpu_draws_the_numbers_of_a_cpu_bit_for_bit():
    counts, keys = [5000, 7, 12345], [(1, 2), (2**64 - 1, 5), (0, 1 << 40)]
    on_cpu = [draw.clone() for draw in uniform_draws(counts, keys, torch.device("cpu"))]
    on_gpu = uniform_by_tensors(counts, keys, DEVICE)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu, on_gpu, strict=True))


def test_a_sequence_gets_the_same_noise_on_gpu_and_cpu(llama, tmp_path):
    found = []
    for device in ({"use_cpu": True}, ON_DEVICE):
        trainer = tiny_trainer(llama, tmp_path, ROWS, **{**device, "max_steps": 1})
        probe = NoiseProbe(trainer)
        trainer.train()
        probe.calls = [(ids.cpu(), noise.cpu()) for ids, noise in probe.calls]
        found.append(probe.by_sequence(ROWS))
    assert found[0].keys() == found[1].keys()
    for ids, (drawn,) in found[0].items():
        torch.testing.assert_close(drawn, found[1][ids][0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 4])
def test_one_trajectory_however_a_step_is_split(llama, tmp_path, rows):
    whole = trained(llama, tmp_path, **STEP_OF_16)
    split = trained(llama, tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=16 // rows)
    assert losses(whole) == pytest.approx(losses(split), rel=1e-4)


def test_one_trajectory_with_and_without_checkpointing(llama, tmp_path):
    none = trained(llama, tmp_path, checkpointed_blocks=0, lora_dropout=0.1)
    some = trained(llama, tmp_path, checkpointed_blocks=1, lora_dropout=0.1)
    assert losses(none) == pytest.approx(losses(some), rel=1e-4)


def test_alpha_zero_is_no_noise_bit_for_bit(llama, tmp_path):
    off, zero = (trained(llama, tmp_path, neftune_noise_alpha=alpha, lora_dropout=0.1) for alpha in (None, 0.0))
    assert max_difference(adapter_weights(off), adapter_weights(zero)) == 0


@needs_cuda
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_half_precision_run_trains_float32_adapters_on_a_frozen_base(llama, tmp_path, precision):
    if precision == "bf16" and resolve_precision().amp != "bf16":
        pytest.skip("this GPU has no bf16")
    formats = {"bf16": precision == "bf16", "fp16": precision == "fp16"}
    trainer = tiny_trainer(llama, tmp_path, ROWS, **{**ON_DEVICE, **formats, "optim": "paged_adamw_32bit"})
    before = frozen_fingerprints(trainer.model)
    trainer.train()
    assert {weight.dtype for weight in adapter_weights(trainer).values()} == {torch.float32}
    assert all(torch.isfinite(weight).all() for weight in adapter_weights(trainer).values())
    assert frozen_fingerprints(trainer.model) == before
    assert len(trainer.model.get_input_embeddings()._forward_hooks) == 0
