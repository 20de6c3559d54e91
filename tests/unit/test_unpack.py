"""NF4 weights are unpacked as they were packed, whatever the number of inputs."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from qlora_neft.base.nf4 import from_nf4, keep_nf4_layout, to_nf4
from qlora_neft.base.unpack import Linear4bitByBlocks
from qlora_neft.fused.ops import dequantized

# Multiples of 64; others whose matrices are whole blocks, or not. (Odd widths take another path, which is right.)
SHAPES = [(64, 64), (6, 128), (64, 96), (64, 80), (3, 96), (5, 172), (1, 70)]


def reference(weight):
    """NF4 by its definition: blocks of 64 numbers in a row, each scaled by its largest, nearest of 16 codes."""
    code = bnb.functional.get_4bit_type("nf4", device="cpu")
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    scale = flat.abs().amax(1, keepdim=True)
    nearest = (flat / scale)[..., None].sub(code).abs().argmin(-1)
    return (code[nearest] * scale).flatten()[: weight.numel()].view(weight.shape)


def layer_of(shape, double_quant=False):
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(shape[1], shape[0], bias=True, compute_dtype=torch.float32)
    layer.weight = to_nf4(torch.randn(shape), double_quant)
    layer.compute_type_is_set = True
    return layer


@pytest.mark.parametrize("shape", SHAPES)
def test_unpacked_is_what_was_packed(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    found = from_nf4(to_nf4(weight, double_quant=False))
    assert torch.allclose(found, reference(weight), atol=1e-6)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_computes_with_it_in_evaluation_training_and_on_the_fast_path(shape, double_quant):
    layer = layer_of(shape, double_quant)
    keep_nf4_layout(layer)
    weight = from_nf4(layer.weight)
    x = torch.randn(2, 5, shape[1], requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, x @ weight.t() + layer.bias)
    grad = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad)[0], grad @ weight)
    torch.testing.assert_close(layer.eval()(x), y)
    torch.testing.assert_close(dequantized(layer, torch.float32), weight)


def test_only_layers_that_need_it_are_another_class_and_copies_stay_what_they_are():
    model = nn.ModuleList([layer_of((64, 64)), layer_of((64, 96))])
    keep_nf4_layout(model)
    assert [type(layer) for layer in model] == [bnb.nn.Linear4bit, Linear4bitByBlocks]
    x = torch.randn(3, 96)
    assert torch.equal(copy.deepcopy(model)[1](x), model[1](x))
