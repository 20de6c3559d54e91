"""Runs that are stopped, killed or lose their disk, as real processes. Each ends as if nothing had happened."""

from __future__ import annotations

import os
import pkgutil
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from command_line import (
    CUT_AT,
    EVAL_STEPS,
    SAVE_STEPS,
    STEPS,
    TRAIN,
    adapter,
    contents,
    copied,
    cut,
    cut_off,
    invoke,
    logged,
    make_workplace,
    never_stopped,
    process,
    refused,
    sound_steps,
    summary,
    until,
)
from forked import Forked, environment, quick_python, start_fork_server
from safetensors.torch import load_file
from tiny import max_difference

from qlora_neft import load_recipe
from qlora_neft.errors import RunInterrupted
from qlora_neft.run_folder.checkpoints import read_checkpoint
from qlora_neft.run_folder.mirror_mark import Mark
from qlora_neft.runner.run import run
from qlora_neft.trainer import QLoRANeftTrainer

OUT = Path("out")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
# Steps of five out of thirteen rows: neither number is divisible by two processes.
UNEVEN = ("train.effective_batch_size=5", "lora.lora_dropout=0", "train.max_steps=20")


@pytest.fixture
def whole(llama):
    """The folder of the run that was never stopped."""
    start_fork_server()  # ahead of time: its imports run on the other core
    return never_stopped(llama)


@pytest.fixture
def workplace(tmp_path, llama, monkeypatch):
    """A current directory with recipe and data."""
    monkeypatch.chdir(make_workplace(tmp_path, llama))
    return tmp_path


def table(stdout: str) -> list[str]:
    """Return the lines of the table of losses before and after."""
    return [line for line in stdout.splitlines() if "(nats per token)" in line]


# ---- Signals ----


def test_ctrl_c_stops_with_a_checkpoint_and_the_printed_command_goes_on(workplace, whole):
    out = Path("a folder")  # its name has to be quoted in the command
    with process("train", "mine.yaml", "--output-dir", str(out)) as started:
        until(lambda: len(logged(out)) >= 9, started)
        for _ in range(2):  # as from a launcher that passes on what its child got as well
            started.send_signal(signal.SIGINT)
        stdout, stderr = started.communicate(timeout=60)
    assert (started.returncode, stdout.count("SIGINT: finishing this step")) == (130, 1)
    said = re.fullmatch(
        rf"interrupted: stopped after step (\d+) of {STEPS}; the checkpoint is written. To go on:\n  (.+)\n", stderr
    )
    step, command = int(said[1]), said[2]
    assert 9 <= step < STEPS
    assert sound_steps(out)[-1] == step == max(logged(out))
    assert not (out / "summary.json").exists() and not (out / "adapter_model.safetensors").exists()

    stdout = run_in_a_shell(command)
    assert f"going on from step {step}: {out / f'checkpoint-{step}'}" in stdout
    assert adapter(out) == adapter(whole)
    assert list(logged(out)) == list(range(1, STEPS + 1))
    assert logged(out) == logged(whole)
    held_out = logged(whole, "eval_loss")
    assert len(held_out) == 1 + STEPS // EVAL_STEPS + 1  # before, during, after
    assert logged(out, "eval_loss") == {at: loss for at, loss in held_out.items() if at != step or at % EVAL_STEPS}
    done, undisturbed = summary(out), summary(whole)
    assert (done["resumed_from_step"], undisturbed["resumed_from_step"]) == (step, None)
    for key in ("status", "steps", "tokens_seen", "trained_tokens_seen", "before", "after", "base_sha256"):
        assert done[key] == undisturbed[key], key
    assert table(stdout) == table((whole.parent / "stdout.txt").read_text()) != []


