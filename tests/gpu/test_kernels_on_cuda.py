"""Triton's kernels, torch's norm and Liger's pieces on a CUDA device, against the plain way. Skipped without one."""

from __future__ import annotations

import pytest
import torch
from tiny import adapter_weights, losses, max_difference, mixed_rows, tiny_trainer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_neft.fused import liger, ops
from qlora_neft.fused.kernel_check import failures, use_kernels
from qlora_neft.fused.masks import Mask, Places, threshold_of
from qlora_neft.fused.norm import by_torch, install_norms
from qlora_neft.fused.triton_ops import OPERATIONS, dropped
from qlora_neft.steps.sequences import SequenceSpan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda", 0)
ON_GPU = {"use_cpu": False, "bf16": False, "optim": "adamw_torch"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_kernel_passes_its_check_here(dtype):
    assert failures(GPU, dtype) == {}
    assert use_kernels(GPU, dtype) == "kernels: Triton's, each checked against its plain version on this device"
    assert use_kernels(GPU, dtype, asked=False).startswith("kernels: plain operations")
    assert ops.activated(torch.ones(1, 1, device=GPU), ops.ACTIVATIONS["relu"]).item() == 1


def test_a_large_mask_is_the_cpus_bit_for_bit():
    rows, columns = 3000, 4096
    spans = [SequenceSpan(0, slice(0, 1700), 1700, 0), SequenceSpan(0, slice(1700, rows), rows - 1700, 1)]
    mask = Mask(Places.of(spans, (1, rows), seed=2**31 + 5, step=123), module=200, threshold=threshold_of(0.05))
    ones = torch.ones(rows, columns, dtype=torch.float16)
    assert torch.equal(dropped(ones.to(GPU), mask).cpu(), ops.ONE_KERNEL["dropped"](ones, mask))


def test_offsets_beyond_31_bits_are_reached():
    rows, columns = 2**16 + 3, 2**15 + 16  # more than 2**31 numbers, 4 GiB of them
    x = torch.full((rows, columns), 2.0, dtype=torch.float16, device=GPU)
    y = OPERATIONS["activated"](x, ops.ACTIVATIONS["relu"])
    assert y[-1].eq(2).all() and y[rows // 2].eq(2).all()


def test_torchs_own_norm_serves_where_it_has_one():
    new = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)
    assert by_torch(torch.ones(1, device=GPU), 0.0) == new
    assert not by_torch(torch.ones(1, device=GPU), 1.0)


@pytest.mark.parametrize("width", [128, 4096])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_norm_and_its_gradient_are_upstreams(family, width):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    use_kernels(GPU, torch.float32)
    norm = (LlamaRMSNorm if family == "llama" else Gemma3RMSNorm)(width)
    norm.weight = nn.Parameter(norm.weight + 0.3 * torch.randn(width), requires_grad=False)
    norm.to(GPU)
    x, grad = torch.randn(2, 64, 300, width, device=GPU)[:, :, 0:3].unbind(0)
    results = []
    for installed in (False, True):
        if installed:
            assert install_norms(nn.Sequential(norm)) == 1
        leaf = x.detach().clone().requires_grad_()
        y = norm(leaf)
        y.backward(grad)
        results.append((y.detach(), leaf.grad))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "granite")


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("own", [True, False], ids=["rope", "all pieces"])
def test_ligers_pieces_give_upstreams_gradients(model_type, own):
    pytest.importorskip("liger_kernel")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"head_dim": 16, "pad_token_id": 0, "num_hidden_layers": 2, "vocab_size": 128}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **more)).to(GPU).train()
    ids = torch.randint(1, 128, (2, 33), device=GPU)

    def gradients():
        model.zero_grad()
        model(ids).logits.float().square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected = gradients()
    pieces = liger.pieces_of(model_type, own_rotary=False, own_norms=own, own_mlps=own, has_experts=False)
    with liger.liger_applied(model, pieces, torch.no_grad) as line:
        assert line.startswith("Liger: rope"), line
        found = gradients()
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    assert torch.equal(gradients(), expected) or (gradients() - expected).norm() <= 1e-5 * expected.norm()


PIECES = {
    "plain operations": {"use_triton_kernels": False},
    "upstream's norms": {"fused_norms": False},
    "upstream's rotary embeddings": {"fused_rotary": False},
    "without Liger": {"use_liger_kernel": False},
    "offloaded": {"activation_offloading": True},
    "offloaded and recomputed": {"activation_offloading": True, "gradient_checkpointing": True},
    "compiled": {"compile_blocks": True},
}


@pytest.mark.parametrize("piece", PIECES.values(), ids=PIECES.keys())
def test_no_piece_changes_the_trajectory(llama, tmp_path, piece):
    both = []
    for overrides in ({}, piece):
        trainer = tiny_trainer(llama, tmp_path, mixed_rows(16, seed=3), lora_dropout=0.1, **{**ON_GPU, **overrides})
        trainer.train()
        both.append(trainer)
    assert losses(both[0]) == pytest.approx(losses(both[1]), rel=1e-4)
    assert max_difference(adapter_weights(both[0]), adapter_weights(both[1])) < 1e-3
