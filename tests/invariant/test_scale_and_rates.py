"""`use_rslora` changes the scale of the update and nothing else; `loraplus_lr_ratio` the rate of B and nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from tiny import adapter_weights, losses, mixed_rows, tiny_lora, tiny_trainer
from transformers import AutoModelForCausalLM

from qlora_neft.base.lora import lora_config
from qlora_neft.recipe.model import Lora
from qlora_neft.trainer import QLoRANeftConfig
from qlora_neft.trainer.loraplus import loraplus_optimizer

ROWS = mixed_rows(16, seed=5)
STEP = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
OPTIMIZERS = ("adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit")


def trained(model, folder, **overrides):
    trainer = tiny_trainer(model, folder, ROWS, **{**STEP, **overrides})
    trainer.train()
    return trainer


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_two_spellings_of_one_scale_are_one_run(llama, tmp_path):
    plain = lora_config(Lora(r=4, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear"))
    stable = lora_config(Lora(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", use_rslora=True))
    one, other = (trained(llama, tmp_path, peft_config=config) for config in (plain, stable))
    assert losses(one) == losses(other) and same_bits(adapter_weights(one), adapter_weights(other))
    unscaled = trained(llama, tmp_path, peft_config=tiny_lora(r=4, lora_alpha=8, lora_dropout=0.1))
    assert losses(unscaled) != losses(one)


@pytest.mark.parametrize("fused", [True, False])
def test_a_layer_adds_b_a_times_alpha_over_the_root_of_r(llama, tmp_path, fused):
    trainer = tiny_trainer(llama, tmp_path, ROWS, peft_config=tiny_lora(r=8, use_rslora=True), fused_lora=fused)
    trainer.fast_path.install()
    layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(2, 5, a.shape[1], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        b.normal_(std=0.1)
        added = layer(x) - layer.base_layer(x)
    assert torch.allclose(added, 16 / math.sqrt(8) * (x @ a.T @ b.T), rtol=1e-4, atol=1e-5)


def test_bs_first_step_is_the_ratio_times_as_long_and_as_is_the_same(llama, tmp_path):
    # B begins at random too, so that A has a gradient in the first step; Adam's first step has the length of the rate.
    given = {"peft_config": tiny_lora(init_lora_weights=False), "max_steps": 1}
    before = adapter_weights(tiny_trainer(llama, tmp_path, ROWS, **given))
    plain = adapter_weights(trained(llama, tmp_path, **given))
    faster = adapter_weights(trained(llama, tmp_path, loraplus_lr_ratio=16, **given))
    names = [name for name in before if "lora_B" in name]
    assert len(names) == 14 and len(before) == 28
    for name, old in before.items():
        if name not in names:
            assert torch.equal(plain[name], faster[name]) and not torch.equal(plain[name], old)
            continue
        moved = plain[name] - old
        assert moved.abs().max() == pytest.approx(1e-3, rel=1e-3)
        assert torch.allclose(faster[name] - old, 16 * moved, atol=1e-6)


def test_from_zero_the_ratio_is_exact_and_a_ratio_of_one_is_none(llama, tmp_path):
    plain, four, one = (
        adapter_weights(trained(llama, tmp_path, max_steps=1, loraplus_lr_ratio=ratio)) for ratio in (None, 4, 1)
    )
    assert same_bits(plain, one)
    assert all(torch.equal(four[name], (4 if "lora_B" in name else 1) * plain[name]) for name in plain)
    assert any(tensor.abs().max() > 0 for name, tensor in plain.items() if "lora_B" in name)


def created(trainer, optim, ratio):
    trainer.args.optim, trainer.args.loraplus_lr_ratio = optim, ratio
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.create_optimizer_and_scheduler(4)
    return trainer.optimizer, trainer.lr_scheduler


def test_class_constants_decay_and_schedule_are_upstreams(llama, tmp_path):
    given = {"weight_decay": 0.1, "adam_beta2": 0.99, "lr_scheduler_type": "linear", "max_steps": 4}
    trainer = tiny_trainer(llama, tmp_path, ROWS, **STEP, **given)
    for optim in OPTIMIZERS:
        plain, _ = created(trainer, optim, None)
        faster, scheduler = created(trainer, optim, 8)
        assert type(faster) is type(plain)
        if optim != "adamw_torch":  # bitsandbytes: whether states are paged, and their bits
            assert faster.is_paged == plain.is_paged == ("paged" in optim)
            assert vars(faster.args) == vars(plain.args) and plain.args.optim_bits == (8 if "8bit" in optim else 32)
        [upstreams] = [group for group in plain.param_groups if group["params"]]
        groups = [group for group in faster.param_groups if group["params"]]
        assert [group["lr"] for group in groups] == [1e-3, 8e-3]
        assert sum(len(group["params"]) for group in groups) == len(upstreams["params"]) == 28
        others = {key: value for key, value in upstreams.items() if key not in ("params", "lr", "initial_lr")}
        assert all({**group, **others} == group for group in groups) and others["weight_decay"] == 0.1
        assert {rate * scheduler.lr_lambdas[0](2) for rate in scheduler.base_lrs if rate > 1e-3} == {4e-3}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_resumed_is_never_stopped(llama, tmp_path, optim):
    given = {"loraplus_lr_ratio": 4, "lr_scheduler_type": "cosine", "optim": optim, "max_steps": 4, "weight_decay": 0.1}
    whole = trained(llama, tmp_path / "whole", **given)
    saved = {"save_strategy": "steps", "save_steps": 2}
    folder = tmp_path / "stopped"
    trained(llama, folder, **given, **saved)
    (folder / "checkpoint-4").rename(folder / "later")
    resumed = tiny_trainer(llama, folder, ROWS, **STEP, **given, **saved)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole) and same_bits(adapter_weights(resumed), adapter_weights(whole))


@pytest.mark.parametrize("ratio", [0.5, 0, -1, math.nan, math.inf])
def test_a_ratio_that_is_none_is_refused(tmp_path, ratio):
    with pytest.raises(ValueError, match="loraplus_lr_ratio: must be a finite number >= 1"):
        QLoRANeftConfig(str(tmp_path), loraplus_lr_ratio=ratio, use_cpu=True, bf16=False)


def test_without_lora_it_is_refused(llama, tmp_path):
    prompts = PromptTuningConfig(num_virtual_tokens=2, task_type=TaskType.CAUSAL_LM)
    with pytest.raises(ValueError, match="loraplus_lr_ratio: has no effect without LoRA, got 4"):
        tiny_trainer(llama, tmp_path, ROWS, peft_config=prompts, loraplus_lr_ratio=4)


def test_both_matrices_of_an_embedding_learn_at_the_rate(llama):
    """PEFT's own default for them is 1e-6, whatever the rate."""
    config = tiny_lora(target_modules=["embed_tokens", "q_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config)
    options = {"ratio": 4, "weight_decay": 0.0}
    optimizer = loraplus_optimizer(model, torch.optim.AdamW, {"lr": 1e-3}, **options)
    groups = [(group["lr"], len(group["params"])) for group in optimizer.param_groups if group["params"]]
    assert groups == [(1e-3, 2), (1e-3, 2), (4e-3, 2)]  # A, the embedding's A and B, B
    with pytest.raises(ValueError, match="loraplus_lr_ratio: cannot be combined with an optim that groups"):
        loraplus_optimizer(model, torch.optim.AdamW, {"lr": 1e-3, "params": []}, **options)
