"""eval overfit and eval loss: what a run has learned by heart, and how well it predicts."""

from __future__ import annotations

from typing import Annotated

import typer

from ..answering import PenaltyOption, TokensOption
from ..recipes import JsonOption
from .options import (
    BaseOption,
    BatchOption,
    DeviceOption,
    PrecisionOption,
    RowsOption,
    RunsArgument,
    SetOption,
    print_json,
    quiet,
    say,
)


def overfit(
    sources: RunsArgument,
    rows: Annotated[int, typer.Option(min=1, help="Training rows to answer, the first of each run.")] = 128,
    max_new_tokens: TokensOption = 256,
    repetition_penalty: PenaltyOption = 1.0,
    batch_size: BatchOption = 8,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    base: BaseOption = None,
    changes: SetOption = None,
    answers: Annotated[bool, typer.Option("--answers", help="With --json: also every answer.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare greedy answers to training prompts with what was trained.

    ROUGE-L and BLEU-4; high scores are answers learned by heart.
    """
    from ...evaluation.overlap import check_installed
    from ...evaluation.plain_table import plain_table

    check_installed()
    with quiet():
        from ...decoding import Decoding
        from ...inspection.eval_runs import Machine, overfit_of_runs

        found = overfit_of_runs(
            sources,
            rows=rows,
            decoding=Decoding(max_new_tokens=max_new_tokens, repetition_penalty=repetition_penalty),
            machine=Machine(device, precision, base, batch_size),
            overrides=changes or (),
            say=say,
        )
    from ...evaluation.overfit import table, with_answers

    if as_json:
        print_json({name: with_answers(result) if answers else result.to_dict() for name, result in found.items()})
    else:
        typer.echo(plain_table(*table(found)))


def loss(
    sources: RunsArgument,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]FILE", help="Another set: a data file or Hub id, in the run's own template."),
    ] = None,
    rows: RowsOption = 0,
    batch_size: BatchOption = 8,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    base: BaseOption = None,
    changes: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure losses without noise: training rows, held-out rows, other data.

    Of the base alone and of each adapter, in nats per trained token.
    """
    from ...evaluation.loss_table import loss_table, named_sets
    from ...evaluation.plain_table import plain_table

    sets = named_sets(data or [])
    with quiet():
        from ...inspection.eval_runs import Machine, losses_of_runs

        machine = Machine(device, precision, base, batch_size)
        found = losses_of_runs(sources, sets, rows=rows, machine=machine, overrides=changes or (), say=say)
    if as_json:
        print_json({"sets": found})
    else:
        typer.echo(plain_table(*loss_table(found, sources)))
