"""The rate that `qlora-neft tune` finds in short runs, against a grid of whole runs.

    python benchmarks/learning_rate.py --models MODELS --data ALPACA.json --runs RUNS [--output docs/results]

Three settings, one seed: many rows seen three times, few rows learned by heart (searched in 50 steps, and in all 96),
and many rows seen once at a constant rate. A search begins at the rate of the recipe, 2e-4, which is far too small
for these bases. The same command continues. With --output, tune.json and tune.png are written there.
"""

from __future__ import annotations

import argparse
import json
import math
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
# Base, overrides, and the steps of the searches' runs.
SETTINGS: dict[str, tuple[str, Sequence[str], Sequence[int]]] = {
    "stories-epochs": ("stories", (*STORIES, "data.split=train[:864]", "train.num_train_epochs=3"), (50,)),
    "stories-memorise": ("stories", (*STORIES, "data.split=train[:128]", "train.num_train_epochs=12"), (50, 96)),
    "baby-constant": (
        "baby",
        (
            "data.eval_split=train[1000:1128]",
            "data.split=train[:800]",
            "train.effective_batch_size=8",
            "train.num_train_epochs=1",
            "train.lr_scheduler_type=constant",
        ),
        (50,),
    ),
}


def measured(setting: str, runs: Path, data: Path, models: Path) -> dict[str, dict[str, Any]]:
    """Search, then train the grid and the found rates to the end; return what each search found."""
    name, own, lengths = SETTINGS[setting]
    base = BASES[name]
    rows = write_rows(runs / f"{name}.json", data, base, models)
    words = [*COMMON, f"model.name_or_path={base.path(models)}", f"data.path={rows}", *own]
    searches = {}
    for steps in lengths:
        folder = runs / f"{setting}-tune-{steps}"
        options = ["--output-dir", str(folder), "--steps", str(steps), "--force", "--json"]
        search = json.loads(qlora_neft("tune", RECIPE, *words, *options))
        search["written"] = None  # a path of this machine
        searches[f"{setting}, {steps} steps"] = search
    found = [search["rate"] for search in searches.values()]
    rates = [*(text for text in GRID if float(text) not in found), *(f"{rate:g}" for rate in found)]
    whole = runs / f"{setting}-full"
    run_sweep(RECIPE, [f"{RATE}={','.join(rates)}", *words], whole, "--seeds", "1", "--measure", "rows")
    return {
        key: {
            "search": search,
            **_whole_runs(whole, search["rate"]),
            **_best_kept(search, words, runs / f"{setting}-keep"),
        }
        for key, search in searches.items()
    }


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


def _best_kept(search: dict[str, Any], words: Sequence[str], folder: Path) -> dict[str, Any]:
    """Train once more at the found rate, and keep the weights of the lowest held-out loss of twelve."""
    rate, steps = f"{search['rate']:g}", search["full_steps"] // 12
    keeping = [f"{RATE}={rate}", "train.keep=best", f"train.selection_steps={steps}"]
    done = json.loads(qlora_neft("train", RECIPE, *words, *keeping, "--output-dir", f"{folder}-{rate}", "--json"))
    return {"kept_loss": done["after"]["held_out_loss"]}


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw both curves of each setting."""
    picture = new_picture("", (10, 4.4 * math.ceil(len(results) / 2)))
    assert picture is not None, "pip install 'qlora-neft[plots]'"
    figure, axes = picture
    axes.remove()
    panels = figure.subplots(math.ceil(len(results) / 2), 2).flat
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
        panel.set_ylabel("held-out loss (nats per token)")
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
    results = {key: found for setting in SETTINGS for key, found in measured(setting, *paths).items()}
    if options.output is not None:
        text = json.dumps(results, indent=2) + "\n"
        (options.output / "tune.json").write_text(text, encoding="utf-8")
        draw(results, options.output / "tune.png")


if __name__ == "__main__":
    main()