def test_a_run_whose_reader_is_gone_goes_on_and_saves_on_a_signal(workplace, whole):
    with process(*TRAIN) as started:
        assert started.stdout.readline()
        started.stdout.close()
        started.stderr.close()
        until(lambda: len(logged(OUT)) >= 9, started)
        started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 143
    assert len(sound_steps(OUT)) == 2 and sound_steps(OUT)[-1] == max(logged(OUT))
    [note] = (OUT / "notes.log").read_text().splitlines()
    assert "standard output cannot be written to any more (Broken pipe); what is printed from here on" in note
    assert invoke(*TRAIN)[0] == 0
    assert adapter(OUT) == adapter(whole)


STAGES = (  # where a signal comes, and the step of the checkpoint that is there then
    ("load_tokenizer", "SIGTERM", None),
    ("data_of", "SIGHUP", None),
    ("clean_train_loss", "SIGUSR1", None),
    ("evaluate", "SIGXCPU", SAVE_STEPS),
    ("clean loss in a log", "SIGTERM", 2 * EVAL_STEPS),
    ("the last evaluate", "SIGTERM", STEPS),
    ("held_out_loss", "SIGTERM", STEPS),
    ("greedy_answers", "SIGINT", STEPS),
)


def test_a_signal_at_any_stage_loses_nothing(workplace, whole, monkeypatch):
    recipe = load_recipe("mine.yaml", [f"machine.eval_steps={SAVE_STEPS}"])
    for stage, name, step in STAGES:
        with monkeypatch.context() as patches, pytest.raises(RunInterrupted) as stopped:
            run(recipe, OUT, quiet=True, trainer_class=signalled(patches, stage, getattr(signal, name)))
        assert stopped.value.signal == getattr(signal, name)
        said = "before a step was taken; nothing was trained yet" if step is None else "the checkpoint is written"
        assert said in str(stopped.value) and ("only the measurement is left" in str(stopped.value)) == (step == STEPS)
        assert (sound_steps(OUT)[-1:] or [None]) == [step], stage
    assert invoke(*TRAIN)[0] == 0
    assert summary(OUT)["resumed_from_step"] == STEPS
    assert adapter(OUT) == adapter(whole) and logged(OUT) == logged(whole)
    assert summary(OUT)["after"] == summary(whole)["after"]


def signalled(patches: pytest.MonkeyPatch, stage: str, number: int) -> type[QLoRANeftTrainer]:
    """Arrange that a signal comes in a stage of a run: in a function of the runner, or of the trainer returned."""

    def with_signal(function):
        def called(*args, **kwargs):
            signal.raise_signal(number)
            return function(*args, **kwargs)

        return called

    class Signalled(QLoRANeftTrainer):
        def evaluate(self, *args, **kwargs):
            if stage == ("the last evaluate" if self.state.global_step == STEPS else "evaluate"):
                signal.raise_signal(number)
            return super().evaluate(*args, **kwargs)

        def clean_train_loss(self):
            if stage == ("clean loss in a log" if self.state.global_step == 2 * EVAL_STEPS else "clean_train_loss"):
                signal.raise_signal(number)
            return super().clean_train_loss()

        def held_out_loss(self):
            if stage == "held_out_loss" and self.state.global_step:
                signal.raise_signal(number)
            return super().held_out_loss()

    for module, name in (("run", "load_tokenizer"), ("run", "data_of"), ("measure", "greedy_answers")):
        if name == stage:
            target = f"qlora_neft.runner.{module}.{name}"
            patches.setattr(target, with_signal(pkgutil.resolve_name(f"qlora_neft.runner.{module}:{name}")))
    return Signalled


