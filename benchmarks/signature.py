"""The paper's signature on small pretrained models: the effect of alpha on losses and on reciting the training data.

    python benchmarks/signature.py --models MODELS --data ALPACA.json --runs RUNS [--other NAME=FILE ...]
        [--output docs/results] [--only stories-memorise ...]

Runs `qlora-neft sweep` over alpha 0, 5, 10 and 15 with three seeds each, once where a model memorises (128 rows, 25
epochs) and once in the paper's own regime (800 rows, one epoch; the demo: 1,152 rows, two). Rows are those of Alpaca
that are short enough for the model; the demo's base learns the demo's. Losses are also measured on the first 128
fitting rows of every other file whose instructions are not in Alpaca's file. After an interruption, the same command
continues. With --output, results and pictures are copied there; `python -m scripts.build_docs` makes the page's tables
from them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from small_models import BASES, COMMON, qlora_neft, run_sweep, runs_of, write_rows

ALPHAS, SEEDS, OTHER_ROWS = "0,5,10,15", "3", 128
MEASURES = ("--seeds", SEEDS, "--measure", "rows")
# Without the paper's repetition penalty, which would keep a model from reciting what it knows.
ANSWERING = ("--repetition-penalty", "1", "--max-new-tokens", "256", "--rows", "100", "--batch-size", "100")
REGIMES = {
    "memorise": ("train.num_train_epochs=25", "data.split=train[:128]"),
    "paper": ("train.num_train_epochs=1", "data.split=train[:800]"),
}
OWN_REGIMES = {"memorise": REGIMES["memorise"], "paper": ()}  # the demo's recipe is two epochs of 1,152 rows


def main() -> None:
    """Run the sweeps asked for, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder of small pretrained models")
    parser.add_argument("--data", type=Path, required=True, help="Alpaca rows, a JSON list")
    parser.add_argument("--other", nargs="+", default=[], metavar="NAME=FILE", help="further rows in the same format")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the sweeps")
    parser.add_argument("--output", type=Path, help="folder that gets the results")
    names = [f"{base}-{regime}" for base in BASES for regime in REGIMES]
    parser.add_argument("--alphas", default=ALPHAS, help="some of them; others may be added later")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        measure(options, name)
        if options.output is not None:
            keep(options.runs / name, options.output, f"signature_{name.replace('-', '_')}")


def measure(options: argparse.Namespace, name: str) -> None:
    """Run one base in one regime."""
    base_name, regime = name.split("-")
    base, folder = BASES[base_name], options.runs / name
    words = [f"neftune.noise_alpha={options.alphas}", *COMMON]
    if base.has_own_rows:
        words += OWN_REGIMES[regime]
    else:
        rows = write_rows(options.runs / f"{base_name}.json", options.data, base, options.models)
        words += [*base.words(options.models, rows), f"data.eval_split={base.held_out}", "data.max_length=256"]
        words += REGIMES[regime]
    run_sweep(base.recipe, words, folder, *MEASURES)
    runs = list(map(str, runs_of(folder)))
    qlora_neft("eval", "overfit", *runs, *ANSWERING)
    qlora_neft("eval", "text", *runs, "--instructions", "held-out", *ANSWERING)
    if sets := other_sets(options, base_name):
        qlora_neft("eval", "loss", *runs, *sets, "--batch-size", "32")
    run_sweep(base.recipe, words, folder, *MEASURES)  # all is trained: only the results are written again


def other_sets(options: argparse.Namespace, base_name: str) -> list[str]:
    """Return the options that name further held-out rows; for a base with rows of its own, Alpaca's come first."""
    base = BASES[base_name]
    instructions = {row["instruction"] for row in json.loads(options.data.read_text(encoding="utf-8"))}
    files = {name: (Path(file), instructions) for name, file in (word.split("=", 1) for word in options.other)}
    if base.has_own_rows:
        files = {"alpaca": (options.data, set()), **files}
    words = []
    for name, (file, unlike) in files.items():
        path = options.runs / f"{base_name}-{name}.json"
        write_rows(path, file, base, options.models, unlike=unlike, most=OTHER_ROWS)
        words += ["--data", f"{name}={path}"]
    return words


def keep(folder: Path, output: Path, stem: str) -> None:
    """Copy a sweep's results."""
    shutil.copyfile(folder / "results.json", output / f"{stem}.json")
    shutil.copyfile(folder / "sweep.png", output / f"{stem}.png")


if __name__ == "__main__":
    main()
