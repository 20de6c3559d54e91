"""How answers are measured unless the caller says otherwise, for every verb and for sweeps. No torch.

The NEFTune paper (arXiv:2310.05914) answers AlpacaEval's instructions greedily, "for all models [...] with a repetition
penalty of 1.2, held constant across all experiments" (footnote 2). It does not say how long an answer may be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from ..files import sha256_of_text

REPETITION_PENALTY = 1.2  # footnote 2; also where they sampled (appendix, ablations)
ANSWER_TOKENS = 1024  # of an answer to an instruction; ours
RECITED_TOKENS = 256  # of an answer to a training prompt; ours
RECITED_ROWS = 128  # training prompts of Figure 5; ours
HELD_OUT = "held-out"  # in place of a file of instructions: the run's own held-out prompts
HELD_OUT_PROMPTS = 128
HELD_OUT_REFERENCE = "the rows' own responses"  # generator of the references that held-out rows bring along

# Whitespace tokens at an answer's beginning in which repetition is counted, by the data set trained on.
CUTOFFS = {"alpaca": 50, "evol": 100, "sharegpt": 150, "platypus": 150}
_NAMED_FIRST = ("evol", "sharegpt", "platypus", "alpaca")  # a name may hold two of them


def cutoff_of(path: str) -> str | None:
    """Return which of the paper's data sets a path names; None for another."""
    name = "/".join(PurePath(path).parts[-2:]).lower()
    return next((cutoff for cutoff in _NAMED_FIRST if cutoff in name), None)


# ---- What is stored beside a measure ----


def made_by(decoding: Mapping[str, Any]) -> dict[str, Any]:
    """Say how answers were chosen, in the words that are stored with a measure.

    Args:
        decoding: The fields of a `Decoding`; what has no effect is left out.
    """
    made = {"decoding": "sampled" if decoding["do_sample"] else "greedy"}
    names = ["repetition_penalty", "max_new_tokens"]
    names += ["min_new_tokens"] if decoding["min_new_tokens"] else []
    names += ["temperature", "top_p", "top_k", "seed"] if decoding["do_sample"] else []
    return made | {name: decoding[name] for name in names}


def greedy(max_new_tokens: int, repetition_penalty: float = REPETITION_PENALTY) -> dict[str, Any]:
    """Return what `made_by` says of greedy answers."""
    return {"decoding": "greedy", "repetition_penalty": repetition_penalty, "max_new_tokens": max_new_tokens}


def prompts_made(prompts: Iterable[str], what: str = "instructions") -> dict[str, Any]:
    """Say what was asked: how many, and a hash of their texts, by which two files of the same prompts are one."""
    texts = list(prompts)
    return {"prompts": f"{len(texts)} {what}", "prompts_sha256": sha256_of_text("\0".join(texts))[:16]}
