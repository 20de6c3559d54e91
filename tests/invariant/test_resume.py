"""Invariant 5: a run stopped at any step, in any way, and resumed is bit for bit the run that was never stopped."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from tiny import adapter_weights, losses, mixed_rows, tiny_trainer

from qlora_neft.errors import UserInputError
from qlora_neft.run_folder.checkpoints import find_checkpoints
from qlora_neft.run_folder.stop import StopRequest
from qlora_neft.steps.batch import StepBatch
from qlora_neft.trainer.when_to_save import WhenToSave

ROWS, HELD_OUT = mixed_rows(22, seed=5), mixed_rows(6, seed=6)  # steps of 8: the third of an epoch is incomplete
STEPS = 8  # two epochs and two thirds
RUN = {"max_steps": STEPS, "lora_dropout": 0.2, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1}


def trainer_for(model, folder, **overrides):
    return tiny_trainer(model, folder, ROWS, **{**RUN, **overrides})


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def never_stopped(llama, tmp_path_factory):
    trainer = trainer_for(llama, tmp_path_factory.mktemp("whole"))
    trainer.train()
    return adapter_weights(trainer), losses(trainer)


def stopped_after(model, folder, step, **overrides):
    """Train until someone asks to stop during a step, as a signal would."""
    stop = StopRequest(grace_seconds=600)
    trainer = trainer_for(model, folder, **overrides)
    trainer.add_callback(WhenToSave(stop=stop))
    take = trainer.training_step

    def training_step(*args, **kwargs):
        if trainer.state.global_step == step - 1 and not stop.requested:
            stop.request(signal.SIGTERM)
        return take(*args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    assert trainer.state.global_step == step
    return trainer


# The first, one in the middle and the last are enough for every change; the others for a release.
@pytest.mark.parametrize(
    "step",
    [step if step in (1, 4, STEPS - 1) else pytest.param(step, marks=pytest.mark.slow) for step in range(1, STEPS)],
)
def test_stopped_after_any_step(llama, tmp_path, never_stopped, step):
    stopped_after(llama, tmp_path, step)
    assert find_checkpoints(tmp_path).newest.step == step
    torch.manual_seed(999)  # the next process may begin with any state
    resumed = trainer_for(llama, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert same_bits(adapter_weights(resumed), never_stopped[0])
    assert losses(resumed) == never_stopped[1]  # the log before the stop is in the checkpoint
    assert resumed.state.global_step == STEPS


def test_stopped_after_the_last_step_and_before_the_end(llama, tmp_path, never_stopped):
    trainer_for(llama, tmp_path, save_steps=4).train()
    assert find_checkpoints(tmp_path).newest.step == STEPS
    resumed = trainer_for(llama, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS  # upstream would take one step more
    assert same_bits(adapter_weights(resumed), never_stopped[0])
    assert losses(resumed) == never_stopped[1] and resumed.tokens_seen > 0


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_without_the_random_states(llama, tmp_path, never_stopped, damage):
    stopped_after(llama, tmp_path, 4)
    states = tmp_path / "checkpoint-4" / "rng_state.pth"
    assert states.exists()
    states.unlink()
    if damage == "damaged":
        states.write_bytes(b"PK\x03\x04 not a zip file")
    assert find_checkpoints(tmp_path).newest.step == 4
    resumed = trainer_for(llama, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert same_bits(adapter_weights(resumed), never_stopped[0])


@pytest.mark.parametrize(
    "machine",
    [
        {"eval_dataset": HELD_OUT, "eval_strategy": "steps", "eval_steps": 2},
        {"logging_steps": 5, "save_steps": 1},
        {"dataloader_num_workers": 1},
        {"clean_loss_steps": 2},
    ],
    ids=["evaluation on", "other cadences", "a data worker", "clean losses"],
)
def test_resumed_by_a_run_that_is_carried_out_otherwise(llama, tmp_path, never_stopped, machine):
    stopped_after(llama, tmp_path, 5)
    resumed = trainer_for(llama, tmp_path, **machine)
    resumed.train(resume_from_checkpoint=True)
    assert same_bits(adapter_weights(resumed), never_stopped[0])
    if "save_steps" in machine:
        assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == ["checkpoint-7", "checkpoint-8"]


def test_resumed_with_other_micro_batches(llama, tmp_path):
    whole = trainer_for(llama, tmp_path / "whole")
    whole.train()
    stopped_after(llama, tmp_path / "out", 5)
    resumed = trainer_for(llama, tmp_path / "out", micro_batch_size=1)
    resumed.train(resume_from_checkpoint=True)
    for name, weight in adapter_weights(whole).items():
        torch.testing.assert_close(adapter_weights(resumed)[name], weight, rtol=0, atol=1e-6)


def test_a_step_that_takes_too_long_is_given_up_and_taken_again(llama, tmp_path, never_stopped):
    stop = StopRequest(grace_seconds=0)  # every step takes too long
    trainer = trainer_for(llama, tmp_path, micro_batch_size=3)
    trainer.stop = stop
    trainer.add_callback(WhenToSave(stop=stop))
    seen = []

    def say_when(event):
        seen.append(event)
        if len(seen) == 5:  # within the second step
            stop.request(signal.SIGINT)

    original = trainer.randomness

    def randomness(micro, first_ordinal, index, number):
        say_when(index)
        return original(micro, first_ordinal, index, number)

    trainer.randomness = randomness
    trainer.train()
    assert trainer.state.global_step == 1 and find_checkpoints(tmp_path).newest.step == 1
    assert all(param.grad is None for param in trainer.model.parameters())
    resumed = trainer_for(llama, tmp_path, micro_batch_size=3)
    resumed.train(resume_from_checkpoint=True)
    whole = trainer_for(llama, tmp_path / "whole", micro_batch_size=3)
    whole.train()
    assert same_bits(adapter_weights(resumed), adapter_weights(whole))


def test_a_second_signal_stops_at_once_and_the_last_checkpoint_is_sound(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_neft.run_folder.stop.TOGETHER_SECONDS", -1)  # as if time passed between the two
    stop = StopRequest(grace_seconds=600)
    trainer = trainer_for(llama, tmp_path)
    trainer.add_callback(WhenToSave(stop=stop))
    original = trainer._save_optimizer_and_scheduler

    def interrupted(folder):
        if trainer.state.global_step == 5:
            stop.request(signal.SIGINT)
            stop.request(signal.SIGINT)  # while the checkpoint is being written
        original(folder)

    trainer._save_optimizer_and_scheduler = interrupted
    trainer.args.save_steps = 5
    trainer.args.save_strategy = "steps"
    stopped = trainer_for(llama, tmp_path, max_steps=3)
    stopped.train()
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert find_checkpoints(tmp_path).newest.step == 3
    assert not [path for path in os.listdir(tmp_path) if path.startswith(".checkpoint")]


def test_a_damaged_checkpoint_is_left_out_for_the_one_before(llama, tmp_path, never_stopped):
    stopped_after(llama, tmp_path, 5)
    with (tmp_path / "checkpoint-5" / "optimizer.pt").open("r+b") as file:
        file.seek(2000)
        file.write(b"\0damage\0")
    found = find_checkpoints(tmp_path)
    assert found.newest.step == 3 and [path.name for path, _ in found.damaged] == ["checkpoint-5"]
    resumed = trainer_for(llama, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert same_bits(adapter_weights(resumed), never_stopped[0])


def test_a_checkpoint_that_is_not_there_is_refused(llama, tmp_path):
    with pytest.raises(UserInputError, match="holds no checkpoint"):
        trainer_for(llama, tmp_path).train(resume_from_checkpoint=True)


def test_an_adapter_of_another_shape_is_refused(llama, tmp_path):
    from tiny import tiny_lora

    stopped_after(llama, tmp_path, 3)
    other = trainer_for(llama, tmp_path, peft_config=tiny_lora(r=4))
    with pytest.raises(UserInputError, match="other layers or another rank"):
        other.train(resume_from_checkpoint=True)


def test_a_step_can_be_split_again_without_moving_a_sequence(llama, tmp_path):
    trainer = trainer_for(llama, tmp_path)
    step: StepBatch = next(iter(trainer.get_train_dataloader()))
    again = step.split_again(1, None)
    assert len(again) == 8 and again.num_trained_tokens() == step.num_trained_tokens()

    def ordinals(batch):
        return {
            span.ordinal: micro.inputs["input_ids"][span.row, span.tokens].tolist()
            for micro in batch
            for span in micro.spans
        }

    assert ordinals(again) == ordinals(step)


def test_the_number_format_may_change_between_sessions(llama, tmp_path, never_stopped):
    """fp16 keeps a gradient scaler in its checkpoint, which no other format has."""

    def in_fp16(trainer):
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # a power of two scales exactly
        return trainer

    def resumed(trainer):
        said = []
        trainer.say = said.append
        trainer.train(resume_from_checkpoint=True)
        return [line for line in said if "scaler" in line]

    in_fp16(trainer_for(llama, tmp_path, max_steps=3)).train()
    assert (tmp_path / "checkpoint-3" / "scaler.pt").exists()
    [line] = resumed(trainer_for(llama, tmp_path, max_steps=6))
    assert line == "the checkpoint was written in fp16; its gradient scaler is of no use here and is skipped"
    assert not (tmp_path / "checkpoint-6" / "scaler.pt").exists()
    last = in_fp16(trainer_for(llama, tmp_path, max_steps=7))
    [line] = resumed(last)
    assert line.startswith("the checkpoint was not written in fp16; a new gradient scaler")
    again = in_fp16(trainer_for(llama, tmp_path))
    assert resumed(again) == [] and again.state.global_step == STEPS
