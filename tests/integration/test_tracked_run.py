"""Trackers beside a run: the same run with them, told numbers and the published recipe, gone on with by a resume."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
import sqlite3
import threading
from pathlib import Path

import pytest
from test_run import adapter_of, metrics_of, recipe_for
from transformers import TrainerCallback

from qlora_neft.errors import RunInterrupted
from qlora_neft.run_folder.record import RunFile
from qlora_neft.runner.run import run
from qlora_neft.runner.trackers import ready, tracking
from qlora_neft.trainer import QLoRANeftTrainer

STEPS, CUT_AT = 3, 2
TOKEN = "hf_" + "s3cret" * 5
WITHOUT = ("machine.eval_answers=0", "machine.logging_steps=1")


class Notes(TrainerCallback):
    """A tracker that writes down what it is told."""

    def __init__(self):
        self.told = []
        told_to.append(self)

    def begin(self, run, state):
        self.run, self.begun_at = run, state.global_step
        return "nowhere"

    def ids(self):
        return {"id": self.run.known.get("id") or f"first of {self.run.name}"}

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.told.append((state.global_step, dict(logs)))
        logs["loss"] = "spoiled"  # nobody else may see it

    def end(self, how):
        self.how = how


class Failing(Notes):
    """One that fails where it is told to, and fails to end as well."""

    where = "begin"

    def begin(self, run, state):
        self.fail("begin")
        return super().begin(run, state)

    def ids(self):
        self.fail("ids")
        return super().ids()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.global_step == CUT_AT:
            self.fail("log")

    def on_save(self, args, state, control, **kwargs):
        self.fail("save")

    def end(self, how):
        self.fail(self.where)

    def fail(self, where):
        if where == self.where:
            print("a line on stdout")
            raise RuntimeError(f"no {where} to https://tracker.example\nsecond line")


class FailingIds(Failing):
    where = "ids"


class FailingLog(Failing):
    where = "log"


class FailingSave(Failing):
    where = "save"


class Unsending(Notes):
    """One whose thread says at every log that it could not send, as MLflow's does."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs, **kwargs)
        said = "Run Id 1: Failed to log run data: Exception: API request failed: Connection refused"
        thread = threading.Thread(target=logging.getLogger(tracking.SENDER[1]).error, args=(said,))
        thread.start()
        thread.join()


class StoppedAtTwo(QLoRANeftTrainer):
    """A trainer that gets a signal in its second step."""

    def training_step(self, *args, **kwargs):
        if self.state.global_step == CUT_AT - 1:
            signal.raise_signal(signal.SIGTERM)
        return super().training_step(*args, **kwargs)


told_to: list[Notes] = []


@pytest.fixture
def trackers(monkeypatch):
    """Trackers of our own under known names; those that were begun."""
    told_to.clear()
    monkeypatch.setattr(ready, "is_installed", lambda tracker: True)
    ours = {"trackio": Notes, "tensorboard": Failing, "wandb": FailingSave, "mlflow": FailingLog}
    monkeypatch.setattr(tracking, "CALLBACKS", ours)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return told_to


