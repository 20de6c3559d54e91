"""Record what a handful of runs train, bit for bit, so that a change that alters no mathematics can show it.

    git stash; python scripts/trajectories.py before.json; git stash pop
    python scripts/trajectories.py after.json --against before.json

Each run is the installed command line on the demo, on one CPU thread in float32: with and without noise, killed and
resumed, on two ranks. Losses, the adapter and the prepared token ids are compared exactly; they hold between two
commits on one machine, not between two machines.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS = 8
SETTINGS = [
    f"train.max_steps={STEPS}",
    "machine.device=cpu",
    "machine.precision=fp32",
    "machine.threads=1",
    "machine.eval_answers=20",
    "machine.eval_steps=4",
    "machine.clean_loss_steps=4",
    "machine.logging_steps=1",
    "machine.save_steps=2",
]
RUNS: dict[str, list[str]] = {
    "noise": [],
    "no noise": ["neftune.noise_alpha=0"],
    "gaussian noise, falling alpha": [
        "neftune.distribution=gaussian",
        "neftune.schedule=linear",
        "neftune.final_alpha=0",
    ],
    "one row at a time, recomputed": [
        "machine.per_device_train_batch_size=1",
        "machine.activation_checkpointing=true",
    ],
    "padding-free": ["machine.padding_free=true", "machine.max_tokens_per_micro_batch=400"],
}
PREVIEWS: dict[str, list[str]] = {
    "demo": ["demo"],
    "demo, short": ["demo", "data.max_length=60", "data.max_truncated_fraction=1", "data.max_dropped_fraction=1"],
    "demo, vicuna": ["demo", "data.prompt_template=vicuna", "data.train_on_prompt=true"],
}
LOSSES = ("loss", "grad_norm", "eval_loss", "clean_loss")
PYTHON = [sys.executable, "-m", "qlora_neft"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="where the record goes, JSON")
    parser.add_argument("--against", type=Path, help="a record to compare with; exit code 1 if anything differs")
    arguments = parser.parse_args()
    found = record()
    arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if arguments.against is None:
        return 0
    return compare(json.loads(arguments.against.read_text(encoding="utf-8")), found)


def record() -> dict[str, Any]:
    """Losses, adapter bytes and token ids of every run, by its name."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        found = {f"tokens: {name}": token_ids(folder, what) for name, what in PREVIEWS.items()}
        for name, settings in RUNS.items():
            train(folder / name, settings)
            found[name] = trained(folder / name)
        kill_and_resume(folder / "resumed")
        found["killed and resumed"] = trained(folder / "resumed")
        train(folder / "ranks", [], launcher=["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"])
        found["two ranks"] = trained(folder / "ranks")
        return found


def compare(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Print one line per run; 0 if nothing differs."""
    for name in sorted({*before, *after}):
        print(f"{'same' if before.get(name) == after.get(name) else 'DIFFERENT':>9}  {name}")
    return int(before != after)


def command(output_dir: Path, settings: list[str], launcher: list[str] | None = None) -> list[str]:
    python = PYTHON if launcher is None else [sys.executable, *launcher, *PYTHON[1:]]
    return [*python, "train", "demo", "--output-dir", str(output_dir), *SETTINGS, *settings]


def train(output_dir: Path, settings: list[str], launcher: list[str] | None = None) -> None:
    subprocess.run(
        command(output_dir, settings, launcher),
        check=True,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_and_resume(output_dir: Path) -> None:
    """Kill a run once its checkpoint of step 4 is written, and run the same command again."""
    process = subprocess.Popen(
        command(output_dir, []), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (output_dir / "checkpoint-4").is_dir():
        if process.poll() is not None:
            raise SystemExit("the run ended before it could be killed")
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    train(output_dir, [])


def trained(output_dir: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [{key: line[key] for key in ("step", *LOSSES) if key in line} for line in lines]
    summary = json.loads((output_dir / "summary.json").read_text(encoding="utf-8"))
    return {
        "losses": losses,
        "before and after": [summary.get("before"), summary.get("after")],
        "adapter": hashlib.sha256((output_dir / "adapter_model.safetensors").read_bytes()).hexdigest(),
    }


def token_ids(folder: Path, what: list[str]) -> list[str]:
    """Hashes of the training and the held-out token ids and labels, and of the rows as `preview` shows them."""
    shown = subprocess.run(
        [*PYTHON, "preview", *what, "-n", "2000", "--json"], env=ENVIRONMENT, stdout=subprocess.PIPE, cwd=folder
    )
    report = json.loads(shown.stdout)
    examples = hashlib.sha256(json.dumps(report["examples"]).encode()).hexdigest()
    return [report["train"]["sha256"], report["eval"]["sha256"], examples]


if __name__ == "__main__":
    raise SystemExit(main())
