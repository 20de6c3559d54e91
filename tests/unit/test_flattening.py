"""Attention by sequence against attention with a mask, and who is flattened at all."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qlora_neft.base.flattening import PER_SEQUENCE, VARLEN, flattens, probed, why_padded
from qlora_neft.errors import UserInputError
from qlora_neft.fused import attention
from qlora_neft.fused.attention import per_sequence_attention, runs_of_one_length, varlen_attention
from qlora_neft.fused.flattening import choose_attention
from scripts.probe_flattening import verdict

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BOUNDS = (0, 7, 8, 15, 22, 24)  # 7, 1, 7, 7, 2


def masked(query, key, value, window, scale):
    """Attention over the whole row with a block mask, in float64."""
    owner = torch.cat([torch.full((b - a,), i) for i, (a, b) in enumerate(pairwise(BOUNDS))])
    place = torch.arange(BOUNDS[-1])
    behind = place[:, None] - place[None, :]
    mask = (owner[:, None] == owner[None, :]) & (behind >= 0) & (behind < (window or 99))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    out = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), attn_mask=mask, scale=scale)
    return out.transpose(1, 2).float()


def heads(kv_heads, value_dim=8):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, 24, 8), (1, kv_heads, 24, 8), (1, kv_heads, 24, value_dim)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("window", [None, 3, 7, 100])
@pytest.mark.parametrize(("kv_heads", "scale", "value_dim"), [(4, None, 8), (2, 0.7, 8), (1, None, 6)])
def test_attention_by_sequence_is_attention_under_a_block_mask(window, kv_heads, scale, value_dim):
    inputs = heads(kv_heads, value_dim)
    found, weights = per_sequence_attention(
        nn.Identity(), *inputs, None, scaling=scale, sliding_window=window, sequence_bounds=BOUNDS
    )
    expected = masked(*inputs, window, scale)
    assert weights is None and found.shape == (1, 24, 4, value_dim)
    torch.testing.assert_close(found, expected)
    into = torch.randn(expected.shape)
    for a, b in zip(
        torch.autograd.grad((found * into).sum(), inputs),
        torch.autograd.grad((expected * into).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_neighbours_of_one_length_share_a_call():
    assert runs_of_one_length(BOUNDS) == [(0, 7, 1), (7, 1, 1), (8, 7, 2), (22, 2, 1)]


@pytest.mark.parametrize("window", [None, 3, 100])
def test_torchs_kernel_is_told_the_window_as_flash_attention_counts_it(window, monkeypatch):
    """Its window leaves out the token itself, and values are as wide as queries."""

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
        assert (q.shape[-1], max_q, cu_q.tolist()) == (v.shape[-1], 7, list(BOUNDS))
        seen = {(-1, 0): None}.get(window_size, window_size[0] + 1)
        return masked(*(x.transpose(0, 1)[None] for x in (q, k, v)), seen, scale)[0]

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "varlen_arguments", lambda: {"enable_gqa"})
    inputs = heads(2, 6)
    found, _ = varlen_attention(
        nn.Identity(), *inputs, None, sliding_window=window, cu_seq_lens_q=torch.tensor(BOUNDS), max_length_q=7
    )
    torch.testing.assert_close(found, masked(*inputs, window, None))


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.ones(4)}, "s_aux"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "not causal"),
        ({"sequence_bounds": None}, "does not hand down"),
    ],
)
def test_what_it_does_not_know_it_refuses(extra, what):
    with pytest.raises(NotImplementedError, match=what):
        per_sequence_attention(nn.Identity(), *heads(4), None, **{"sequence_bounds": BOUNDS, **extra})


# ---- Who is flattened ----


@pytest.fixture
def ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))


def chosen(config, device=CUDA, dtype=torch.bfloat16, **asked):
    choice = choose_attention(config, device, dtype, **asked)
    return choice.padding_free, choice.flattened


def test_rows_are_flattened_where_there_is_a_gpu(ampere, monkeypatch):
    llama = LlamaConfig()
    assert chosen(llama) == (True, VARLEN)
    assert chosen(llama, dtype=torch.float32) == (True, PER_SEQUENCE)
    assert chosen(LlamaConfig(head_dim=12)) == (True, PER_SEQUENCE)  # the kernel wants a multiple of 8
    assert chosen(llama, CPU, torch.float32) == (False, "auto")
    assert chosen(llama, padding_free=False) == (False, "auto")
    assert chosen(llama, CPU, torch.float32, padding_free=True) == (True, PER_SEQUENCE)
    assert chosen(llama, CPU, torch.float32, implementation=PER_SEQUENCE) == (True, PER_SEQUENCE)
    assert chosen(llama, implementation="sdpa") == (False, "auto")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert chosen(llama, dtype=torch.float16) == (True, PER_SEQUENCE)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (BloomConfig(), "would see each other"),
        (GptOssConfig(), "s_aux"),
        (Gemma2Config(), "softcap"),
        (Lfm2Config(), "refuses flattened rows"),
        (GPT2Config(), "attn_pdrop is 0.1"),
        (LlamaConfig(attention_dropout=0.1), "attention_dropout is 0.1"),
        (Qwen3Config(layer_types=["linear_attention"] * 32), "layers of kind linear_attention"),
        (LlamaConfig(auto_map={"AutoModelForCausalLM": "m--x"}), "not known to flatten exactly"),
    ],
)
def test_other_models_are_padded_and_one_line_says_why(config, why, ampere):
    choice = choose_attention(config, CUDA, torch.bfloat16)
    assert not choice.padding_free
    assert choice.note.startswith("rows are padded: ") and why in choice.note


def test_a_family_of_ones_own_is_padded():
    class OwnConfig(LlamaConfig):
        model_type = "own"

    assert why_padded(OwnConfig().to_dict()) == "own: not known to flatten exactly"


@pytest.mark.parametrize("asked", [None, True, False])
@pytest.mark.parametrize("implementation", ["auto", "sdpa", PER_SEQUENCE])
def test_the_planner_lays_rows_out_as_a_run_does(asked, implementation, ampere):
    """By what config.json says, which leaves defaults out."""
    for config in (
        LlamaConfig(),
        Gemma2Config(),
        GPT2Config(),
        GPT2Config(attn_pdrop=0.0),
        BloomConfig(),
        Lfm2Config(),
    ):
        for device, dtype in ((CUDA, torch.bfloat16), (CPU, torch.float32)):
            if implementation == PER_SEQUENCE and asked is False:
                continue  # refused
            run = choose_attention(config, device, dtype, padding_free=asked, implementation=implementation)
            family, why = config.model_type, why_padded(config.to_diff_dict() | {"model_type": config.model_type})
            on_cuda = device == CUDA
            assert flattens(asked, implementation, on_cuda=on_cuda, family=family, why=why) is run.padding_free


def test_soft_caps_flatten_under_masks_for_those_who_ask():
    choice = choose_attention(Gemma2Config(), CPU, torch.float32, padding_free=True)
    assert choice.padding_free and choice.flattened == "auto" and "mask over the whole row" in choice.note


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"implementation": VARLEN}, "varlen needs a GPU of compute capability 8.0.* got cpu in float32"),
        ({"implementation": "flash_attention_2"}, "needs a GPU"),
        ({"implementation": PER_SEQUENCE, "padding_free": False}, "got padding_free: false"),
        ({"implementation": "fast"}, "must be one of auto"),
    ],
)
def test_what_contradicts_itself_or_cannot_run_is_refused(asked, message):
    with pytest.raises(UserInputError, match=f"attn_implementation: .*{message}"):
        choose_attention(LlamaConfig(), CPU, torch.float32, **asked)


# The families that people train, and one of every kind of refusal; `python -m scripts.probe_flattening` does them all.
FLATTEN = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "opt", "gpt_neox", "mixtral", "deepseek_v3")
PADDED = ("bloom", "mpt", "gemma2", "gpt_oss", "mamba", "recurrent_gemma", "bamba", "qwen3_5_text", "lfm2")


@pytest.mark.parametrize("family", [*FLATTEN, *PADDED])
def test_the_list_is_what_the_probe_finds(family):
    ours, theirs = verdict(family)
    assert (not ours) is (family in FLATTEN) is (family in probed()["flattens"])
    assert probed()["padded"].get(family, "") == ours
    assert (not theirs) is (family in probed()["kept_apart_by_masks"])


def test_no_family_is_on_both_lists_and_all_are_transformers():
    found = probed()
    assert not set(found["flattens"]) & set(found["padded"])
    assert len(found["flattens"]) > 70 and len(found["padded"]) > 50
    assert {*found["flattens"], *found["padded"]} <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