@pytest.fixture(scope="module")
def untracked(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("untracked")
    run(recipe_for(llama, folder, *WITHOUT), folder / "out", quiet=True)
    return folder / "out"


def losses_of(out):
    """Of every step, and the last held-out loss; the one at the step of a signal is left out by the run itself."""
    entries = metrics_of(out)
    held_out = [entry["eval_loss"] for entry in entries if "eval_loss" in entry]
    return [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry], held_out[-1]


def same_run(out, other):
    return adapter_of(out) == adapter_of(other) and losses_of(out) == losses_of(other)


def private_in(text):
    """What of this machine and of the rows stands in a text."""
    own = [TOKEN, str(Path.home()) + "/", str(Path.cwd()), "Repeat ", "loudly"]
    return [word for word in own if word in text] + re.findall(rf"\b{re.escape(socket.gethostname())}\b", text)


def test_a_tracked_run_is_the_same_run_and_tells_no_more_than_it_publishes(llama, tmp_path, untracked, trackers):
    recipe_for(llama, tmp_path)
    shutil.copy(tmp_path / "held.jsonl", tmp_path / f"{TOKEN}.jsonl")
    own = (f"machine.mirror_dir={tmp_path}/copy", f"data.eval_path={tmp_path}/{TOKEN}.jsonl")
    recipe = recipe_for(llama, tmp_path, *WITHOUT, "machine.report_to=[trackio]", *own)
    run(recipe, tmp_path / "out", quiet=True, group="arms")
    assert same_run(tmp_path / "out", untracked)
    [notes] = trackers
    logged = [(entry.pop("step"), entry) for entry in metrics_of(tmp_path / "out")]
    assert sorted({step for step, _ in notes.told}) == [0, 1, 2, 3]
    told = {(step, key): value for step, logs in notes.told for key, value in logs.items()}
    assert all(told[step, key] == value for step, entry in logged for key, value in entry.items() if key != "epoch")
    assert (notes.run.name, notes.run.group, notes.run.step, notes.how) == ("out", "arms", None, "done")
    config = notes.run.told.to_dict()
    assert (config["train.learning_rate"], config["data.path"], config["plan.num_steps"]) == (
        1e-3,
        "train.jsonl",
        STEPS,
    )
    assert (config["model.name_or_path"], config["data.eval_path"]) == (llama.name, "(withheld)")
    assert "versions.torch" in config
    assert not {"machine.mirror_dir", "machine.push_to", "machine.report_to"} & set(config)
    text = json.dumps([config, notes.told]) + notes.run.told.to_json_string()
    assert private_in(text) == [] and str(tmp_path) not in text
    assert not hasattr(notes.run.weights, "config")
    assert "first of out" not in (tmp_path / "out" / "run.json").read_text()


def test_a_tracker_that_fails_is_dropped_with_one_line(llama, tmp_path, untracked, trackers, capsys):
    names = "machine.report_to=[tensorboard, wandb, mlflow, trackio]"
    run(recipe_for(llama, tmp_path, *WITHOUT, names), tmp_path / "out")
    stdout = capsys.readouterr().out
    lines = [line for line in stdout.splitlines() if line.endswith("Training goes on without it.")]
    assert [line.split()[0] for line in lines] == ["tensorboard", "mlflow", "wandb"]
    for line, where in zip(lines, ("begin", "log", "save"), strict=True):
        assert f"(RuntimeError: no {where} to https://tracker.example)" in line
    assert "a line on stdout" not in stdout
    assert same_run(tmp_path / "out", untracked)
    [notes] = [tracker for tracker in trackers if type(tracker) is Notes]
    assert notes.how == "done" and notes.told[-1][0] == STEPS


def test_what_cannot_be_sent_is_said_once_and_still_tried(llama, tmp_path, trackers, capfd, monkeypatch):
    monkeypatch.setitem(tracking.CALLBACKS, "mlflow", Unsending)
    run(recipe_for(llama, tmp_path, *WITHOUT, "machine.report_to=mlflow"), tmp_path / "out")
    out, err = capfd.readouterr()
    [line] = [line for line in (out + err).splitlines() if "refused" in line]
    assert line.startswith("mlflow cannot send what is logged (API request failed: Connection refused).")
    [notes] = trackers
    assert notes.how == "done" and notes.told[-1][0] == STEPS


def test_a_resume_goes_on_with_the_same_tracked_run(llama, tmp_path, untracked, trackers):
    recipe = recipe_for(llama, tmp_path, *WITHOUT, "machine.report_to=trackio")
    with pytest.raises(RunInterrupted):
        run(recipe, tmp_path / "out", quiet=True, trainer_class=StoppedAtTwo)
    run(recipe, tmp_path / "out", quiet=True)
    first, second = trackers
    assert (first.how, second.how, second.run.step) == ("stopped", "done", CUT_AT)
    assert second.run.known == {"id": "first of out"} and {step for step, _ in second.told} == {STEPS}
    assert same_run(tmp_path / "out", untracked)


def test_without_its_record_a_resume_goes_on(llama, tmp_path, untracked, trackers, capsys, monkeypatch):
    recipe = recipe_for(llama, tmp_path, *WITHOUT, "machine.report_to=trackio")
    with pytest.raises(RunInterrupted):
        run(recipe, tmp_path / "out", quiet=True, trainer_class=StoppedAtTwo)
    (tmp_path / "out" / "trackers.json").write_text("{")
    monkeypatch.setitem(tracking.CALLBACKS, "tensorboard", FailingIds)
    recipe = recipe_for(llama, tmp_path, *WITHOUT, "machine.report_to=[tensorboard, trackio]")
    run(recipe, tmp_path / "out")
    stdout = capsys.readouterr().out
    assert stdout.count("trackers.json cannot be read: new tracked runs begin") == 1
    assert stdout.count("tensorboard cannot tell its run (RuntimeError") == 1
    assert list(json.loads((tmp_path / "out" / "trackers.json").read_text())) == ["trackio"]
    assert trackers[-1].run.known == {} and same_run(tmp_path / "out", untracked)


# ---- The real ones ----


def tensorboard_steps(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "out" / "tensorboard")).Reload()
    config = found.Tensors("args/text_summary")[0].tensor_proto.string_val[0].decode()
    return [point.step for point in found.Scalars("train/loss")], config


