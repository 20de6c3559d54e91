"""Options of the verbs that let a model answer, and the `Decoding` that they ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserInputError

if TYPE_CHECKING:
    from ..decoding import Decoding

# NEFTune's authors: greedy, with a repetition penalty of 1.2 in all experiments, also where they sampled
# (arXiv:2310.05914, section 5.2, footnote, and appendix, "Additional Ablation Studies").
REPETITION_PENALTY = 1.2

TokensOption = Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")]
LeastTokensOption = Annotated[int, typer.Option(min=0, help="An answer does not end before this many; 0: it may.")]
PenaltyOption = Annotated[float, typer.Option(help="Against repetition; 1 is none. NEFTune's authors use 1.2.")]
SampleOption = Annotated[bool, typer.Option("--sample", help="Draw tokens; else the likeliest is taken.")]
TemperatureOption = Annotated[float | None, typer.Option(help="With --sample; default 1.")]
TopPOption = Annotated[float | None, typer.Option(help="With --sample; default 1 (all).")]
TopKOption = Annotated[int | None, typer.Option(help="With --sample; default 0 (all).")]
SeedOption = Annotated[int | None, typer.Option(help="With --sample; default 0.")]


def decoding_of(
    max_new_tokens: int, min_new_tokens: int, repetition_penalty: float, *, sample: bool, **drawing: float | None
) -> Decoding:
    """What the options ask for.

    Args:
        max_new_tokens, min_new_tokens, repetition_penalty: As in `Decoding`.
        sample: ``do_sample``.
        drawing: ``temperature``, ``top_p``, ``top_k`` and ``seed``; None where the option was not given.

    Raises:
        UserInputError: If a value makes no sense, or has no effect.
    """
    given = {name: value for name, value in drawing.items() if value is not None}
    if given and not sample:
        unused = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserInputError(f"{unused}: no effect without --sample. Add it, or leave this out.")
    from ..decoding import Decoding

    try:
        return Decoding(
            max_new_tokens, min_new_tokens, do_sample=sample, repetition_penalty=repetition_penalty, **given
        )
    except UserInputError as error:  # the option as it was written
        name, rule = str(error).split(":", 1)
        raise UserInputError(f"--{name.replace('_', '-')}:{rule}") from error
