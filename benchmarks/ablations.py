"""The paper's ablations on a small model: the effect of each recipe key, with and without noise, three paired seeds.

    python benchmarks/ablations.py --models MODELS --data ALPACA.json --runs RUNS [--output docs/results]
        [--only noise symmetric targets epochs length decoding]

A small pretrained model learns 128 short Alpaca rows, without a template. ``noise`` varies the kind of noise and
FreeLB (the paper's Tables 6 and 12), ``symmetric`` is SymNoise (arXiv:2312.01523), ``targets`` varies the layers that
are trained (11), ``epochs`` their number (14), ``length`` the length that rows are cut to (13). These are sweeps: run
the same command to continue after an interruption. For ``decoding`` (10 and 5), runs of ``noise`` answer the same
prompts in different ways. With --output, the results are copied there; `python -m scripts.build_docs` makes the page's
tables from them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

from small_models import COMMON, Base, qlora_neft, run_sweep, runs_of, write_rows

from qlora_neft.evaluation.alpaca.answer import answer_instructions
from qlora_neft.evaluation.runs import Machine
from qlora_neft.evaluation.texts import measure_texts, read_texts
from qlora_neft.generation.decode import Decoding

BASE = Base("stories260K", "train[600:728]", longest=96)
MEASURES = ("--seeds", "3", "--measure", "rows")
# Without the paper's repetition penalty, which would keep a model from reciting what it knows.
RECITING = ("--repetition-penalty", "1", "--rows", "100", "--batch-size", "100")
EPOCHS, ALPHAS = "train.num_train_epochs=25", "neftune.noise_alpha=0,10"
FREELB = (
    "neftune.noise_alpha=0,10,10,5.7735,10,10",  # 5.7735 = 10 / sqrt(3): the norm of the uniform noise
    "neftune.distribution=uniform,uniform,gaussian,gaussian,uniform,uniform",
    "neftune.adversarial_steps=1,1,1,1,2,3",
    "neftune.adversarial_step_size=null,null,null,null,5,5",
)
SYMMETRIC = (  # 5.7735 as above: all components of Bernoulli noise have the size that bounds those of uniform noise
    "neftune.noise_alpha=0,10,10,5.7735",
    "neftune.distribution=uniform,uniform,uniform,bernoulli",
    "neftune.symmetric=false,false,true,true",
    "train.num_train_epochs=12",
)
# All linear layers, 25 epochs and 96 tokens are the runs of "noise".
TARGETS = "lora.target_modules=[q_proj,k_proj,v_proj,o_proj],[gate_proj,up_proj,down_proj]"
SHORTER = ("data.max_length=64", "data.max_truncated_fraction=1.0", "data.max_dropped_fraction=0.5")
SWEEPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "noise": ((*FREELB, EPOCHS, "data.max_length=96"), ("--list",)),
    "symmetric": ((*SYMMETRIC, "data.max_length=96"), ("--list",)),
    "targets": ((TARGETS, ALPHAS, EPOCHS, "data.max_length=96"), ()),
    "epochs": (("train.num_train_epochs=3,9", ALPHAS, "data.max_length=96"), ()),
    "length": ((*SHORTER, ALPHAS, EPOCHS), ()),
}

ANSWERS, TOKENS, CHUNK, LEAST = 64, 128, 20, 64
ANSWERING = {"0": "noise_alpha_0", "10": "noise_alpha_10-distribution_uniform-adversarial_steps_1"}
DECODINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "top_p 0.1, temperature 0.1": {"do_sample": True, "top_p": 0.1, "temperature": 0.1},
    "top_p 0.35, temperature 0.5": {"do_sample": True, "top_p": 0.35, "temperature": 0.5},
    "top_p 0.6, temperature 0.9": {"do_sample": True, "top_p": 0.6, "temperature": 0.9},
    "top_p 0.9, temperature 0.6": {"do_sample": True, "top_p": 0.9, "temperature": 0.6},
    f"at least {LEAST} tokens": {"min_new_tokens": LEAST},
}
META_PROMPTS = {
    "asked for a long response": "Generate a long response\n",  # training prompts end in a line break
    "asked for a comprehensive response": "Generate a comprehensive response\n",
    "asked for both": "Generate a long and comprehensive response.\n",
}


def main() -> None:
    """Run the ablations asked for, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder of small pretrained models")
    parser.add_argument("--data", type=Path, required=True, help="Alpaca rows, a JSON list")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the sweeps")
    parser.add_argument("--output", type=Path, help="folder that gets the results")
    names = [*SWEEPS, "decoding"]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    rows = write_rows(options.runs / "rows.json", options.data, BASE, options.models)
    for name in options.only:
        if name == "decoding":
            result = options.runs / "decoding.json"
            result.write_text(json.dumps(decodings(options.runs, rows), indent=1) + "\n", encoding="utf-8")
        else:
            result = sweep(options, rows, name)
        if options.output is not None:
            shutil.copyfile(result, options.output / f"ablations_{name}.json")


def sweep(options: argparse.Namespace, rows: Path, name: str) -> Path:
    """Run one ablation and return its results file."""
    words, combine = SWEEPS[name]
    common = ["data.split=train[:128]", f"data.eval_split={BASE.held_out}", *COMMON, *words]
    words = [*BASE.words(options.models, rows), *common]
    run_sweep(BASE.recipe, words, options.runs / name, *MEASURES, *combine)
    qlora_neft("eval", "overfit", *map(str, runs_of(options.runs / name)), *RECITING)
    run_sweep(BASE.recipe, words, options.runs / name, *MEASURES, *combine)  # the results are written again
    return options.runs / name / "results.json"


def decodings(runs: Path, rows: Path) -> dict[str, Any]:
    """Measure length and repetition of answers to held-out prompts, by decoding, alpha and run."""
    held_out = json.loads(rows.read_text(encoding="utf-8"))[600 : 600 + ANSWERS]
    as_trained, without_break = runs / "asked.json", runs / "asked_for_more.json"
    as_trained.write_text(json.dumps([{"instruction": row["prompt"]} for row in held_out]), encoding="utf-8")
    bare = [{"instruction": row["prompt"].strip()} for row in held_out]
    without_break.write_text(json.dumps(bare), encoding="utf-8")
    ways = [(name, words, "") for name, words in DECODINGS.items()]
    ways += [(name, {}, text) for name, text in META_PROMPTS.items()]
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for alpha, start in ANSWERING.items():
        folders = sorted(path.parent for path in (runs / "noise").glob(f"{start}*/summary.json"))
        for name, words, meta_prompt in ways:
            decoding = Decoding(max_new_tokens=TOKENS, repetition_penalty=1.2, **words)
            files = [runs / "answers" / f"{folder.name}-{name.replace(' ', '_')}.json" for folder in folders]
            for folder, file in zip(folders, files, strict=True):
                file.parent.mkdir(exist_ok=True)
                asked = without_break if meta_prompt else as_trained
                options = {
                    "output": file,
                    "instructions": asked,
                    "decoding": decoding,
                    "machine": Machine(batch_size=32),
                }
                answer_instructions(str(folder), meta_prompt=meta_prompt, **options)
            found[name][alpha] = {
                folder.name: measure_texts(read_texts(file, "--outputs"), CHUNK).main()
                for folder, file in zip(folders, files, strict=True)
            }
    return {"prompts": len(held_out), "chunk": CHUNK, "max_new_tokens": TOKENS, "ways": found}


if __name__ == "__main__":
    main()