def trackio_steps(folder):
    with sqlite3.connect(folder / "trackio" / "qlora-neft.db") as store:
        rows = store.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
        [(config,)] = store.execute("SELECT config FROM configs").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    return [step for _, step, logs in rows if "train/loss" in json.loads(logs)], str(config)


def wandb_steps(folder):
    """From the bytes of the two sessions' files: wandb has no reader for them."""
    sessions = sorted((folder / "out" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(sessions) == 2 and sessions[0].name == sessions[1].name  # one id
    content = b"".join(path.read_bytes() for path in sessions)
    entries = re.findall(rb"train/loss.{2,40}?train/|train/global_step.{1,8}?(\d+)", content, re.DOTALL)
    return sorted({int(step) for step in entries if step and int(step)}), content.decode(errors="replace")


def mlflow_steps(folder):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'out' / 'mlflow' / 'mlflow.db'}")
    [found] = client.search_runs([client.get_experiment_by_name("qlora-neft").experiment_id])
    assert found.info.status == "FINISHED" and found.info.run_name == "out"
    text = json.dumps([found.data.params, found.data.tags])
    return [metric.step for metric in client.get_metric_history(found.info.run_id, "loss")], text


def without_service():
    """The environment but for what wandb tells its child processes as long as the process lives."""
    return {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}


@pytest.fixture(scope="module")
def trackio_store(tmp_path_factory):
    """trackio reads the place of its store as it is imported."""
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patches:
        patches.setenv("TRACKIO_DIR", str(folder / "trackio"))
        yield folder


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio", "wandb", "mlflow"])
def test_a_real_tracker_has_one_run_of_both_sessions(tracker, llama, tmp_path, untracked, monkeypatch, trackio_store):
    pytest.importorskip(tracker, reason=f"{tracker} is not installed: pip install 'qlora-neft[{tracker}]'")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_MODE", "offline")
    before = without_service()
    recipe = recipe_for(llama, tmp_path, *WITHOUT, f"machine.report_to={tracker}")
    with pytest.raises(RunInterrupted):
        run(recipe, tmp_path / "out", quiet=True, trainer_class=StoppedAtTwo)
    run(recipe, tmp_path / "out", quiet=True)
    assert same_run(tmp_path / "out", untracked) and without_service() == before
    reader = {
        "tensorboard": tensorboard_steps,
        "trackio": trackio_steps,
        "wandb": wandb_steps,
        "mlflow": mlflow_steps,
    }[tracker]
    steps, told = reader(trackio_store if tracker == "trackio" else tmp_path)
    assert steps == [1, 2, 3] and "learning_rate" in told
    assert private_in(told) == [] and str(tmp_path) not in told
    assert RunFile.model_validate_json((tmp_path / "out" / "run.json").read_text())
