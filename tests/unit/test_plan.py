"""What the machine decides: steps, micro-batches, checkpointing, the optimizer's states."""

from __future__ import annotations

import math

import pytest
import torch

from qlora_neft.errors import UserInputError
from qlora_neft.fit.choose import CPU_TOKENS
from qlora_neft.recipe.schema import Machine, Train
from qlora_neft.runner.plan import NEED_CUDA, SMALL_GPU_BYTES, TOKENS_PER_MICRO_BATCH, plan_run

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


TRAIN = {
    "effective_batch_size": 16,
    "num_train_epochs": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch",
    "max_grad_norm": 1.0,
    "seed": 0,
}


def plan(num_rows=100, device=CPU, **keys):
    """The plan of a run whose train and machine sections state some keys."""
    train = {name: value for name, value in keys.items() if name in Train.model_fields}
    machine = {name: value for name, value in keys.items() if name not in train}
    return plan_run(Train(**TRAIN | train), Machine(**machine), num_rows=num_rows, device=device)


@pytest.fixture
def gpu(monkeypatch):
    """Say how much memory the only GPU has."""

    class Properties:
        total_memory = 80 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    return Properties


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "steps"),
    [
        (100, 16, 1, 7),  # six full steps and one of 4 rows
        (96, 16, 1, 6),
        (3, 16, 1, 1),
        (100, 16, 3, 21),  # the last step of each pass is short: rows are not carried over
        (100, 10, 0.25, 3),  # two and a half steps
        (100, 10, 1.1, 11),  # 11.000000000000002 in binary
        (100, 10, 0.7, 7),
        (1, 1, 1e-9, 1),
        (52_002, 16, 1, 3251),
    ],
)
def test_steps_are_whole_batches_rounded_up(rows, batch, epochs, steps):
    assert plan(num_rows=rows, effective_batch_size=batch, num_train_epochs=epochs).num_steps == steps


@pytest.mark.parametrize(("limit", "steps"), [(None, 7), (3, 3), (7, 7), (1000, 7)])
def test_max_steps_only_ever_shortens_a_run(limit, steps):
    assert plan(max_steps=limit).num_steps == steps


def test_every_auto_is_filled_in():
    chosen = plan(num_rows=16_000)
    assert chosen.num_steps == 1000
    assert (chosen.logging_steps, chosen.eval_steps, chosen.clean_loss_steps) == (1000 // 50, 1000 // 5, 1000 // 5)
    assert chosen.per_device_train_batch_size == 16
    assert chosen.max_tokens_per_micro_batch == CPU_TOKENS
    assert chosen.per_device_eval_batch_size == 8
    assert (chosen.activation_checkpointing, chosen.checkpointed_blocks, chosen.padding_free) == (False, None, False)
    assert chosen.fused_lora


@pytest.mark.parametrize("steps", range(1, 12))
def test_a_short_run_is_logged_and_evaluated_too(steps):
    chosen = plan(max_steps=steps, num_rows=1000)
    assert chosen.num_steps == steps
    assert 1 <= chosen.logging_steps <= steps
    assert 1 <= chosen.eval_steps <= steps
    assert math.ceil(steps / chosen.eval_steps) <= 5


def test_what_is_asked_for_is_what_is_done():
    wanted = {
        "per_device_train_batch_size": 4,
        "max_tokens_per_micro_batch": 999,
        "per_device_eval_batch_size": 3,
        "logging_steps": 7,
        "eval_steps": 5,
        "clean_loss_steps": 0,
        "padding_free": True,
        "fused_lora": False,
        "fused_norms": False,
        "fused_rotary": False,
        "use_triton_kernels": False,
        "use_liger_kernel": False,
        "activation_offloading": False,
        "torch_compile": True,
    }
    chosen = plan(**wanted)
    assert {name: getattr(chosen, name) for name in wanted} == wanted


def test_kernels_are_left_to_the_trainer_which_knows_the_model():
    chosen = plan(device=GPU, per_device_train_batch_size=4)
    assert chosen.fused_norms and not chosen.activation_offloading and not chosen.torch_compile
    assert (chosen.use_triton_kernels, chosen.use_liger_kernel) == (None, None)
    asked = plan(device=GPU, per_device_train_batch_size=4, activation_offloading=True, use_triton_kernels=True)
    assert asked.activation_offloading and asked.use_triton_kernels


def test_what_needs_a_gpu_is_refused_on_a_cpu_all_at_once():
    with pytest.raises(UserInputError) as error:
        plan(use_liger_kernel=True, use_triton_kernels=True, activation_offloading=True)
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [f"machine.{key}" for key in NEED_CUDA]
    assert all("CUDA" in line and "got true. Use auto." in line for line in lines)


def test_a_micro_batch_is_no_larger_than_the_step():
    assert plan(per_device_train_batch_size=64).per_device_train_batch_size == 16


def test_rows_asked_for_bring_no_limit_on_tokens():
    assert plan(per_device_train_batch_size=4).max_tokens_per_micro_batch is None


def test_a_small_gpu_gets_smaller_micro_batches(gpu):
    assert plan(device=GPU).max_tokens_per_micro_batch == TOKENS_PER_MICRO_BATCH
    gpu.total_memory = SMALL_GPU_BYTES - 1
    assert plan(device=GPU).max_tokens_per_micro_batch == TOKENS_PER_MICRO_BATCH // 4


@pytest.mark.parametrize(
    ("wanted", "on", "blocks"), [(True, True, None), (False, False, None), (0, False, 0), (1, True, 1), (12, True, 12)]
)
def test_checkpointing_by_word_or_by_number_of_blocks(wanted, on, blocks):
    chosen = plan(activation_checkpointing=wanted)
    assert (chosen.activation_checkpointing, chosen.checkpointed_blocks) == (on, blocks)


def test_checkpointing_is_on_where_there_is_gpu_memory_to_save(gpu):
    assert plan(device=GPU).activation_checkpointing
    assert not plan(device=CPU).activation_checkpointing


@pytest.mark.parametrize(
    ("wanted", "on_cpu"),
    [
        ("paged_adamw_32bit", "adamw_torch"),
        ("paged_adamw_8bit", "adamw_8bit"),
        ("adamw_8bit", "adamw_8bit"),
        ("adamw_torch", "adamw_torch"),
    ],
)
def test_paged_states_only_where_there_is_a_gpu_to_page_from(gpu, wanted, on_cpu):
    assert plan(optim=wanted, device=GPU).optim == wanted
    chosen = plan(optim=wanted, device=CPU)
    assert chosen.optim == on_cpu
    assert any("optimizer" in note for note in chosen.notes) == (wanted != on_cpu)


def test_every_choice_of_the_machine_is_explained_and_no_other():
    notes = plan(optim="paged_adamw_32bit").notes
    assert [note.split(":")[0] for note in notes] == ["micro-batches", "activation checkpointing", "optimizer"]
    assert plan(per_device_train_batch_size=4, activation_checkpointing=False).notes == ()