def run_in_a_shell(command: str) -> str:
    """Run exactly what a user would paste, with ``qlora-neft`` on the path."""
    Path("bin").mkdir()
    Path("bin/qlora-neft").write_text(f'#!/bin/sh\nexec {shlex.quote(quick_python())} -m qlora_neft "$@"\n')
    Path("bin/qlora-neft").chmod(0o755)
    path = os.pathsep.join([str(Path("bin").absolute()), os.environ["PATH"]])
    done = subprocess.run(["sh", "-c", command], env=environment(PATH=path), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_second_signal_ends_the_process_at_once(workplace, whole, monkeypatch):
    monkeypatch.setattr("qlora_neft.run_folder.stop.TOGETHER_SECONDS", -1)  # as if time passed between the two

    class SignalledTwice(QLoRANeftTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == CUT_AT:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGTERM)
            return super().training_step(*args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        run(load_recipe("mine.yaml"), OUT, quiet=True, trainer_class=SignalledTwice)
    assert sound_steps(OUT)[-1] == 2 * SAVE_STEPS  # no checkpoint was made for the signal
    assert invoke(*TRAIN)[0] == 0
    assert adapter(OUT) == adapter(whole)


def test_a_step_that_takes_longer_than_the_time_left_is_given_up(workplace, whole):
    cut(OUT, "machine.grace_seconds=1e-9")
    assert sound_steps(OUT)[-1] == CUT_AT - 1
    assert invoke(*TRAIN)[0] == 0
    assert summary(OUT)["resumed_from_step"] == CUT_AT - 1
    assert adapter(OUT) == adapter(whole) and logged(OUT) == logged(whole)


# ---- kill -9 ----


def test_killed_again_and_again(workplace, whole):
    draw = random.Random(5)
    reached = 0
    for attempt in range(4):
        with Forked(*TRAIN) as started:
            reached += draw.randint(3, 9)
            until(lambda wanted=reached: max(logged(OUT), default=0) >= wanted, started)
            if attempt % 2:  # in the middle of writing a checkpoint
                until(lambda: any(OUT.glob(".checkpoint-*.partial-*")), started)
            started.send_signals(signal.SIGKILL)
            assert started.ended()[0] == -signal.SIGKILL
        steps = sound_steps(OUT)
        assert not (OUT / "summary.json").exists()
        reached = steps[-1] if steps else 0
    assert reached >= 2 * SAVE_STEPS
    assert invoke(*TRAIN)[0] == 0
    assert summary(OUT)["resumed_from_step"] == reached
    assert adapter(OUT) == adapter(whole)
    assert logged(OUT) == logged(whole) and logged(OUT, "eval_loss") == logged(whole, "eval_loss")
    assert not [path for path in OUT.iterdir() if path.name.startswith(".")]  # lock and leftovers are gone


def test_two_writers_and_the_lock_of_a_killed_one(workplace, whole):
    with Forked(*TRAIN) as first:
        until(lambda: len(logged(OUT)) >= 2, first)
        first.send_signals(signal.SIGSTOP)  # it must not end before the second one has read its data
        code, _, stderr = invoke(*TRAIN)
        first.send_signals(signal.SIGCONT)
        assert code == 2
        assert f"another run (process {first.pid} on " in stderr and "is writing there" in stderr
        until(lambda: len(logged(OUT)) >= 7, first)  # it was not affected
        first.send_signals(signal.SIGKILL)
        assert first.ended()[0] == -signal.SIGKILL
    assert (OUT / ".run.lock").exists()
    assert invoke(*TRAIN)[0] == 0
    assert adapter(OUT) == adapter(whole) and logged(OUT) == logged(whole)


# ---- The mirror ----


def test_a_mirror_brings_back_a_run_whose_folder_is_gone(workplace, whole):
    command = (*TRAIN, "machine.mirror_dir=drive/mirror")
    mirror = Path("drive/mirror")
    with Forked(*command) as started:
        until(lambda: any(mirror.glob("checkpoint-*")) and max(logged(OUT)) > SAVE_STEPS + 2, started)
        started.send_signals(signal.SIGKILL)
        started.ended()
    shutil.rmtree(OUT)
    step = sound_steps(mirror)[-1]
    code, stdout, _ = invoke(*command)
    assert (code, f"restored from the mirror drive/mirror: checkpoint of step {step}" in stdout) == (0, True)
    assert summary(OUT)["resumed_from_step"] == step
    assert adapter(OUT) == adapter(whole) and logged(OUT) == logged(whole)
    for path in OUT.iterdir():
        assert path.is_dir() or (mirror / path.name).read_bytes() == path.read_bytes(), path
    assert sound_steps(mirror) == [STEPS]

    shutil.rmtree(OUT)  # once more, after the end
    code, stdout, _ = invoke(*command)
    assert (code, "this run is finished" in stdout) == (0, True)
    assert adapter(OUT) == adapter(whole)


def test_a_mirror_of_another_run_is_refused_and_nothing_restored(workplace, llama):
    copied(cut_off(llama) / "out", Path("drive"))
    Mark(Path("drive"), {}).write()
    message = refused(*TRAIN, "machine.mirror_dir=drive", "train.seed=4")
    assert message.startswith("machine.mirror_dir: 'drive' holds a run that learns something else:\n  train.seed: 3")


# ---- Two processes ----


def test_two_processes_learn_what_one_does_and_take_over_from_each_other(workplace):
    write_rows(13)
    assert invoke("train", "mine.yaml", "--output-dir", "one", *UNEVEN)[0] == 0
    arguments = ("train", "mine.yaml", "--output-dir", "two", *UNEVEN)
    with socket.create_server(("127.0.0.1", 0)) as server:  # as torchrun does, but with access to its children
        variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    with Forked(*arguments, RANK="0", **variables) as first, Forked(*arguments, RANK="1", **variables) as second:
        until(lambda: len(logged("two")) >= 6, first)
        second.send_signals(signal.SIGTERM)  # the first learns of it from the second
        ends = [rank.ended() for rank in (first, second)]
    step = sound_steps("two")[-1]
    assert all((code, f"stopped after step {step} of 20" in said) == (143, True) for code, said in ends)
    assert 6 <= step < 20 and not Path("two/summary.json").exists()

    assert invoke(*arguments)[0] == 0  # one process finishes what two began
    assert_same_run("two", "one")
    assert summary("two")["resumed_from_step"] == step

    cut(Path("three"), *UNEVEN, step=14)  # two processes finish what one began
    with process("train", "mine.yaml", "--output-dir", "three", *UNEVEN, launcher=TORCHRUN) as started:
        stdout, stderr = started.communicate(timeout=90)
    assert started.returncode == 0, stderr[-3000:]
    assert stdout.count("adapter, recipe, metrics and summary: three/") == 1
    assert_same_run("three", "one")
    assert summary("three")["resumed_from_step"] == 14


def assert_same_run(output_dir: str, other: str) -> None:
    names = ("adapter_model.safetensors", "metrics.jsonl", "summary.json", "loss.png", "tokenizer.json")
    assert all(Path(output_dir, name).exists() for name in names)
    weights = [load_file(Path(folder, "adapter_model.safetensors")) for folder in (output_dir, other)]
    assert max_difference(*weights) < 1e-5
    assert logged(output_dir) == pytest.approx(logged(other), abs=1e-4)
    # Equal to 1e-4: every step had the same thirteen rows, none twice, for one more row moves the loss by far more.
    assert max(logged(other).values()) - min(logged(other).values()) > 0.01
    for key in ("before", "after"):
        assert summary(output_dir)[key] == pytest.approx(summary(other)[key], abs=1e-4)


def write_rows(count: int) -> None:
    lines = Path("train.jsonl").read_text().splitlines(keepends=True)
    Path("train.jsonl").write_text("".join(lines[:count]))


# ---- What is in a checkpoint ----


def test_a_checkpoint_holds_the_recipe_and_no_secret(workplace, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_neverwritethis")
    cut(OUT)
    files = {name for name in contents(OUT) if name.startswith(f"checkpoint-{CUT_AT}/")}
    assert {path.split("/")[1] for path in files} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        "optimizer.pt",
        "progress.json",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
    }
    for path in OUT.rglob("*"):
        assert path.is_dir() or b"neverwritethis" not in path.read_bytes(), path
    assert read_checkpoint(OUT / f"checkpoint-{CUT_AT}").about["recipe"] == load_recipe("mine.yaml").to_dict()
