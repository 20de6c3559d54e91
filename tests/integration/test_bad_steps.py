"""What can go wrong in one step, and costs at most that step: out of memory, a loss or gradient that is not finite."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from tiny import adapter_weights, losses, max_difference, mixed_rows, tiny_trainer

from qlora_neft.errors import RunFailed
from qlora_neft.trainer.memory import Split

ROWS = mixed_rows(24, seed=8).add_column("row", [100 + n for n in range(24)])
RUN = {"max_steps": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}


def trainer_for(model, folder, **overrides):
    return tiny_trainer(model, folder, ROWS, **{**RUN, **overrides})


def with_room_for(trainer, rows, *, after=0, error=torch.OutOfMemoryError):
    """Let the forward pass fail, as a full GPU does, on more than so many rows; from a number of calls on."""
    forward, calls = trainer.compute_loss, []

    def compute_loss(model, inputs, *args, **kwargs):
        calls.append(len(inputs["input_ids"]))
        if len(inputs["input_ids"]) > rows and len(calls) > after and model.training:
            raise error("CUDA out of memory. Tried to allocate 9.00 GiB.")
        return forward(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    return calls


# ---- Out of memory ----


@pytest.mark.parametrize(
    ("room", "after", "start"),
    [(4, 0, 8), (2, 0, 8), (1, 0, 8), (3, 2, 8), (2, 1, 4)],  # the last fails in a step's second part
)
def test_a_step_that_does_not_fit_is_split_and_taken_again(llama, tmp_path, room, after, start):
    whole = trainer_for(llama, tmp_path / "whole", max_tokens_per_micro_batch=10_000)
    whole.train()
    trainer = trainer_for(llama, tmp_path / "small", max_tokens_per_micro_batch=10_000, micro_batch_size=start)
    said = []
    trainer.say = said.append
    calls = with_room_for(trainer, room, after=after)
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(whole), abs=1e-5)  # effective batch, noise and loss are the same
    assert max_difference(adapter_weights(trainer), adapter_weights(whole)) < 1e-5
    assert (trainer.tokens_seen, trainer.state.global_step) == (whole.tokens_seen, 4)
    assert trainer.split.rows <= room and trainer.split.is_smaller
    assert said and all("out of memory with" in line and "the same" in line for line in said)
    assert all(count <= room for count in calls[-8:])


def test_the_cpus_allocator_is_understood_as_well(llama, tmp_path):
    trainer = trainer_for(llama, tmp_path, max_tokens_per_micro_batch=10_000)
    trainer.say = lambda line: None
    calls = []
    forward = trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return forward(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.split.rows == 4


def test_one_sequence_that_does_not_fit_fails_with_a_plan(llama, tmp_path):
    trainer = trainer_for(llama, tmp_path)
    trainer.say = lambda line: None
    with_room_for(trainer, 0)
    with pytest.raises(RunFailed) as caught:
        trainer.train()
    message = str(caught.value)
    assert "one sequence of" in message and "CUDA out of memory" in message
    for remedy in ("machine.activation_checkpointing=true", "data.max_length", "lora.r"):
        assert remedy in message


def test_another_error_is_not_taken_for_a_full_memory(llama, tmp_path):
    trainer = trainer_for(llama, tmp_path)
    with_room_for(trainer, 0, error=lambda _: RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trainer.train()


def test_the_smaller_split_is_kept_for_a_resume(llama, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_tokens_per_micro_batch": 10_000}
    trainer = trainer_for(llama, tmp_path, **options)
    trainer.say = lambda line: None
    with_room_for(trainer, 2)
    trainer.train()
    resumed = trainer_for(llama, tmp_path, **options)
    calls = with_room_for(resumed, 8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.split == trainer.split and max(calls) <= 2


def test_half_of_what_did_not_fit():
    assert Split(16).half_of(9, 900) == Split(4, None, is_smaller=True)
    assert Split(16, 4096).half_of(9, 900) == Split(4, 450, is_smaller=True)
    assert Split(4, 450).at_most(8, 100) == Split(4, 100, is_smaller=True)
    assert str(Split(1, 450)) == "micro-batches of at most 1 sequence and 450 tokens"


# ---- Not finite ----


def with_bad_steps(trainer, steps, value=math.nan, *, gradient=False):
    """Let the loss (or the gradient alone) of some steps be no number."""
    take = trainer.training_step

    def training_step(model, inputs, num_items=None):
        loss = take(model, inputs, num_items)
        if trainer.state.global_step in steps:
            param = next(param for param in model.parameters() if param.grad is not None)
            param.grad.view(-1)[0] = value
            if not gradient:
                trainer._loss_is_finite = False
        return loss

    trainer.training_step = training_step


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("gradient", [False, True])
def test_a_step_that_is_not_finite_is_skipped_and_counted(llama, tmp_path, value, gradient):
    trainer = trainer_for(llama, tmp_path)
    said, weights = [], []
    trainer.say = said.append
    with_bad_steps(trainer, {1}, value, gradient=gradient)
    before = trainer.training_step

    def training_step(*args, **kwargs):
        weights.append(adapter_weights(trainer))
        return before(*args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    assert trainer.bad_steps == 1 and trainer.state.global_step == 4
    assert max_difference(weights[1], weights[2]) == 0  # the second step moved nothing
    assert max_difference(weights[2], weights[3]) > 0
    assert all(torch.isfinite(weight).all() for weight in adapter_weights(trainer).values())
    what = "gradient" if gradient else "loss"
    assert said == [f"step 2: the {what} is not finite; the step is skipped"]


def test_too_many_in_a_row_stop_the_run_and_name_the_rows(llama, tmp_path):
    trainer = trainer_for(llama, tmp_path, max_bad_steps=2)
    trainer.say = lambda line: None
    with_bad_steps(trainer, {0, 2, 3})
    with pytest.raises(RunFailed) as caught:
        trainer.train()
    message = str(caught.value)
    assert "was not finite in 2 steps in a row, the last being step 4" in message
    named = {int(n) for n in message.split("(rows ")[1].split(" of the")[0].split(", ")}
    assert len(named) == 8 and named == set(trainer.rows_of_step(3)) and min(named) >= 100
    assert trainer.bad_steps == 3


def test_the_rows_of_a_step_are_those_it_took(llama, tmp_path):
    trainer = trainer_for(llama, tmp_path)
    taken = []
    take = trainer.training_step

    def training_step(model, inputs, num_items=None):
        taken.append(sorted(tuple(row["input_ids"]) for row in inputs.rows))
        return take(model, inputs, num_items)

    trainer.training_step = training_step
    trainer.train()
    by_number = {row["row"]: tuple(row["input_ids"]) for row in ROWS}
    for step in range(4):
        assert sorted(by_number[number] for number in trainer.rows_of_step(step)) == taken[step]


def test_a_real_overflow_is_noticed(llama, tmp_path):
    """No stand-in: a learning rate that throws the weights away gives a loss that is no number."""
    rows = Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in ROWS])
    trainer = tiny_trainer(llama, tmp_path, rows, **{**RUN, "max_steps": 12}, learning_rate=1e30, max_grad_norm=0.0)
    trainer.say = lambda line: None
    trainer.args.max_bad_steps = 3
    with pytest.raises(RunFailed, match="not finite in 3 steps in a row"):
        trainer.train()
