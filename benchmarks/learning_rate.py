"""The rate that `qlora-neft tune` finds in 50 steps, against a grid of whole runs.

    python benchmarks/learning_rate.py --models MODELS --data ALPACA.json --runs RUNS [--output docs/results]

Three settings, one seed: many rows seen three times, few rows learned by heart, and many rows seen once at a constant
rate. The search begins at the rate of the recipe, 2e-4, which is far too small for these bases. The same command
continues. With --output, tune.json and tune.png are written there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from small_models import BASES, qlora_neft, run_sweep, runs_of, write_rows

from qlora_neft.compare.arms import arms_by, rows_interval
from qlora_neft.compare.records import read_run
from qlora_neft.display.plots import BLUE, ORANGE, SKY, VERMILION, new_picture, save_picture

RECIPE, RATE = "llama2-7b-alpaca", "train.learning_rate"
GRID = ("2e-4", "5e-4", "9e-4", "1.6e-3", "2.8e-3", "5e-3", "8.9e-3", "1.6e-2", "5e-2")
COMMON = (
    "data.format=prompt-completion",
    "data.prompt_template=auto",
    "data.max_length=256",
    "model.revision=main",
    "lora.r=64",
    "lora.lora_alpha=16",
    "lora.lora_dropout=0",
    "train.max_grad_norm=1.0",
    "machine.max_tokens_per_micro_batch=4096",
    "machine.per_device_eval_batch_size=100",
    "machine.eval_answers=0",
    "machine.eval_steps=100000",  # before and after are measured anyway
    "machine.clean_loss_steps=0",
    "machine.threads=1",
)
STORIES = ("data.eval_split=train[864:992]", "train.effective_batch_size=16", "train.lr_scheduler_type=cosine")
SETTINGS: dict[str, tuple[str, Sequence[str]]] = {
    "stories-epochs": ("stories", (*STORIES, "data.split=train[:864]", "train.num_train_epochs=3")),
    "stories-memorise": ("stories", (*STORIES, "data.split=train[:128]", "train.num_train_epochs=12")),
    "baby-constant": (
        "baby",
        (
            "data.eval_split=train[1000:1128]",
            "data.split=train[:800]",
            "train.effective_batch_size=8",
            "train.num_train_epochs=1",
            "train.lr_scheduler_type=constant",
        ),
    ),
}


def measured(setting: str, runs: Path, data: Path, models: Path) -> dict[str, Any]:
    """Search, then train the grid and the found rate to the end."""
    name, own = SETTINGS[setting]
    base = BASES[name]
    rows = write_rows(runs / f"{name}.json", data, base, models)
    words = [*COMMON, f"model.name_or_path={base.path(models)}", f"data.path={rows}", *own]
    folder = runs / f"{setting}-tune"
    search = json.loads(qlora_neft("tune", RECIPE, *words, "--output-dir", str(folder), "--force", "--json"))
    search["written"] = None  # a path of this machine
    found, whole = search["rate"], runs / f"{setting}-full"
    grid = [text for text in GRID if float(text) != found]
    run_sweep(RECIPE, [f"{RATE}={','.join([*grid, f'{found:g}'])}", *words], whole, "--seeds", "1", "--measure", "rows")
    return {"search": search, **_whole_runs(whole, found)}


def _whole_runs(folder: Path, found: float) -> dict[str, Any]:
    """Return the curve of the whole runs, and how far the found rate is above the lowest of the grid."""
    arms = {arm.settings[RATE]: arm for arm in arms_by([read_run(run) for run in runs_of(folder)], [RATE])}
    losses = {rate: arms[rate].runs[0].values["held_out_loss"] for rate in sorted(arms)}
    best = min((rate for rate in losses if rate in map(float, GRID)), key=losses.__getitem__)
    return {
        "whole": [{"rate": rate, "loss": loss} for rate, loss in losses.items()],
        "found_loss": losses[found],
        "best_of_grid": best,
        "best_loss": losses[best],
        "above": losses[found] - losses[best],
        "above_interval": rows_interval(arms[found], arms[best]),
    }


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw both curves of each setting."""
    picture = new_picture("", (4.4 * len(results), 4.4))
    assert picture is not None, "pip install 'qlora-neft[plots]'"
    figure, axes = picture
    axes.remove()
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for panel, (name, result) in zip(panels, results.items(), strict=True):
        search = result["search"]
        low, high = search["interval"]
        panel.axvspan(low, high, color=SKY, alpha=0.25, label="the search's interval")
        for label, mark, color, points in (
            (f"search, {search['steps']} steps", "o-", BLUE, search["rates"]),
            (f"whole runs, {search['full_steps']} steps", "s-", ORANGE, result["whole"]),
        ):
            panel.plot(*zip(*((p["rate"], p["loss"]) for p in points), strict=True), mark, color=color, label=label)
        panel.axvline(search["rate"], color=VERMILION, linestyle="-.", label=f"found: {search['rate']:g}")
        panel.set(title=name, xlabel="learning rate", xscale="log")
        panel.set_ylim(result["best_loss"] - 0.1, search["untrained_loss"] + 0.1)
        panel.grid(alpha=0.25)
        panel.legend(frameon=False, fontsize=8, ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    panels[0].set_ylabel("held-out loss (nats per token)")
    save_picture(figure, path)


def main() -> None:
    """Measure every setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder of small pretrained causal LMs")
    parser.add_argument("--data", type=Path, required=True, help="Alpaca rows, a JSON list")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--output", type=Path, help="folder that gets the results")
    options = parser.parse_args()
    paths = [path.resolve() for path in (options.runs, options.data, options.models)]
    results = {setting: measured(setting, *paths) for setting in SETTINGS}
    if options.output is not None:
        text = json.dumps(results, indent=2) + "\n"
        (options.output / "tune.json").write_text(text, encoding="utf-8")
        draw(results, options.output / "tune.png")


if __name__ == "__main__":
    main()
