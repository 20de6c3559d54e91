"""Attention by sequence on a CUDA device, against one sequence at a time. Run with: pytest -m gpu"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from gpu_device import DEVICE, needs_bf16, needs_device
from torch import nn

from qlora_neft.fused import attention
from qlora_neft.fused.flattening import varlen_arguments, varlen_runs

pytestmark = [pytest.mark.gpu, needs_device]

BOUNDS = (0, 1, 130, 131, 400, 401, 513)
LONGEST = 269


def tensors(heads, kv_heads, width, dtype):
    generator = torch.Generator().manual_seed(2)
    shapes = ((1, count, BOUNDS[-1], width) for count in (heads, kv_heads, kv_heads))
    return [torch.randn(*shape, generator=generator).to(DEVICE, dtype).requires_grad_() for shape in shapes]


def one_at_a_time(query, key, value, window):
    """Causal attention in float64, sequence by sequence, (1, T, H, D)."""
    query, key, value = (x.double() for x in (query, key, value))
    repeat = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
    parts = []
    for start, end in pairwise(BOUNDS):
        place = torch.arange(end - start, device=DEVICE)
        behind = place[:, None] - place[None, :]
        seen = (behind >= 0) & (behind < (window or end))
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 128), (8, 2, 64), (4, 1, 256)])
@pytest.mark.parametrize("name", ["varlen", "per_sequence"])
def test_attention_and_its_gradients_are_those_of_one_sequence_at_a_time(name, heads, kv_heads, width, window):
    dtype = torch.bfloat16 if name == "varlen" else torch.float32
    if name == "varlen" and not varlen_runs(DEVICE, dtype, width):
        pytest.skip(f"torch's kernel does not run here (it has {sorted(varlen_arguments())})")
    inputs = tensors(heads, kv_heads, width, dtype)
    function = attention.varlen_attention if name == "varlen" else attention.per_sequence_attention
    module = nn.Identity()
    found, _ = function(
        module,
        *inputs,
        attention_mask=None,
        sliding_window=window,
        cu_seq_lens_q=torch.tensor(BOUNDS, dtype=torch.int32, device=DEVICE),
        max_length_q=LONGEST,
        sequence_bounds=BOUNDS,
    )
    expected = one_at_a_time(*inputs, window)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    mine = torch.autograd.grad(found, inputs, grad.to(found.dtype))
    theirs = torch.autograd.grad(expected, inputs, grad.double())
    limit = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for a, b in zip((found, *mine), (expected, *theirs), strict=True):
        assert ((a.double() - b.double()).norm() / b.double().norm()).item() < limit


@needs_bf16
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "mistral"])
def test_logits_of_a_flattened_batch_are_those_of_padded_rows(architecture, architecture_dir):
    from tiny import byte_tokenizer
    from transformers import AutoModelForCausalLM

    if DEVICE.type == "cuda" and not varlen_runs(DEVICE, torch.bfloat16, 16):
        pytest.skip("torch's kernel does not run here")
    name = "varlen" if DEVICE.type == "cuda" else "per_sequence"
    model = AutoModelForCausalLM.from_pretrained(architecture_dir(architecture), dtype=torch.bfloat16).to(DEVICE).eval()
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(256, (length,), generator=generator).tolist() for length in (33, 1, 20, 7)]
    batch = attention.FlatteningCollator(byte_tokenizer().pad_token_id)([{"input_ids": row} for row in rows])
    batch = {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    batch.pop("labels")
    with torch.no_grad(), attention.FlattenedAttention(model, name).over(batch) as inputs:
        flat = model(**inputs, use_cache=False).logits[0]
    alone = torch.cat([model(torch.tensor([row], device=DEVICE)).logits[0].detach() for row in rows])
    assert (flat.double() - alone.double()).norm() / alone.double().norm() < 2e-2
