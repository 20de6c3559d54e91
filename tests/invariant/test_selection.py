"""The best weights and early stopping: what decides is the recipe's, and an interruption changes nothing of it."""

from __future__ import annotations

import shutil
import signal

import pytest
import torch
from tiny import adapter_weights, losses, mixed_rows, tiny_trainer

from qlora_neft.files import sha256_of_file
from qlora_neft.run_folder.checkpoints import BEST, find_checkpoints, remove_leftovers, verify
from qlora_neft.run_folder.stop import StopRequest
from qlora_neft.trainer.selection import Judgements, Rule, interval
from qlora_neft.trainer.when_to_save import WhenToSave

ROWS, HELD_OUT = mixed_rows(8, seed=5), mixed_rows(5, seed=6)  # learned by heart, at the cost of the other rows
RUN = {"learning_rate": 1e-2, "neftune_noise_alpha": 0.5, "lora_dropout": 0.2, "logging_steps": 1}
SAVED = {"save_strategy": "steps", "save_steps": 3}
SELECTED = {"keep": "best", "early_stopping_patience": 2, "selection_steps": 2, "max_steps": 20}


def trainer_for(model, folder, **overrides):
    given = {"eval_dataset": HELD_OUT, **RUN, **SAVED, **SELECTED, **overrides}
    return tiny_trainer(model, folder, ROWS, **given)


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory):
    """A run that was never interrupted."""
    trainer = trainer_for(llama, tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


def assert_same_end(trainer, whole):
    assert trainer.judgements == whole.judgements and trainer.selected == whole.selected
    assert trainer.state.global_step == whole.state.global_step
    assert same_bits(adapter_weights(trainer), adapter_weights(whole))


def resumed(model, folder, **overrides):
    trainer = trainer_for(model, folder, **overrides)
    trainer.train(resume_from_checkpoint=True)
    return trainer


def test_it_ends_where_patience_does_with_the_weights_of_the_best_step(llama, tmp_path, whole):
    judged = {entry["step"]: entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry}
    best, last = whole.selected.step, whole.state.global_step
    assert 0 < best < last < 20 and best == min(judged, key=judged.__getitem__)
    assert last == best + 4 and whole.selected.stopped_early  # two judgements, two steps apart
    assert list(judged) == list(range(0, last + 1, 2))
    until_then = trainer_for(llama, tmp_path, keep="last", early_stopping_patience=None, max_steps=best)
    until_then.train()
    assert same_bits(adapter_weights(whole), adapter_weights(until_then))
    assert whole.held_out_loss() == pytest.approx(judged[best], abs=1e-6)


def stop_in(trainer, step):
    stop = StopRequest(grace_seconds=600)
    trainer.stop = stop
    trainer.add_callback(WhenToSave(stop=stop))
    take = trainer.training_step

    def training_step(*args, **kwargs):
        if trainer.state.global_step == step - 1 and not stop.requested:
            stop.request(signal.SIGTERM)
        return take(*args, **kwargs)

    trainer.training_step = training_step


# Just before a judgement, at the best step, at the last: there a checkpoint is written without one.
@pytest.mark.parametrize("before_the_end", [-1, 3, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 4, 5))])
def test_stopped_anywhere_and_resumed(llama, tmp_path, whole, before_the_end):
    step = whole.state.global_step - before_the_end if before_the_end >= 0 else 1
    trainer = trainer_for(llama, tmp_path)
    stop_in(trainer, step)
    trainer.train()
    assert trainer.state.global_step == step and not trainer.is_over
    found = resumed(llama, tmp_path)
    assert_same_end(found, whole)
    assert losses(found) == losses(whole)


class Killed(BaseException):
    """As if the process were gone."""


@pytest.mark.parametrize("where", ["after the best weights", "within them"])
def test_killed_between_the_best_weights_and_a_checkpoint(llama, tmp_path, whole, where, monkeypatch):
    best = whole.selected.step
    trainer = trainer_for(llama, tmp_path)
    keep = trainer._keep

    def killed():
        if trainer.state.global_step != best:
            return keep()
        if where == "within them":
            trainer._describe = lambda folder: (_ for _ in ()).throw(Killed)
        keep()
        raise Killed

    trainer._keep = killed
    with pytest.raises(Killed):
        trainer.train()
    assert find_checkpoints(tmp_path).newest.step < best
    remove_leftovers(tmp_path)
    assert_same_end(resumed(llama, tmp_path), whole)


