"""How often a text repeats its n-grams, and the log-diversity that sums it up. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

SIZES = (2, 3, 4)
MAX_LOG_DIVERSITY = 20.0  # of a text that repeats nothing, where the logarithm has no value


def repetition(tokens: Sequence[str], n: int) -> float:
    """Share of a text's n-grams that were there before, in percent: 100 (1 - different / all).

    Args:
        tokens: At least ``n`` of them.
        n: Length of an n-gram.

    Source: Su et al. 2022, A Contrastive Framework for Neural Text Generation, section 4.1 (rep-n), arXiv:2202.06417.
    """
    count = len(tokens) - n + 1
    if count < 1:
        raise ValueError(f"an n-gram of {n} needs {n} tokens, the text has {len(tokens)}.")
    different = {tuple(tokens[i : i + n]) for i in range(count)}
    return 100 * (1 - len(different) / count)


def log_diversity(repetitions: Mapping[int, float], *, scale: float = 100.0) -> float:
    """``-ln(1 - D)`` with ``D = (1 - r_2 / scale) (1 - r_3 / scale) (1 - r_4 / scale)``, 20 at most.

    ``r_n`` is the share of repeated n-grams between 0 and 1. One expects ``scale`` 1; the code that NEFTune's Table 4
    was made with divides the shares by 100 although they are no percentages, and its numbers can only be compared on
    that scale, which is the default here. With r = 0.02 for all n, scale 1 gives 2.8 and scale 100 gives 7.4.

    Args:
        repetitions: Percent by n, as `repetition` gives them.
        scale: What the shares are divided by.

    Source: Kirchenbauer et al. 2023, On the Reliability of Watermarks for Large Language Models, arXiv:2306.04634;
    ``metrics/repetition_diversity.py`` in github.com/jwkirchenbauer/lm-watermarking, by an author of NEFTune.
    """
    diversity = math.prod(1 - percent / 100 / scale for percent in repetitions.values())
    return -math.log(max(1 - diversity, math.exp(-MAX_LOG_DIVERSITY)))
