"""Rotary embeddings in few passes: attention modules that compute what transformers' do, recognized by a trial."""

import copy
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from qlora_neft.fused.layers import Swapped, own_class
from qlora_neft.fused.rotary import FusedAttention, install_rotary, rotate, uninstall_rotary

IDS = torch.arange(1, 23).view(2, 11)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
# Windows of some layers and of all, norms of heads, biases, soft caps, projections in one.
COVERED = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {**WINDOW, "use_sliding_window": True},
    "qwen3": {**WINDOW, "use_sliding_window": True},
    "phi3": {"head_dim": 8},
    "gemma2": {**WINDOW, "attn_implementation": "eager"},
    "gemma3_text": WINDOW,
    "granite": {"head_dim": 8, "attention_multiplier": 0.3},
}
# Neighbours turned together, norms of all heads at once, a part of a head.
OTHERS = {"cohere": {"head_dim": 8}, "olmo2": {"head_dim": 8}, "glm": {}}


def model_of(family, dtype=torch.float64, **keys):
    implementation = keys.pop("attn_implementation", "sdpa")
    config = AutoConfig.for_model(family, **{**SIZES, **keys})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # as made, they are all ones or zeros
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.train()


def logits_and_gradients(model, **inputs):
    model.zero_grad()
    logits = model(**{"input_ids": IDS, "use_cache": False, **inputs}).logits
    logits.square().sum().backward()
    return {"logits": logits.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


INPUTS = {
    "plain": {},
    "padded": {"attention_mask": (torch.arange(11) < torch.tensor([[11], [9]])).long()},  # less than a window
    "positions of each row": {"position_ids": torch.stack([torch.arange(11), torch.arange(11) % 6])},
}


@pytest.mark.parametrize("family", COVERED)
def test_outputs_and_gradients_are_upstreams(family):
    model = model_of(family, **COVERED[family])
    expected = {name: logits_and_gradients(model, **inputs) for name, inputs in INPUTS.items()}
    assert install_rotary(model) == 2
    near = 1e-6 if "gemma" in family else 1e-9  # whose norms are computed in float32
    for name, inputs in INPUTS.items():
        found = logits_and_gradients(model, **inputs)
        for key, wanted in expected[name].items():
            torch.testing.assert_close(found[key], wanted, rtol=near, atol=near * float(wanted.abs().max()))


@pytest.mark.parametrize("family", OTHERS)
def test_attention_of_another_form_is_left_alone(family):
    assert install_rotary(model_of(family, **OTHERS[family])) == 0


class Wrapped(torch.nn.Module):
    """A projection without a weight of its own, as Moshi's and Zaya's."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "o_proj"])
def test_projections_of_a_class_of_their_own_are_left_alone(part):
    model = model_of("llama")
    for layer in model.model.layers:
        setattr(layer.self_attn, part, Wrapped(getattr(layer.self_attn, part)))
    assert install_rotary(model) == 0


def test_layers_without_rotary_embeddings_are_left_alone():
    model = model_of("smollm3", no_rope_layers=[1, 0], no_rope_layer_interval=2)
    assert install_rotary(model) == 1
    assert [isinstance(layer.self_attn, FusedAttention) for layer in model.model.layers] == [True, False]


def test_evaluation_generation_and_caches_are_upstreams_bit_for_bit():
    model = model_of("llama", torch.float32).eval()

    def outputs():
        with torch.no_grad():
            generated = model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
            return generated, model(IDS, use_cache=False).logits, model.train()(IDS, use_cache=True).logits

    expected = outputs()
    install_rotary(model.eval())
    assert all(torch.equal(a, b) for a, b in zip(outputs(), expected, strict=True))


def test_the_trial_and_taking_back_leave_nothing():
    model = model_of("phi3", head_dim=8)
    attention, config = model.model.layers[0].self_attn.eval(), model.config.to_dict()
    own = type(attention)
    before = [set(vars(module)) for module in model.modules()]
    install_rotary(model)
    assert isinstance(attention, own) and type(attention).__name__ == "Phi3Attention" and own_class(attention) is own
    assert not attention.training and model.config._attn_implementation == "sdpa" and model.config.to_dict() == config
    uninstall_rotary(model)
    assert type(attention) is own and [set(vars(module)) for module in model.modules()] == before


@pytest.mark.parametrize("how", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_is_of_upstreams_class(how):
    model = model_of("llama")
    install_rotary(model)
    again = how(model.model.layers[0].self_attn)
    assert type(again) is LlamaAttention and not any(isinstance(module, Swapped) for module in again.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_at_half_precision_no_worse_than_upstream(dtype):
    draw = torch.Generator().manual_seed(0)
    q, k, grad = (torch.randn(2, 33, heads, 64, generator=draw).transpose(1, 2) for heads in (3, 3, 3))
    angles = torch.rand(1, 33, 32, generator=draw).mul(6.3).repeat(1, 1, 2)
    given = [x.to(dtype) for x in (q, k, angles.cos(), angles.sin())]

    def turned(function, dtype):
        q, k, cos, sin = (x.to(dtype, copy=True) for x in given)
        q.requires_grad_(), k.requires_grad_()
        out = function(q, k, cos, sin)
        torch.autograd.backward(out, [grad.to(given[0].dtype).to(dtype)] * 2)
        return torch.stack([x.detach().double() for x in (*out, q.grad, k.grad)])

    exact = turned(apply_rotary_pos_emb, torch.float64)
    ours, theirs = ((turned(f, dtype) - exact).norm() for f in (rotate, apply_rotary_pos_emb))
    assert 0 < ours <= theirs


def test_angles_in_float32_give_float32_as_upstream():
    q = torch.randn(1, 2, 3, 8, dtype=torch.bfloat16, requires_grad=True)
    cos, sin = torch.randn(2, 1, 3, 8)
    found, expected = rotate(q, q, cos, sin), apply_rotary_pos_emb(q, q, cos, sin)
    assert found[0].dtype == expected[0].dtype == torch.float32
    torch.testing.assert_close(found, expected)
    found[0].sum().backward()
    assert q.grad.dtype == torch.bfloat16
