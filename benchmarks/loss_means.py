"""How much a row counts: a mean over a step's tokens, and a mean of means, on the lengths of real rows.

    python benchmarks/loss_means.py --tokenizer TOKENIZER --data alpaca=ALPACA.json --output loss_means.json

QLoRA's code passes over one row at a time and averages the 16 mean losses of a step, NEFTune's over four at a time;
here a step's loss is the mean over its trained tokens (``train.loss_mean: tokens``). No model is needed: each mean is
a weight per row, computed for random steps, as a function of the length of the row's response. Also counted: what
the papers' limits of length cut away.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from qlora_neft.data.encode import Encoder
from qlora_neft.data.examples import Instruction
from qlora_neft.data.templates import AlpacaTemplate
from qlora_neft.files import write_json

STEP, MICRO_BATCH, EPOCHS, SEED = 16, 4, 20, 0
SOURCE, TARGET, TOTAL = 384, 128, 512  # tokens: QLoRA's Table 9, and NEFTune's
PARTS = 10


def main() -> None:
    """Measure every file and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder or Hub id of LLaMA's tokenizer")
    parser.add_argument("--data", action="append", required=True, metavar="NAME=FILE", help="rows in Alpaca's columns")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    found = {}
    for named in options.data:
        name, _, path = named.partition("=")
        prompts, responses = lengths(json.loads(Path(path).read_text(encoding="utf-8")), tokenizer)
        found[name] = {
            "rows": len(prompts),
            "cut": cut_away(prompts, responses),
            "parts": parts(np.minimum(responses, np.maximum(TOTAL - prompts, 1))),
        }
        print(table(name, found[name]))
    if options.output:
        write_json(options.output, {"step": STEP, "micro_batch": MICRO_BATCH, "epochs": EPOCHS, "data": found})


def lengths(rows: Sequence[dict[str, str]], tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of each row's prompt, begin token included, and of its response, end token included."""
    template = AlpacaTemplate(tokenizer.eos_token)
    examples = [Instruction(row["instruction"], row.get("input") or "", row["output"]) for row in rows]
    encoder = Encoder(tokenizer, adds_special_tokens=True)
    encoded = encoder.encode([template.render(example) for example in examples])
    responses = np.array([int(one.trained.sum()) for one in encoded])
    return np.array([len(one.ids) for one in encoded]) - responses, responses


def cut_away(prompts: np.ndarray, responses: np.ndarray) -> dict[str, float]:
    """Return shares of rows and of response tokens beyond the papers' limits."""
    kept = np.clip(TOTAL - prompts, 0, responses)
    return {
        "rows_with_prompt_beyond_384": float((prompts > SOURCE).mean()),
        "rows_with_response_beyond_128": float((responses > TARGET).mean()),
        "response_tokens_lost_at_128": float(1 - np.minimum(responses, TARGET).sum() / responses.sum()),
        "rows_beyond_512": float((prompts + responses > TOTAL).mean()),
        "response_tokens_lost_at_512": float(1 - kept.sum() / responses.sum()),
    }


def parts(responses: np.ndarray) -> list[dict[str, float]]:
    """Return, for each tenth of the rows by length, its share of the loss and the weight of one of its tokens."""
    order = np.argsort(responses, kind="stable")
    weights = {name: weight_of_rows(responses, mean) for name, mean in MEANS.items()}
    tenths = np.array_split(order, PARTS)
    found = []
    for tenth in tenths:
        one: dict[str, float] = {"shortest": int(responses[tenth].min()), "longest": int(responses[tenth].max())}
        for name, weight in weights.items():
            one[f"share_{name}"] = float(weight[tenth].sum() / weight.sum())
            # 1 is the weight of every token if all tokens weigh the same.
            per_token = weight[tenth].sum() / responses[tenth].sum()
            one[f"token_{name}"] = float(per_token / (weight.sum() / responses.sum()))
        found.append(one)
    return found


def weight_of_rows(responses: np.ndarray, mean: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return how much each row counts, summed over the random full steps of `EPOCHS` epochs."""
    weights, shuffle = np.zeros(len(responses)), random.Random(SEED)
    rows = list(range(len(responses)))
    for _ in range(EPOCHS):
        shuffle.shuffle(rows)
        for start in range(0, len(rows) - STEP + 1, STEP):
            step = rows[start : start + STEP]
            weights[step] += mean(responses[step])
    return weights


def _tokens(lengths: np.ndarray) -> np.ndarray:
    return lengths / lengths.sum()


def _sequences(lengths: np.ndarray) -> np.ndarray:
    return np.full(len(lengths), 1 / len(lengths))


def _micro_batches(lengths: np.ndarray) -> np.ndarray:
    groups = lengths.reshape(-1, MICRO_BATCH)
    return (groups / groups.sum(axis=1, keepdims=True) / len(groups)).ravel()


MEANS = {"tokens": _tokens, "sequences": _sequences, "micro_batches": _micro_batches}


def table(name: str, found: dict[str, Any]) -> str:
    """Return the figures of one file as Markdown."""
    lines = [f"{name}: {found['rows']:,} rows", ""]
    lines += [
        "| response, tokens | loss: tokens | loss: rows | loss: fours | a token: rows | a token: fours |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for one in found["parts"]:
        cells = [f"{one['shortest']} to {one['longest']}"]
        cells += [f"{one[f'share_{mean}']:.1%}" for mean in MEANS]
        cells += [f"{one[f'token_{mean}']:.2f}" for mean in ("sequences", "micro_batches")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", json.dumps(found["cut"]), ""])


if __name__ == "__main__":
    main()
