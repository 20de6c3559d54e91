"""torch's attention for sequences of varying length as several versions of torch offer it, without the GPU it needs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qlora_neft.fused import attention, flattening


def by_slices(query, key, value, cu_seq, scale, heads):
    """What the kernel computes: (T, H, D) each, causal within each sequence."""
    parts = []
    for start, end in zip(cu_seq.tolist(), cu_seq.tolist()[1:], strict=False):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(heads // x.shape[0], dim=0) for x in (k, v))
        parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(0, 1))
    return torch.cat(parts)


def torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert query.shape[1] == key.shape[1] == value.shape[1], "no version says that it expands the heads"
    assert window_size == (-1, 0)
    return by_slices(query, key, value, cu_seq_q, scale, query.shape[1])


def torch_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return by_slices(query, key, value, cu_seq_q, scale, query.shape[1])


@pytest.mark.parametrize("kernel", [torch_2_11, torch_2_13])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_every_version_is_called_by_the_arguments_it_has(kernel, kv_heads, monkeypatch):
    arguments = frozenset(kernel.__kwdefaults__)
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "varlen_arguments", lambda: arguments)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 11, 8, generator=generator) for heads in (4, kv_heads, kv_heads))
    bounds = (0, 3, 4, 11)
    shared = {"attention_mask": None, "scaling": 0.3}
    found, _ = attention.varlen_attention(
        nn.Identity(), query, key, value, cu_seq_lens_q=torch.tensor(bounds), max_length_q=7, **shared
    )
    expected, _ = attention.per_sequence_attention(nn.Identity(), query, key, value, sequence_bounds=bounds, **shared)
    torch.testing.assert_close(found, expected)


def test_a_version_without_a_window_is_not_used(monkeypatch):
    monkeypatch.setattr(flattening, "_is_half_on_ampere", lambda device, dtype: True)
    device = torch.device("cuda")
    for arguments, runs in (({"is_causal"}, False), (set(), False), ({"scale", "window_size"}, True)):
        monkeypatch.setattr(flattening, "varlen_arguments", lambda arguments=arguments: frozenset(arguments))
        assert flattening.varlen_runs(device, torch.bfloat16, 128) is runs
