"""Gradients of the fused functions, layer by layer, against an unfused model in float64 with the same masks."""

from __future__ import annotations

import copy

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from tiny import ARCHITECTURES, tiny_trainer
from torch import nn

from qlora_neft.base.nf4 import from_nf4
from qlora_neft.fused import ops
from qlora_neft.fused.layers import FusedLinear, FusedMLP
from qlora_neft.fused.masks import Mask, keep_rate, threshold_of
from qlora_neft.steps.batch import MicroBatch
from qlora_neft.steps.sequences import SequenceSpan, find_sequences

IDS = torch.arange(3 * 11).view(3, 11) % 256
LENGTHS = (11, 7, 2)
TOLERANCE = 1e-5


class SameDropout(nn.Module):
    """The fused path's dropout as a plain product."""

    def __init__(self, trainer, number, p):
        super().__init__()
        self.trainer, self.number, self.threshold = [trainer], number, threshold_of(p)

    def forward(self, x):
        mask = Mask(self.trainer[0].under_way.places, self.number, self.threshold)
        kept = mask.kept(x.shape[-1], torch.float32, x.device).to(x.dtype)  # a copy
        return x * kept.view(x.shape) / keep_rate(self.threshold)


def trainer_of(model, folder, *, dropout=0.3, **arguments):
    """A trainer whose adapters are no longer zero."""
    trainer = tiny_trainer(model, folder, lora_dropout=dropout, **arguments)
    with torch.no_grad():
        for name, param in trainer.model.named_parameters():
            if "lora_B" in name:
                param.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    return trainer


def in_float64(trainer, dropout=0.3):
    """The same model as plain PEFT modules on dequantized weights."""
    model = copy.deepcopy(trainer.model)
    assert not any(isinstance(module, (FusedLinear, FusedMLP)) for module in model.modules())
    layers = sorted((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))
    for number, (_, layer) in enumerate(layers):
        base = layer.base_layer
        if isinstance(base, Linear4bit):
            plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
            plain.weight = nn.Parameter(from_nf4(base.weight), requires_grad=False)
            plain.bias = base.bias
            layer.base_layer = plain
        if dropout:
            layer.lora_dropout["default"] = SameDropout(trainer, number, dropout)
    return model.double().train()


def gradients(trainer, model):
    """Gradients by name of one micro-batch, padded."""
    mask = torch.stack([torch.arange(11) < length for length in LENGTHS]).long()
    inputs = {"input_ids": IDS, "attention_mask": mask}
    micro = MicroBatch(inputs, find_sequences(inputs))
    model.zero_grad()
    backbone = model.get_base_model().base_model  # above it TRL's head is tied to the model it was made for
    with trainer.randomness(micro, 5, 0, 0):
        hidden = backbone(**inputs, use_cache=False).last_hidden_state
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)) * mask[..., None]
        (hidden.double() * weights).sum().backward()
    return {name: param.grad.double() for name, param in model.named_parameters() if param.grad is not None}


def errors(found, expected):
    """Relative error of each layer's gradient."""
    assert found.keys() == expected.keys() and found
    return {name: ((found[name] - g).norm() / g.norm()).item() for name, g in expected.items()}


def dequantized_in_shared_memory(linear, dtype):
    """As on CUDA: every weight lies in the same memory, one after another."""
    weight = ops.ONE_KERNEL["dequantized"](linear, dtype)
    return ops.WEIGHTS.of(weight.shape, dtype, weight.device).copy_(weight)


@pytest.fixture
def shared_memory():
    ops.register("dequantized", "cpu", dequantized_in_shared_memory)
    yield
    ops.register("dequantized", "cpu", None)
    ops.WEIGHTS.clear()


CASES = [*((family, 0.3) for family in ARCHITECTURES), ("llama", 0.0), ("phi", 0.0)]


@pytest.mark.parametrize(("family", "dropout"), CASES)
def test_gradients_of_every_family(architecture_dir, tmp_path, family, dropout, shared_memory):
    trainer = trainer_of(architecture_dir(family), tmp_path, dropout=dropout, neftune_noise_alpha=None)
    assert not trainer.fast_path.not_fused
    expected = gradients(trainer, in_float64(trainer, dropout))
    found = gradients(trainer, trainer.model.train())
    assert max(errors(found, expected).values()) < TOLERANCE
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.model.enable_input_require_grads()
    again = gradients(trainer, trainer.model)
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_the_reference_would_notice_another_mask(llama, tmp_path):
    trainer = trainer_of(llama, tmp_path, neftune_noise_alpha=None)
    expected = gradients(trainer, in_float64(trainer))
    trainer.args.seed += 1
    assert min(errors(gradients(trainer, trainer.model.train()), expected).values()) > 0.01


def of_modules(trainer, model, dtype, *, autocast):
    """Outputs and gradients of an MLP and of a layer alone, on enough tokens for errors to average out."""
    block, found = model.get_base_model().model.layers[0], {}
    draw = torch.Generator().manual_seed(3)
    x, grad = (torch.randn(1, 512, 64, generator=draw).bfloat16().to(dtype) for _ in range(2))
    span = SequenceSpan(0, slice(0, 512), 512, 0)
    for name, module in {"mlp": block.mlp, "q": block.self_attn.q_proj}.items():
        leaf = x.clone().requires_grad_()
        model.zero_grad()
        with (
            trainer.under_way.of([span], (1, 512), 0, 0),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            y = module(leaf)
            y.backward(grad)
        found |= {f"{name}: output": y.detach().double(), f"{name}: input": leaf.grad.double()}
        found |= {f"{name}: {n}": p.grad.double() for n, p in module.named_parameters() if p.grad is not None}
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_in_bfloat16_no_worse_than_unfused(llama, tmp_path, dropout):
    error = {}
    for fused in (True, False):
        arguments = {"bf16": True, "fused_lora": fused, "neftune_noise_alpha": None}
        trainer = trainer_of(llama, tmp_path, dropout=dropout, **arguments)
        expected = of_modules(trainer, in_float64(trainer, dropout), torch.float64, autocast=False)
        found = of_modules(trainer, trainer.model.train(), torch.bfloat16, autocast=True)
        error[fused] = errors(found, expected)
    assert len(error[True]) == 12
    for name in error[True]:
        assert 0 < error[True][name] < 1.02 * error[False][name], name
