"""A sweep of the paper's recipe with a small base that ends in a decision: by held-out loss, and by a judge.

    python benchmarks/sweep_decides.py --model MODEL --data ALPACA.json --instructions ALPACA_EVAL.json --judge JUDGE
        --runs RUNS [--output docs/results]

`qlora-neft sweep llama2-7b-alpaca` on 300 rows: alpha 0, 5, 10 and 15 with three seeds by held-out loss, on the share
that the sweep holds out by itself; and `--protocol paper` with a local judge, on the first 24 of AlpacaEval's
instructions with their reference. The same command continues. With --output, the results are copied there.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from small_models import run_sweep

WORDS = (
    "data.split=train[:300]",
    "train.learning_rate=5e-3",
    "train.lr_scheduler_type=cosine",
    "machine.device=cpu",
    "machine.precision=fp32",
)


def main() -> None:
    """Run both sweeps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a small pretrained causal LM")
    parser.add_argument("--data", type=Path, required=True, help="Alpaca rows, a JSON list")
    parser.add_argument("--instructions", type=Path, required=True, help="AlpacaEval's, with a reference's answers")
    parser.add_argument("--judge", required=True, help="folder of the judge")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the sweeps")
    parser.add_argument("--output", type=Path, help="folder that gets the results")
    options = parser.parse_args()
    words = [f"model.name_or_path={options.model}", f"data.path={options.data}", *WORDS]
    judging = ("--judge", options.judge, "--instructions", str(options.instructions), "--rows", "24")
    run_sweep("llama2-7b-alpaca", ["neftune.noise_alpha=0,5,10,15", *words], options.runs / "loss")
    run_sweep("llama2-7b-alpaca", words, options.runs / "judge", "--protocol", "paper", *judging)
    if options.output is not None:
        for name in ("loss", "judge"):
            shutil.copyfile(options.runs / name / "results.json", options.output / f"sweep_decides_{name}.json")


if __name__ == "__main__":
    main()
