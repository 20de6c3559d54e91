"""Verbs called from Python as notebooks call them: what is shown, what is raised, and an interrupted cell."""

import json
import os
import signal
import threading
import time

import numpy as np
import pytest
from command_line import logged, make_workplace, sound_steps
from forked import environment, quick_python
from safetensors.numpy import save_file

from qlora_neft import command, output_of, train_live
from qlora_neft.errors import RunFailed, UserInputError

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


@pytest.mark.parametrize("call", [command, output_of])
def test_a_wrong_word_ends_the_cell_with_the_message_shown(call, capsys):
    with pytest.raises(UserInputError, match="qlora-neft fit ended with exit code 2; why"):
        call("fit", "demo", "lora.rank=8")
    assert "lora.rank" in capsys.readouterr().out


def test_a_command_that_fails_ends_the_cell(llama, tmp_path, capsys):
    config = {"peft_type": "LORA", "use_dora": True, "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(llama)}))
    save_file({"q_proj.lora_A.weight": np.zeros((4, 64), np.float32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(RunFailed, match="qlora-neft check ended with exit code 1; why"):
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
