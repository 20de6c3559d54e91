"""The verbs eval noise and eval harness. What is heavy is imported inside the verb that needs it."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import UserInputError
from ..recipes import JsonOption, OverridesArgument, complete_recipe

PAPER_ROWS = 5200  # the paper's sample of Alpaca


def noise(
    source: Annotated[
        str,
        typer.Argument(
            metavar="NAME|DIR|MODEL",
            help="A recipe, a run's folder, or a model (Hub id, folder, bundled:...); only the first two have data.",
            autocompletion=complete_recipe,
        ),
    ],
    overrides: OverridesArgument = None,
    alpha: Annotated[str, typer.Option(metavar="A,B,...", help="Noise strengths.")] = "5,10,15",
    length: Annotated[
        str | None, typer.Option(metavar="L,M,...", help="Sequence lengths for noise on the whole vocabulary.")
    ] = None,
    whole_vocabulary: Annotated[
        bool, typer.Option("--whole-vocabulary", help="Also noise every token; lengths 50, 100, 200, 500.")
    ] = False,
    rows: Annotated[int, typer.Option("-n", "--rows", min=1, help="Training sequences at most.")] = PAPER_ROWS,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where to compute.")] = "auto",
    picture: Annotated[Path | None, typer.Option(dir_okay=False, help="Also draw it as a PNG.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Count the tokens that noise turns into others.

    And the top 100 singular values of the embedding similarity matrix. Only the embedding is read.
    """
    alphas = _numbers("--alpha", alpha, float, 0)
    lengths = _numbers("--length", length, int, 1) if length is not None else []
    _check_device(device)
    from ...evaluation.embedding_noise.show import draw, lines
    from ...inspection.embedding_noise_report import report_on

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        report = report_on(
            source,
            overrides or (),
            alphas=alphas,
            lengths=lengths,
            whole_vocabulary=whole_vocabulary,
            rows=rows,
            device=device,
            say=None if as_json else lambda text: typer.echo(f"{text} ...", err=True),
        )
    typer.echo(json.dumps(report, indent=2) if as_json else lines(report))
    if picture is not None:
        name = Path(report["model"]).name if Path(report["model"]).is_dir() else report["model"]
        _draw(lambda: draw(report, picture, f"{name}: embeddings under noise"), picture)


def harness(
    adapter: Annotated[
        str, typer.Argument(metavar="DIR", help="The folder of a finished run, or an adapter's Hub id.")
    ],
    tasks: Annotated[
        str, typer.Option(metavar="A,B,...", help="Names of lm-eval's tasks or groups.")
    ] = "arc_challenge,hellaswag,mmlu,truthfulqa_mc2",
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question; default: the Open LLM Leaderboard's.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task at most, for a quick look.")] = None,
    include_path: Annotated[
        Path | None, typer.Option(exists=False, file_okay=False, help="Folder with task files of your own.")
    ] = None,
    base_alone: Annotated[
        bool, typer.Option("--base-alone/--no-base-alone", help="Also measure the base without the adapter.")
    ] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    base: Annotated[str | None, typer.Option(help="Base model in place of the recorded one.")] = None,
    revision: Annotated[str | None, typer.Option(help="Hub branch, tag or commit of the adapter.")] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where to compute.")] = "auto",
    precision: Annotated[str, typer.Option(metavar="auto|bf16|fp16|fp32", help="Number format.")] = "auto",
    output: Annotated[Path | None, typer.Option(dir_okay=False, help="Also write the JSON to a file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure capability with lm-eval, base and adapter side by side.

    Default: the tasks of NEFTune's Figure 3.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    _check_device(device)
    if output is not None and not output.parent.is_dir():
        raise UserInputError(f"--output: there is no folder {str(output.parent)!r}. Make it first.")
    from ...evaluation.harness import evaluate_adapter, lines
    from ...evaluation.measures_file import keep_measures
    from ...files.json_file import write_json

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        report = evaluate_adapter(
            adapter,
            tasks=names,
            num_fewshot=num_fewshot,
            limit=limit,
            include_path=include_path,
            base_alone=base_alone,
            batch_size=batch_size,
            base=base,
            revision=revision,
            device=device,
            precision=precision,
        )
    if limit is None:  # of some questions alone no report should speak
        scores = {f"{entry['task']}_{entry['metric']}": entry["adapter"]["value"] for entry in report["results"]}
        keep_measures(adapter, "harness", scores)
    if output is not None:
        try:
            write_json(output, report)
        except OSError as error:
            raise UserInputError(f"--output: {str(output)!r} cannot be written ({error}).") from error
        typer.echo(f"written: {output}", err=True)
    typer.echo(json.dumps(report, indent=2) if as_json else lines(report))


def _numbers(option: str, text: str, kind: type, smallest: float) -> list[Any]:
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(math.isfinite(number) and number >= smallest for number in numbers):
        what = "whole numbers" if kind is int else "numbers"
        raise UserInputError(f"{option}: must be {what} of {smallest} or more with commas between, got {text!r}.")
    return sorted(set(numbers))


def _check_device(device: str) -> None:
    if device not in ("auto", "cpu", "cuda"):
        raise UserInputError(f"--device: must be auto, cpu or cuda, got {device!r}.")


def _draw(drawing: Callable[[], bool], path: Path) -> None:
    try:
        drawn = drawing()
    except (OSError, ValueError) as error:
        raise UserInputError(f"--picture: {str(path)!r} cannot be written ({error}). Give a .png file.") from error
    if not drawn:
        raise UserInputError("--picture: matplotlib is missing. Install the extra: pip install 'qlora-neft[plots]'")
    typer.echo(f"written: {path}", err=True)
