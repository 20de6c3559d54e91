"""NEFTune's Figure 4 on a small pretrained model: noise raises the clean train loss and lowers the held-out loss.

    python benchmarks/figure4.py --model MODEL_DIR --data ALPACA.json --output docs/results

Three arms, two seeds: no noise, NEFTune as published, and transformers' own hook (padded width as L). The first two are
`qlora-neft train` with overrides; the third differs from the second only in the source of the noise.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ALPHA, SEEDS = 15.0, (0, 1)
OVERRIDES = (
    "model.revision=main",
    "data.split=train[:128]",
    "data.eval_split=train[128:248]",
    "lora.r=64",
    "train.num_train_epochs=25",
    "train.effective_batch_size=16",
    "train.learning_rate=5e-3",
    "train.lr_scheduler_type=cosine",
    "machine.per_device_train_batch_size=16",
    "machine.eval_answers=0",
)
RECIPE = "llama2-7b-alpaca"


def main() -> None:
    """Run the missing runs, then write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a small pretrained causal LM")
    parser.add_argument("--data", type=Path, required=True, help="Alpaca rows as .json or .jsonl, 248 or more")
    parser.add_argument("--output", type=Path, required=True, help="folder for figure4.json, figure4.png")
    parser.add_argument("--runs", type=Path, default=Path(tempfile.gettempdir()) / "figure4", help="folder of the runs")
    parser.add_argument("--only", nargs=3, metavar=("ARM", "ALPHA", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        one_run(options, options.only[0], float(options.only[1]), int(options.only[2]))
        return
    arms = [("none", 0.0), ("published", ALPHA), ("transformers", ALPHA)]
    runs = {(arm, seed): one_run(options, arm, alpha, seed) for seed in SEEDS for arm, alpha in arms}
    options.output.mkdir(parents=True, exist_ok=True)
    result = tabulate(runs)
    (options.output / "figure4.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw(runs, options.output / "figure4.png")
    print(json.dumps(result, indent=2))


def one_run(options: argparse.Namespace, arm: str, alpha: float, seed: int) -> dict[str, Any]:
    """Train one arm, or read its results if they are there already."""
    folder = options.runs / f"{arm}-{seed}"
    if not (folder / "summary.json").exists():
        overrides = [
            *OVERRIDES,
            f"model.name_or_path={options.model}",
            f"data.path={options.data}",
            f"neftune.noise_alpha={alpha:g}",
            f"train.seed={seed}",
        ]
        print(f"{arm}, seed {seed}", file=sys.stderr)
        if arm == "transformers":
            run_with_upstream_hook(overrides, folder)
        else:
            command = [sys.executable, "-m", "qlora_neft", "train", RECIPE, "--output-dir", str(folder), *overrides]
            print(shlex.join(command[1:]), file=sys.stderr)
            subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {"after": summary["after"], "seconds": summary["train_seconds"], "log": [json.loads(line) for line in lines]}


def run_with_upstream_hook(overrides: list[str], folder: Path) -> None:
    """Train the same run with the noise of ``transformers.integrations.neftune`` instead of ours."""
    from qlora_neft import load_recipe
    from qlora_neft.runner.run import run
    from qlora_neft.trainer import QLoRANeftTrainer

    class UpstreamNoise(QLoRANeftTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.neftune_noise_alpha = self.args.neftune_noise_alpha  # the attribute upstream's hook is switched by

        def _noise(self, *args: Any) -> None:
            return None

    run(load_recipe(RECIPE, overrides), folder, trainer_class=UpstreamNoise)


def tabulate(runs: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    """Return losses after training by arm and seed, and the differences to no noise, paired by seed."""
    table: dict[str, Any] = {"alpha": ALPHA, "seeds": list(SEEDS), "arms": {}}
    for arm in dict.fromkeys(arm for arm, _ in runs):
        losses = {
            key: [runs[arm, seed]["after"][key] for seed in SEEDS] for key in ("clean_train_loss", "held_out_loss")
        }
        baseline = {key: [runs["none", seed]["after"][key] for seed in SEEDS] for key in losses}
        differences = {
            key: statistics.mean(a - b for a, b in zip(losses[key], baseline[key], strict=True)) for key in losses
        }
        seconds = [runs[arm, seed]["seconds"] for seed in SEEDS]
        table["arms"][arm] = {**losses, "mean_difference_to_no_noise": differences, "train_seconds": seconds}
    return table


def draw(runs: dict[tuple[str, int], dict[str, Any]], path: Path) -> None:
    """Draw clean train loss and held-out loss over training, one color per arm, one line per seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colors = {"none": "#555555", "published": "#0072B2", "transformers": "#D55E00"}
    labels = {"none": "no noise", "published": "NEFTune as published", "transformers": "transformers' hook"}
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    for axes, key, title in zip(
        figure.subplots(1, 2), ("clean_loss", "eval_loss"), ("clean train loss", "held-out loss"), strict=True
    ):
        for (arm, seed), run in runs.items():
            points = [(entry["step"], entry[key]) for entry in run["log"] if key in entry]
            label = f"{labels[arm]}, alpha {ALPHA:g}" if arm != "none" else labels[arm]
            style = {"color": colors[arm], "linestyle": "-" if seed == SEEDS[0] else "--"}
            axes.plot(*zip(*points, strict=True), **style, marker="o", ms=3, label=label if seed == SEEDS[0] else None)
        axes.set(title=title, xlabel="optimizer step", ylabel="nats per token")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[1].legend(frameon=False)
    FigureCanvasAgg(figure)
    figure.savefig(path)


if __name__ == "__main__":
    main()