def test_every_checkpoint_holds_the_best_weights(llama, tmp_path, whole):
    """So no rotation loses them, a folder that vanished does not matter, and a run may go on elsewhere."""
    trainer = trainer_for(llama, tmp_path / "a", save_total_limit=1, save_steps=1)
    stop_in(trainer, whole.state.global_step - 1)
    trainer.train()
    [checkpoint] = (tmp_path / "a").glob("checkpoint-[0-9]*")
    best = sha256_of_file(tmp_path / "a" / BEST / "adapter_model.safetensors")
    assert sha256_of_file(checkpoint / BEST / "adapter_model.safetensors") == best
    shutil.copytree(checkpoint, tmp_path / "b" / checkpoint.name)
    assert_same_end(resumed(llama, tmp_path / "b"), whole)
    # A checkpoint that lost them is not one to go on from.
    shutil.rmtree(checkpoint / BEST)
    assert any(BEST in problem for problem in verify(checkpoint))


def test_a_run_that_ended_early_is_over(llama, tmp_path, whole):
    folder = tmp_path / "out"
    shutil.copytree(whole.args.output_dir, folder)
    shutil.rmtree(folder / BEST)
    found = resumed(llama, folder)
    assert_same_end(found, whole)
    assert found.under_way.passes == 0  # no step was taken


def test_the_last_step_is_judged_after_its_checkpoint(llama, tmp_path):
    """A signal may cut the evaluation of the last step off; the resumed run makes up for it."""
    given = {"early_stopping_patience": None, "max_steps": 3, "learning_rate": 1e-3}
    whole = trainer_for(llama, tmp_path / "whole", **given)
    whole.train()
    assert whole.selected.step == 3 and not whole.selected.stopped_early
    trainer = trainer_for(llama, tmp_path / "out", **given)
    stop_in(trainer, 3)
    trainer.train()
    assert not trainer.is_over
    found = resumed(llama, tmp_path / "out", **given)
    assert_same_end(found, whole)
    assert found.under_way.passes == 0


@pytest.mark.parametrize(
    "machine",
    [
        {"eval_strategy": "steps", "eval_steps": 1},
        {"micro_batch_size": 3, "per_device_eval_batch_size": 2},
        {"padding_free": True, "gradient_checkpointing": True},
    ],
    ids=["evaluated more often", "other batches", "flattened"],
)
def test_the_machine_decides_nothing(llama, tmp_path, whole, machine):
    found = trainer_for(llama, tmp_path, **machine)
    found.train()
    assert found.selected.step == whole.selected.step and found.state.global_step == whole.state.global_step
    for name, weight in adapter_weights(whole).items():
        torch.testing.assert_close(adapter_weights(found)[name], weight, rtol=0, atol=1e-4)


def test_nothing_better_than_the_untrained_model(llama, tmp_path):
    trainer = trainer_for(llama, tmp_path, learning_rate=1e-7, early_stopping_patience=1)
    before = adapter_weights(trainer)
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.selected.step == 0
    assert same_bits(adapter_weights(trainer), before)
    assert any("no step was better" in line for line in trainer.selected.lines(2, 0.001))


def test_the_last_weights_may_be_kept_with_patience(llama, tmp_path, whole):
    trainer = trainer_for(llama, tmp_path, keep="last")
    trainer.train()
    assert trainer.judgements == whole.judgements and trainer.selected.step == trainer.state.global_step
    assert not (tmp_path / BEST).exists()
    assert not same_bits(adapter_weights(trainer), adapter_weights(whole))


def test_small_gains_add_up_and_ties_go_to_the_earlier_step():
    rule, judgements = Rule("best", 3, 1, 0.001), Judgements()
    verdicts = [judgements.judge(step, loss, rule) for step, loss in enumerate([2.0, 1.9995, 1.9991, 1.9989, 1.9989])]
    assert verdicts == [True, False, False, True, False]
    assert (judgements.best_step, judgements.best_loss) == (3, 1.9989) and not judgements.stopped


def test_a_loss_that_is_not_finite_is_no_improvement():
    rule, judgements = Rule("best", 2, 1, 0.0), Judgements()
    assert [judgements.judge(step, loss, rule) for step, loss in enumerate([float("nan"), 3.0, float("nan")])] == [
        True,
        True,
        False,
    ]
    judgements.judge(3, float("inf"), rule)
    assert judgements.stopped and judgements.best_step == 1 and judgements.judged_loss is None


@pytest.mark.parametrize(("every", "last", "expected"), [(0.1, 100, 10), (0.07, 100, 7), (0.1, 3, 1), (4, 3, 4)])
def test_a_share_of_all_steps(every, last, expected):
    assert interval(every, last) == expected
    rule = Rule("best", None, every, 0.0)
    assert rule.is_due(0, last) and rule.is_due(last, last)


def test_without_held_out_rows_it_is_refused(llama, tmp_path):
    with pytest.raises(ValueError, match="eval_dataset: keep='best'"):
        trainer_for(llama, tmp_path, eval_dataset=None)
