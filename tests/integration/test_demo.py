"""The promise of the first command: the demo base follows no instruction, and after one small run it does."""

from __future__ import annotations

import json
import os
import subprocess
import sys


def test_the_demo_teaches_its_base_to_follow_instructions(tmp_path):
    output_dir = tmp_path / "demo"
    command = [sys.executable, "-m", "qlora_neft", "train", "demo", "--output-dir", str(output_dir)]
    done = subprocess.run(
        [
            *command,
            "train.num_train_epochs=1",
            "machine.eval_answers=32",
            "machine.eval_steps=36",  # fewer looks on the way, which change nothing of what is learned
            "machine.clean_loss_steps=36",
            "machine.device=cpu",
            "machine.precision=fp32",
        ],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((output_dir / "summary.json").read_text())
    before, after = summary["before"], summary["after"]
    assert before["answers"] == 32 and before["exact_match"] < 0.02
    assert after["exact_match"] > 0.7
    assert after["held_out_loss"] < before["held_out_loss"] / 5
    assert summary["base_unchanged"] is True
    for shown in ("exact answers, held out", "wanted", "loss curves", "base weights unchanged, bit for bit"):
        assert shown in done.stdout
    assert "Traceback" not in done.stderr
