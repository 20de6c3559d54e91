"""What one decoder block keeps and needs at most, as a sum over the widths of its model: made for `qlora_neft.fit`.

    python -m benchmarks.step_counter.terms

counts small models whose widths differ, solves for bytes a token and unit of width, and writes
``qlora_neft/fit/activation_terms.json``. Half precision is counted as on CUDA, float32 as on a CPU. ``--only llama``
counts the cells whose name begins so, and keeps the others.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

import qlora_neft.fit

from .arms import FAMILIES, Arm, block

FILE = Path(qlora_neft.fit.__file__).with_name("activation_terms.json")
WIDTHS = ("hidden", "queries", "keys", "intermediate", "heads", "rank", "one", "scores")
# Bytes a token by name: kept for the backward pass; alive at once in a block; the same if it is checkpointed.
TERMS = ("kept", "peak", "checkpointed_peak")
# Mistral and Qwen2 are Llama here: what tells them apart, windows and biases, is kept for no backward pass.
COUNTED = tuple(family for family in FAMILIES if family not in ("mistral", "qwen2"))
LENGTH, LONGER = 37, 53  # tokens of a row; scores of attention, where a family keeps them, grow with it

# Widths of the models, in the order of WIDTHS. What is alive at most is so in the MLP where that is wide, and in
# attention or between the two where it is narrow: each is a sum of its own, and a block needs the larger one.
_GATED = (
    (128, 128, 64, 640, 4, 4),
    (160, 128, 64, 640, 4, 4),
    (128, 128, 32, 640, 4, 4),
    (128, 128, 64, 704, 4, 4),
    (128, 128, 64, 640, 8, 4),
    (128, 128, 64, 640, 4, 8),
    (128, 256, 64, 640, 4, 4),
)
_PLAIN = (
    (128, 128, 128, 640, 4, 4),
    (160, 160, 160, 640, 4, 4),
    (128, 128, 128, 704, 4, 4),
    (128, 128, 128, 640, 2, 4),
    (128, 128, 128, 640, 4, 8),
)
NARROWER = 384  # of an MLP of 640: twice as wide as the model instead of five times; no model in use has less


def main() -> None:
    """Count, solve and write the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_counter.terms", description=__doc__)
    parser.add_argument("--only", default="", metavar="CELL", help="such as llama, or 'llama fused, half'")
    only = parser.parse_args().only
    table: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))["terms"]
    # Half precision first: that is what GPUs compute in.
    for half, fused, dropout, family in itertools.product((True, False), (True, False), (True, False), COUNTED):
        key = key_of(fused=fused, half=half, dropout=dropout)
        if f"{family} {key}".startswith(only):
            table.setdefault(family, {})[key] = _solved(family, fused=fused, half=half, dropout=dropout)
            print(family, key, table[family][key], flush=True)
            FILE.write_text(json.dumps({"widths": WIDTHS, "terms": table}, indent=1) + "\n", encoding="utf-8")


def key_of(*, fused: bool, half: bool, dropout: bool) -> str:
    """Return the key of a way to train."""
    return f"{'fused' if fused else 'modules'}, {'half' if half else 'float32'}, {'' if dropout else 'no '}dropout"


def keys_of(family: str, widths: tuple[int, ...]) -> dict[str, int]:
    """Return a configuration's keys for widths in the order of `WIDTHS`."""
    hidden, queries, keys, intermediate, heads, _ = widths
    if family == "opt":
        return {
            "hidden_size": hidden,
            "word_embed_proj_dim": hidden,
            "ffn_dim": intermediate,
            "num_attention_heads": heads,
        }
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads}
    if family in ("gpt_neox", "phi"):
        return sizes
    head_dim = queries // heads
    return sizes | {"num_key_value_heads": keys // head_dim, "head_dim": head_dim}


def arm_of(family: str, widths: tuple[int, ...], *, fused: bool, half: bool, dropout: bool) -> Arm:
    """Return what is counted."""
    return Arm(
        family,
        keys=keys_of(family, widths),
        r=widths[-1],
        dropout=0.1 if dropout else 0.0,
        precision="bf16" if half else "fp32",
        as_on_cuda=half and fused,
        arguments={"fused_lora": fused},
    )


def _solved(family: str, **way: bool) -> dict[str, list[list[float]]]:
    """Return the sums of each term, of which the largest holds."""
    wide = _PLAIN if family in ("opt", "gpt_neox", "phi") else _GATED
    narrow = tuple((*widths[:3], widths[3] - NARROWER, *widths[4:]) for widths in wide)
    sums = [_sums(family, points, **way) for points in (wide, narrow)]
    columns = np.array([_columns(widths, LENGTH) for widths in (*wide, *narrow)], float)
    return {term: _needed([found[term] for found in sums], columns) for term in TERMS}


def _sums(family: str, points: tuple[tuple[int, ...], ...], **way: bool) -> dict[str, list[float]]:
    """Count models near each other, and solve for one sum a term."""
    ways = [(widths, LENGTH) for widths in points] + [(points[0], LONGER)]
    counted = [block(arm_of(family, widths, **way), length) for widths, length in ways]
    # Where widths are one and the same, the least squares share the bytes among them, which no model can tell.
    columns = np.array([_columns(*each) for each in ways], float)
    solution, *_ = np.linalg.lstsq(columns, np.array(counted), rcond=None)
    return {term: [round(float(value), 3) for value in solution[:, i]] for i, term in enumerate(TERMS)}


def _columns(widths: tuple[int, ...], length: int) -> tuple[int, ...]:
    return (*widths, 1, widths[4] * length)


def _needed(sums: list[list[float]], columns: np.ndarray) -> list[list[float]]:
    """Return the sums that are the largest anywhere: one where both are the same."""
    values = columns @ np.array(sums).T  # (models, sums)
    first = values[:, 0] * (1 + 1e-3) >= values[:, 1]
    second = values[:, 1] * (1 + 1e-3) >= values[:, 0]
    return sums[:1] if first.all() else sums[1:] if second.all() else sums


if __name__ == "__main__":
    main()
