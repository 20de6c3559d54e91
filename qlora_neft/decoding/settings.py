"""What decides how an answer is chosen."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserInputError


@dataclass(frozen=True)
class Decoding:
    """How an answer is chosen.

    Attributes:
        max_new_tokens: Tokens of an answer at most.
        min_new_tokens: An answer does not end before it has this many (the paper's Table 5 takes 250); 0: it may.
        do_sample: Draw tokens; else take the likeliest.
        temperature: Divides the logits before drawing.
        top_p: Draw among the likeliest tokens that together have this probability.
        top_k: Draw among this many at most; 0: all.
        repetition_penalty: Of tokens that were there before, prompt included (1: none), see `RepetitionPenalty`.
            NEFTune's authors decode greedily with 1.2 (arXiv:2310.05914, appendix, "Additional Ablation Studies").
        seed: Of the draws.

    Raises:
        UserInputError: If a value makes no sense.
    """

    max_new_tokens: int = 512
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        # Written such that NaN breaks a rule too.
        rules = (
            ("max_new_tokens", self.max_new_tokens >= 1, "must be at least 1"),
            (
                "min_new_tokens",
                0 <= self.min_new_tokens <= max(self.max_new_tokens, 0),
                f"must be 0 or more, and at most max_new_tokens ({self.max_new_tokens})",
            ),
            (
                "temperature",
                0 < self.temperature < float("inf"),
                "must be above 0 (to take the likeliest, do not draw)",
            ),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "must be 0 (all tokens) or more"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "must be above 0; 1 is none"),
        )
        for name, is_kept, rule in rules:
            if not is_kept:
                raise UserInputError(f"{name}: {rule}, got {getattr(self, name)}.")
