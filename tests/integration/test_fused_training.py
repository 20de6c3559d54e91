"""The fused path in training: one trajectory with dropout on, and ordinary PEFT modules wherever one looks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear4bit
from tiny import (
    adapter_weights,
    gradient_norms,
    losses,
    max_difference,
    mixed_rows,
    rows_of_lengths,
    save_tiny_model,
    tiny_lora,
    tiny_trainer,
)
from torch import nn

from qlora_neft.base.unpack import Linear4bitByBlocks
from qlora_neft.fused.layers import FusedLinear, FusedMLP, Swapped

ROWS = mixed_rows(48)
WHOLE = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "lora_dropout": 0.2}


def trained(model, folder, rows=ROWS, **overrides):
    trainer = tiny_trainer(model, folder, rows, **{**WHOLE, **overrides})
    trainer.train()
    return trainer


def assert_one_trajectory(a, b, tolerance=5e-6):
    assert losses(a) == pytest.approx(losses(b), rel=tolerance)
    assert gradient_norms(a) == pytest.approx(gradient_norms(b), rel=10 * tolerance)


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory):
    return trained(llama, tmp_path_factory.mktemp("whole"))


WAYS = {
    "in fours": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "one by one": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16},
    "padded wider": {"pad_to_multiple_of": 32},
    "flattened": {"padding_free": True},
    "recomputed": {"gradient_checkpointing": True},
    "recomputed, the old way": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "one block recomputed": {"checkpointed_blocks": 1},
    "unfused": {"fused_lora": False},
    "unfused, one by one": {
        "fused_lora": False,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 16,
    },
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_one_trajectory_with_dropout(llama, tmp_path, whole, way):
    assert_one_trajectory(whole, trained(llama, tmp_path, **way))


def test_padding_on_the_left_changes_no_mask(llama, tmp_path, whole):
    def on_the_left(rows):
        width = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": 256, "labels": -100, "attention_mask": 0}
        columns = {name: [] for name in fill}
        for row in rows:
            filled = {**row, "attention_mask": [1] * len(row["input_ids"])}
            for name, value in fill.items():
                columns[name].append([value] * (width - len(filled[name])) + list(filled[name]))
        return {name: torch.tensor(values) for name, values in columns.items()}

    assert_one_trajectory(whole, trained(llama, tmp_path, data_collator=on_the_left), tolerance=2e-5)
    # The first token of a row has a label here, which nothing before it predicts.
    short = rows_of_lengths([2, 2, 9, 17])
    few = {"rows": short, "per_device_train_batch_size": 4, "max_steps": 2}
    both = [trained(llama, tmp_path, **few, data_collator=collator) for collator in (None, on_the_left)]
    assert_one_trajectory(*both, tolerance=2e-5)


OF_THE_BASE = {"phi": {"resid_pdrop": 0.2, "embd_pdrop": 0.2}, "gpt-neox": {"hidden_dropout": 0.2}}


@pytest.mark.parametrize("family", OF_THE_BASE)
def test_dropout_modules_of_the_base_are_keyed_too(tmp_path, family):
    """Phi uses one module twice in a block."""
    base = save_tiny_model(tmp_path / "base", family, **OF_THE_BASE[family])
    whole, *others = (
        trained(base, tmp_path, max_steps=2, **way)
        for way in ({}, {"padding_free": True}, WAYS["in fours"], WAYS["recomputed"])
    )
    assert whole.fast_path.dropout_line() is None
    for other in others:
        assert_one_trajectory(whole, other)
    drawn = (
        whole.model.get_base_model()
        .base_model.layers[0]
        .get_submodule("resid_dropout" if family == "phi" else "post_mlp_dropout")
    )
    assert drawn.fused.number - drawn.fused.first == (2 if family == "phi" else 1)
    whole.fast_path.uninstall()
    assert type(drawn) is nn.Dropout
    assert not whole.model.get_base_model().base_model.layers[0]._forward_pre_hooks


def test_dropout_by_functions_of_the_base_is_said(tmp_path):
    lines = []
    trainer = tiny_trainer(save_tiny_model(tmp_path / "base", "opt", dropout=0.2), tmp_path, max_steps=1)
    trainer.say = lines.append
    trainer.train()
    assert [line for line in lines if "the base drops out by functions of its own (dropout 0.2)" in line]


def test_dropout_is_on(llama, tmp_path, whole):
    """The tests above would pass without any."""
    assert gradient_norms(whole)[0] != pytest.approx(
        gradient_norms(trained(llama, tmp_path, lora_dropout=0.0))[0], rel=1e-3
    )


@pytest.mark.parametrize("family", ["opt", "gemma3", "phi3"])
def test_families_train_as_unfused(architecture_dir, tmp_path, family):
    both = [
        trained(
            architecture_dir(family), tmp_path, max_steps=2, lora_dropout=0.1, fused_lora=fused, rows=mixed_rows(32)
        )
        for fused in (True, False)
    ]
    assert both[0].fast_path.num_fused > 0 and both[1].fast_path.num_fused == 0
    assert_one_trajectory(*both)


def test_layers_that_read_one_input_are_computed_together(whole):
    mlps = [module for module in whole.model.modules() if isinstance(module, FusedMLP)]
    assert len(mlps) == 2
    assert not any(group.is_alone for group in whole.fast_path._groups)
    assert not any(group._outputs for group in whole.fast_path._groups)


# ---- Ordinary modules ----


def test_the_model_is_what_peft_made(whole):
    layer = whole.model.get_base_model().model.layers[0].self_attn.q_proj
    assert isinstance(layer, FusedLinear) and isinstance(layer, Linear4bit)
    assert type(layer).__name__ == "Linear4bit" and repr(layer).startswith("lora.Linear4bit")
    assert not any("fused" in name for name in whole.model.state_dict())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_is_of_upstreams_classes(whole, how):
    block = whole.model.get_base_model().model.layers[0].mlp
    again = how(block)
    # But for layers whose weights bitsandbytes cannot unpack on a CPU.
    assert {type(m).__module__.partition(".")[0] for m in again.modules() if not isinstance(m, Linear4bitByBlocks)} <= {
        "torch",
        "peft",
        "transformers",
        "bitsandbytes",
    }
    assert type(again.gate_proj) is Linear4bit and type(again.gate_proj.lora_dropout["default"]) is nn.Dropout
    x = torch.randn(1, 3, 64)
    assert torch.equal(again.eval()(x), block.eval()(x))


def test_outside_of_a_training_step_modules_are_upstreams(llama, tmp_path):
    trainer = tiny_trainer(llama, tmp_path, lora_dropout=0.5)
    block = trainer.model.get_base_model().model.layers[0].mlp.train()
    x = torch.randn(1, 3, 64)
    torch.manual_seed(0)
    first, second = block(x), block(x)
    assert torch.equal(first, second)  # B is zero, so that dropout shows only in the gradients
    grads = []
    for _ in range(2):
        block.zero_grad()
        block(x).sum().backward()
        grads.append(block.down_proj.lora_B["default"].weight.grad.clone())
    assert not torch.equal(*grads)  # torch's own dropout, drawn anew


def test_uninstalling_leaves_nothing(llama, tmp_path):
    trainer = tiny_trainer(llama, tmp_path, lora_dropout=0.5)
    trainer.fast_path.uninstall()
    trainer.pieces.uninstall()
    assert not any(isinstance(module, Swapped) for module in trainer.model.modules())
    assert trainer.fast_path._end_micro_batch not in trainer.under_way.at_end


def test_a_saved_adapter_loads_and_trains_on(llama, tmp_path, whole):
    whole.model.save_pretrained(tmp_path / "adapter")
    other = tiny_trainer(llama, tmp_path, ROWS, **WHOLE)
    base = other.model.unload()
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    found = {n: p for n, p in loaded.named_parameters() if p.requires_grad}
    assert max_difference({n: p.detach() for n, p in found.items()}, adapter_weights(whole)) == 0


# ---- What is not covered ----


def test_layers_with_dora_keep_pefts_path_and_a_line_says_so(llama, tmp_path):
    lines = []
    trainer = tiny_trainer(llama, tmp_path, peft_config=tiny_lora(use_dora=True, lora_dropout=0.2), max_steps=1)
    trainer.say = lines.append
    trainer.train()
    assert trainer.fast_path.num_fused == 0
    assert [line for line in lines if "fused LoRA" in line and "14 layers: Dora" in line]


def test_adapters_on_some_layers_only(llama, tmp_path):
    some = {"peft_config": tiny_lora(target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.2)}
    overrides = {name: value for name, value in WHOLE.items() if name != "lora_dropout"}
    both = [tiny_trainer(llama, tmp_path, ROWS, **overrides, **some, fused_lora=fused) for fused in (True, False)]
    for trainer in both:
        trainer.train()
    assert_one_trajectory(*both)


def test_two_active_adapters_are_left_to_peft(llama, tmp_path):
    trainer = tiny_trainer(llama, tmp_path, lora_dropout=0.0)
    trainer.model.add_adapter("other", tiny_lora())
    trainer.model.base_model.set_adapter(["default", "other"])
    trainer.fast_path.install()
    assert set(trainer.fast_path.not_fused.values()) == {"several adapters are active"}


def test_layers_whose_inputs_differ_are_computed_alone(llama, tmp_path):
    """A group that turns out to be none gives right results at once, and stops after the micro-batch."""
    trainer = tiny_trainer(llama, tmp_path, rows_of_lengths([5] * 8), lora_dropout=0.0)
    attention = trainer.model.get_base_model().model.layers[0].self_attn.train()
    x, y = torch.randn(1, 5, 64), torch.randn(1, 5, 64)
    expected = attention.q_proj(x), attention.k_proj(y)
    with trainer.under_way.of(None, (1, 5), 0, 0):
        assert torch.allclose(attention.q_proj(x), expected[0], atol=1e-6)
        assert torch.allclose(attention.k_proj(y), expected[1], atol=1e-6)
        assert not attention.q_proj.fused.group.is_alone
    assert attention.q_proj.fused.group.is_alone and attention.q_proj.fused.group._input is None
