"""The command line in this process and in others, and what a run leaves in its folder."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from forked import environment, quick_python
from json_outputs import check_json

from qlora_neft import load_recipe
from qlora_neft.cli import app
from qlora_neft.errors import RunInterrupted
from qlora_neft.run_folder.checkpoints import find_checkpoints, verify
from qlora_neft.runner.run import run
from qlora_neft.trainer import QLoRANeftTrainer

STEPS, STEPS_PER_EPOCH, SAVE_STEPS, EVAL_STEPS = 30, 7, 5, 4
CUT_AT = 12  # mid-epoch, and no multiple of SAVE_STEPS
ROWS = [{"instruction": f"Repeat {n}", "input": "loudly" * (n % 2), "output": f"{n} " * (1 + n % 3)} for n in range(26)]
HELD_OUT = [{"instruction": f"Repeat {n}", "input": "", "output": str(n)} for n in (77, 88)]
TRAIN = ("train", "mine.yaml", "--output-dir", "out")


def make_workplace(folder: Path, model: Path) -> Path:
    """A folder with a recipe and its data, by relative paths: dropout and noise on, held-out rows, checkpoints."""
    folder.mkdir(exist_ok=True)
    for name, rows in (("train.jsonl", ROWS), ("held.jsonl", HELD_OUT)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"name_or_path": str(model)},
        "quantization": {},
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"},
        "neftune": {"noise_alpha": 5.0},
        "data": {"path": "train.jsonl", "eval_path": "held.jsonl", "max_length": 250},
        "train": {
            "effective_batch_size": 4,
            "num_train_epochs": 100,
            "max_steps": STEPS,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "linear",
            "optim": "paged_adamw_32bit",
            "max_grad_norm": 0.3,
            "seed": 3,
        },
        "machine": {
            "device": "cpu",
            "precision": "fp32",
            "eval_answers": 1,
            "eval_steps": EVAL_STEPS,
            "clean_loss_steps": EVAL_STEPS,
            "logging_steps": 1,
            "save_steps": SAVE_STEPS,
            "max_tokens_per_micro_batch": 400,  # two micro-batches a step, or one
        },
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@functools.cache
def never_stopped(model: Path) -> Path:
    """The folder of the run that nothing happened to, beside the model's; made once, not to be changed."""
    folder = make_workplace(model.with_name("never_stopped"), model)
    with contextlib.chdir(folder):
        code, stdout, _ = invoke(*TRAIN)
    assert code == 0
    (folder / "stdout.txt").write_text(stdout)
    return folder / "out"


@functools.cache
def cut_off(model: Path) -> Path:
    """A workplace whose run was asked to stop in step `CUT_AT`, beside the model's folder; made once, to be copied."""
    folder = make_workplace(model.with_name("cut_off"), model)
    with contextlib.chdir(folder):
        cut(Path("out"))
    return folder


def cut(output_dir: Path, *overrides: str, step: int = CUT_AT) -> None:
    """Train ``mine.yaml`` in this process until SIGTERM arrives during a step."""

    class Signalled(QLoRANeftTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == step - 1:
                signal.raise_signal(signal.SIGTERM)
            return super().training_step(*args, **kwargs)

    with pytest.raises(RunInterrupted):
        run(load_recipe("mine.yaml", overrides), output_dir, quiet=True, trainer_class=Signalled)


# ---- Running ----


@functools.cache
def built_app() -> Any:
    """What calling `app` builds of all verbs, each time anew; the half of a short command's time."""
    return typer.main.get_command(app)


def invoke(*arguments: str) -> tuple[int, str, str]:
    """The command line in this process: exit code, stdout, stderr; a traceback fails the test."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as stdout,
        contextlib.redirect_stderr(io.StringIO()) as stderr,
        pytest.raises(SystemExit) as caught,
    ):
        built_app()(list(arguments))
    check_json(arguments, caught.value.code or 0, stdout.getvalue())
    return caught.value.code or 0, stdout.getvalue(), stderr.getvalue()


def refused(*arguments: str) -> str:
    """The message of exit code 2; nothing in the current directory has changed."""
    before = contents(".")
    code, _, stderr = invoke(*arguments)
    assert code == 2, stderr
    assert contents(".") == before
    assert stderr.startswith("error: ") and stderr.count("error: ") == 1
    return stderr.removeprefix("error: ").rstrip("\n")


@contextlib.contextmanager
def process(*arguments: str, launcher: tuple[str, ...] = ()) -> Iterator[subprocess.Popen]:
    """``python -m qlora_neft`` in the current directory; it is killed at the end of the block."""
    python = quick_python()
    command = [python, "-P", *launcher, "-m", "qlora_neft", *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    variables = environment(PYTHON_EXEC=python)  # what torchrun starts its processes with
    with subprocess.Popen(command, env=variables, **pipes) as started:
        try:
            yield started
        finally:
            if started.poll() is None:
                started.kill()


def until(condition: Callable[[], Any], started: Any, seconds: float = 90) -> None:
    """Wait for something that a running process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert started.poll() is None, f"ended with {started.poll()} before that"
        assert time.monotonic() < end, f"did not happen in {seconds} s"
        time.sleep(0.002)


# ---- What a run left ----


def contents(folder: Path | str) -> dict[str, str | None]:
    """SHA-256 of every file below a folder, None for folders."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in sorted(Path(folder).rglob("*"))
    }


def adapter(output_dir: Path | str) -> bytes:
    """The adapter's file."""
    return Path(output_dir, "adapter_model.safetensors").read_bytes()


def summary(output_dir: Path | str) -> dict[str, Any]:
    """``summary.json``."""
    return json.loads(Path(output_dir, "summary.json").read_text())


def logged(output_dir: Path | str, key: str = "loss") -> dict[int, float]:
    """What ``metrics.jsonl`` says of one quantity, by step; each step is there once."""
    path = Path(output_dir, "metrics.jsonl")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be under way
    found = [(entry["step"], entry[key]) for entry in entries if key in entry and "train_runtime" not in entry]
    assert key != "loss" or len(dict(found)) == len(found), "a step is there twice"
    return dict(found)


def sound_steps(output_dir: Path | str) -> list[int]:
    """Steps of the checkpoints in a folder; every one of them is sound, whatever happened."""
    paths = list(Path(output_dir).glob("checkpoint-*"))
    assert all(verify(path) == [] for path in paths)
    steps = sorted(int(path.name.removeprefix("checkpoint-")) for path in paths)
    found = find_checkpoints(Path(output_dir))
    assert found.damaged == [] and (found.newest.step if found.newest else None) == (steps[-1] if steps else None)
    return steps


def copied(folder: Path, target: Path) -> Path:
    """A copy of a workplace."""
    return shutil.copytree(folder, target, dirs_exist_ok=True)
