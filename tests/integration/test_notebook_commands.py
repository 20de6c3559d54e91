"""Verbs called from Python as notebooks call them: what is shown, what is raised, and an interrupted cell."""

import contextlib
import json
import logging
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from command_line import logged, make_workplace, sound_steps
from forked import environment, quick_python
from safetensors.numpy import save_file

from qlora_neft import command, output_of, train_live
from qlora_neft.errors import RunFailed, UserInputError
from qlora_neft.notebook import _runs_in_the_kernel as runs_in_the_kernel

pytest.importorskip("IPython", reason="IPython is not installed (pip install -e '.[notebooks]')")


@pytest.fixture(autouse=True)
def of_this_clone(monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.executable", quick_python())


def test_a_command_is_shown_and_what_it_says(capsys):
    assert json.loads(output_of("fit", "demo", "--vram", "t4", "lora.r=8", "--json"))["fits"] is True
    assert capsys.readouterr().out == ""
    command("diff", "llama2-7b-alpaca", "llama-30b-alpaca")
    said = capsys.readouterr().out
    assert said.startswith("$ qlora-neft diff llama2-7b-alpaca llama-30b-alpaca\n")
    assert "train.effective_batch_size" in said


def in_a_process(*words):
    done = subprocess.run(
        [sys.executable, "-m", "qlora_neft", *words],
        env={"COLUMNS": "120", **os.environ},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("ls",),
        ("show", "demo", "lora.r=4"),
        ("validate", "demo", "llama2-7b-alpaca"),
        ("fit", "llama-30b-alpaca", "--vram", "12GiB"),
        ("preview", "demo", "--rows", "1", "data.split=train[:32]"),
        ("noise", "demo", "data.split=train[:32]"),
        ("fit", "--nonsense"),
        ("validate", "demo", "lora.r=0"),
    ],
    ids=" ".join,
)
def test_a_verb_that_only_reads_runs_in_the_kernel_and_says_what_its_process_says(words, capsys, monkeypatch):
    code, stdout, stderr = in_a_process(*words)
    with monkeypatch.context() as patch:
        patch.setattr("subprocess.Popen", None)
        if code:
            with pytest.raises(UserInputError):
                output_of(*words)
            assert capsys.readouterr().out == stderr
        else:
            assert output_of(*words) == stdout
        with contextlib.suppress(UserInputError):
            command(*words)
    shown = capsys.readouterr()
    assert shown.out == f"$ qlora-neft {shlex.join(words)}\n{stdout}{stderr}" and shown.err == ""


def state():
    return (
        random.getstate()[1][:3],
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
        torch.get_num_threads(),
        os.getcwd(),
        dict(os.environ),
        list(warnings.filters),
        [(handler.stream, handler.level) for handler in stream_handlers()],
        transformers.logging.get_verbosity(),
        datasets.logging.get_verbosity(),
        datasets.utils.is_progress_bar_enabled(),
        sys.stdout,
        sys.stderr,
        sys.excepthook,
        sys.argv,
    )


def stream_handlers():
    loggers = map(logging.getLogger, [None, "transformers", "datasets", "huggingface_hub", "torch"])
    return [handler for logger in loggers for handler in logger.handlers if "stream" in vars(handler)]


@pytest.mark.parametrize(
    "words",
    [
        ("preview", "demo", "data.split=train[:32]", "machine.threads=2", "data.prompt_template=chat"),
        ("noise", "demo", "data.split=train[:32]"),
        ("doctor",),
        ("fit", "demo"),
        ("fit", "demo", "lora.rank=8"),
    ],
    ids=" ".join,
)
def test_a_verb_in_the_kernel_leaves_the_kernel_as_it_was(words, monkeypatch):
    before = state()
    for call in (command, output_of):
        with contextlib.suppress(UserInputError, RunFailed):
            call(*words)
    assert state() == before


def test_a_bug_in_the_kernel_is_shown_and_ends_the_cell(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("qlora_neft.fit.plan_recipe", broken)
    with pytest.raises(RunFailed, match="exit code 1"):
        command("fit", "demo")
    assert "ZeroDivisionError: a bug" in capsys.readouterr().out


def test_what_would_keep_memory_of_a_gpu_has_its_own_process(monkeypatch):
    assert not runs_in_the_kernel(["train", "demo"]) and not runs_in_the_kernel(["export", "out", "--repo-id", "a/b"])
    assert not runs_in_the_kernel(["generate", "out"]) and not runs_in_the_kernel(["eval", "flips", "demo"])
    assert runs_in_the_kernel(["export", "out", "--repo-id", "a/b", "--dry-run"]) and runs_in_the_kernel(["noise"])
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert runs_in_the_kernel(["doctor"]) != Path("/proc/driver/nvidia").exists()
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert not runs_in_the_kernel(["doctor"]) and not runs_in_the_kernel(["preview", "demo"])


@pytest.mark.parametrize("call", [command, output_of])
def test_a_wrong_word_ends_the_cell_with_the_message_shown(call, capsys):
    with pytest.raises(UserInputError, match="qlora-neft fit ended with exit code 2; the output above says why"):
        call("fit", "demo", "lora.rank=8")
    assert "lora.rank" in capsys.readouterr().out


def test_a_command_that_fails_ends_the_cell(llama, tmp_path, capsys):
    config = {"peft_type": "LORA", "use_dora": True, "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(llama)}))
    save_file({"q_proj.lora_A.weight": np.zeros((4, 64), np.float32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(RunFailed, match="qlora-neft check ended with exit code 1; the output above says why"):
        command("check", tmp_path, "--for", "vllm")
    assert "breaks" in capsys.readouterr().out


def test_an_interrupted_cell_leaves_a_checkpoint_and_the_same_cell_goes_on(llama, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib.pyplot", reason="matplotlib, which draws the picture, is not installed")
    make_workplace(tmp_path, llama)
    monkeypatch.chdir(tmp_path)
    changes = ("train.max_steps=60", "machine.save_steps=0")

    def interrupt():
        while len(logged("out")) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt, daemon=True)
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        train_live("mine.yaml", *changes, output_dir="out")
    [step] = sound_steps("out")
    assert 2 <= step < 60 and "interrupted: " in capsys.readouterr().out
    summary = train_live("mine.yaml", *changes, output_dir="out")
    assert summary["resumed_from_step"] == step and summary["steps"] == 60
