"""Token ids in committed distributions of length: no text, and the same ids wherever they are drawn. No torch."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

IGNORE_INDEX = -100
SPECIAL = 4  # ids from 0 on that are no words
NAMES = ("alpaca", "long")


@dataclass(frozen=True)
class Lengths:
    """A distribution of sequence lengths: a shifted lognormal, cut at both ends.

    Attributes:
        sequences_per_step: Sequences of an optimizer step.
        rows_per_micro_batch: As many as make up to 4,096 tokens, for trainers that count rows.
        shift, median, sigma: Length is ``shift + median * exp(sigma * z)`` tokens, z normal.
        least, most: Tokens.
        prompt_share: Range of the part of a sequence that has no label.
        seed: Of lengths and ids.
        about: Where the figures come from.
    """

    sequences_per_step: int
    rows_per_micro_batch: int
    shift: int
    median: float
    sigma: float
    least: int
    most: int
    prompt_share: tuple[float, float]
    seed: int
    about: str

    def draw(self, steps: int) -> list[int]:
        """Return the lengths of the sequences of so many optimizer steps, in tokens."""
        # random() is the one method whose numbers Python promises to keep.
        uniform, normal = random.Random(self.seed), NormalDist()
        drawn = []
        for _ in range(steps * self.sequences_per_step):
            z = normal.inv_cdf((uniform.random() + 1e-9) / (1 + 2e-9))  # which is not defined at 0 and 1
            drawn.append(round(self.shift + self.median * math.exp(self.sigma * z)))
        return [min(max(length, self.least), self.most) for length in drawn]


def distribution(name: str, *, tiny: bool = False) -> Lengths:
    """Return a distribution; ``tiny`` makes it a sixteenth as long, with a quarter of the sequences."""
    values: dict[str, Any] = json.loads(Path(__file__).with_name("lengths.json").read_text(encoding="utf-8"))[name]
    if tiny:
        sizes = {key: max(values[key] // 16, 2) for key in ("shift", "median", "least", "most")}
        counts = {key: values[key] // 4 for key in ("sequences_per_step", "rows_per_micro_batch")}
        values |= sizes | counts | {"least": 4}
    return Lengths(**{**values, "prompt_share": tuple(values["prompt_share"])})


def rows(lengths: Lengths, steps: int, vocabulary: int) -> list[dict[str, list[int]]]:
    """Return tokenized rows of so many steps: ``input_ids`` and ``labels``, the prompt without labels."""
    uniform = random.Random(lengths.seed + 1)
    made = []
    for length in lengths.draw(steps):
        ids = [SPECIAL + int(uniform.random() * (vocabulary - SPECIAL)) for _ in range(length)]
        low, high = lengths.prompt_share
        # At least one token before the first label, as something must predict it, and at least one label.
        prompt = min(max(round(length * (low + (high - low) * uniform.random())), 1), length - 1)
        made.append({"input_ids": ids, "labels": [IGNORE_INDEX] * prompt + ids[prompt:]})
    return made


def tokens_of_steps(lengths: Lengths, steps: int) -> list[int]:
    """Return the tokens of each step, padding not counted."""
    drawn, size = lengths.draw(steps), lengths.sequences_per_step
    return [sum(drawn[at : at + size]) for at in range(0, len(drawn), size)]
