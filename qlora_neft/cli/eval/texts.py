"""eval text and eval alpaca: what a model's answers are like, and whether they are preferred."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import UserInputError
from ..answering import (
    REPETITION_PENALTY,
    LeastTokensOption,
    PenaltyOption,
    SampleOption,
    SeedOption,
    TemperatureOption,
    TokensOption,
    TopKOption,
    TopPOption,
    decoding_of,
)
from ..recipes import JsonOption
from .options import (
    BaseOption,
    BatchOption,
    DeviceOption,
    InstructionsOption,
    PrecisionOption,
    RowsOption,
    print_json,
    quiet,
    say,
)

if TYPE_CHECKING:
    from ...decoding import Decoding


def text(
    sources: Annotated[
        list[str] | None, typer.Argument(metavar="[DIR|FILE]...", help="Runs (they answer first), or files of outputs.")
    ] = None,
    outputs: Annotated[
        list[Path] | None, typer.Option(help="File of outputs: AlpacaEval JSON, JSON lines, or an output a line.")
    ] = None,
    chunk: Annotated[int | None, typer.Option(help="Words at the beginning of an output to count n-grams in.")] = None,
    cutoff: Annotated[
        str | None, typer.Option(metavar="alpaca|evol|sharegpt|platypus", help="The paper's chunk: 50, 100, 150, 150.")
    ] = None,
    instructions: InstructionsOption = None,
    rows: RowsOption = 0,
    max_new_tokens: TokensOption = 1024,
    repetition_penalty: PenaltyOption = REPETITION_PENALTY,
    batch_size: BatchOption = 8,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure outputs: length, repetition, log-diversity."""
    from ...evaluation.measures_file import keep_measures
    from ...evaluation.plain_table import plain_table
    from ...evaluation.read_texts import read_texts
    from ...evaluation.text_measures import chunk_length, measure_texts, table

    length = chunk_length(chunk, cutoff)
    named = [*(sources or []), *(str(path) for path in outputs or [])]
    if not named:
        raise UserInputError("eval text: name files of outputs (--outputs FILE), or folders of runs.")
    options = {"instructions": instructions, "rows": rows, "batch_size": batch_size, "base": base}
    options |= {"device": device, "precision": precision}
    found = {}
    for name in named:
        file = Path(name)
        if _is_model(name):
            with quiet():
                decoding = decoding_of(max_new_tokens, 0, repetition_penalty, sample=False)
                file = _answered(name, decoding, options)
        found[name] = measure_texts(read_texts(file, "--outputs"), length)
        keep_measures(name, "text", found[name].main())
    if as_json:
        results = {name: measures.to_dict() for name, measures in found.items()}
        print_json(next(iter(results.values())) if len(results) == 1 else results)
    else:
        typer.echo(plain_table(*table(found)))


def alpaca(
    source: Annotated[
        str | None, typer.Argument(metavar="[DIR]", help="Folder of a run, or an adapter, that answers.")
    ] = None,
    score: Annotated[Path | None, typer.Option(metavar="ANNOTATIONS", help="Score a judge's annotations.")] = None,
    outputs: Annotated[Path | None, typer.Option(help="With --score or --judge: the answers that were judged.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where the answers go; default: alpaca_outputs.json in DIR.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(metavar="alpaca_eval|DIR|ID", help="Judge the answers: the alpaca_eval package, or a model."),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="The other model's answers; default: text_davinci_003's, with the instructions.")
    ] = None,
    annotator: Annotated[
        str, typer.Option(help="Of the alpaca_eval package; the paper: alpaca_eval_gpt4.")
    ] = "weighted_alpaca_eval_gpt4_turbo",
    instructions: InstructionsOption = None,
    rows: RowsOption = 0,
    meta_prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="Put behind every instruction, such as: Generate a long response")
    ] = "",
    max_new_tokens: TokensOption = 1024,
    min_new_tokens: LeastTokensOption = 0,
    repetition_penalty: PenaltyOption = REPETITION_PENALTY,
    sample: SampleOption = False,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = None,
    batch_size: BatchOption = 8,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer AlpacaEval's instructions, have them judged, score the verdicts."""
    if score is not None:
        if source is not None or judge is not None:
            raise UserInputError("--score: scores annotations that are there; give no DIR and no --judge with it.")
        for option, given in (("--output", output), ("--reference", reference), ("--instructions", instructions)):
            if given is not None:
                raise UserInputError(f"{option}: has no effect on --score, got {str(given)!r}. Leave it away.")
        _show_score(_scored(score, outputs), as_json)
        return
    if (source is None) == (outputs is None):
        raise UserInputError("eval alpaca: give a DIR that answers, or --outputs FILE with --judge or --score.")
    if source is None and judge is None:
        raise UserInputError("--outputs: give --judge or --score with it. Lengths and repetition: eval text.")
    machine = {"device": device, "precision": precision, "instructions": instructions}
    drawing = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    with quiet():
        decoding = decoding_of(max_new_tokens, min_new_tokens, repetition_penalty, sample=sample, **drawing)
        from ...evaluation.alpaca_run import check_judging, judged, keep_score

        if judge is not None:
            check_judging(judge, reference, instructions)

        if source is not None:
            options = {"output": output, "rows": rows, "batch_size": batch_size, "base": base, **machine}
            outputs = _answered(source, decoding, {"meta_prompt": meta_prompt, **options})
        found = None
        if judge is not None:
            found = judged(judge, outputs, reference=reference, annotator=annotator, say=say, **machine)
            if source is not None:
                keep_score(source, found)
    if found is not None:
        _show_score(found, as_json)
    else:
        typer.echo(json.dumps({"outputs": str(outputs)}) if as_json else f"written: {outputs}")


def _is_model(name: str) -> bool:
    """A folder, or a Hub id; anything else is a file of outputs."""
    path = Path(name).expanduser()
    return path.is_dir() or (not path.exists() and not path.suffix and name.count("/") == 1)


def _answered(source: str, decoding: Decoding, options: dict[str, Any]) -> Path:
    """The file of a model's answers to AlpacaEval's instructions, made where it is not there."""
    from ...evaluation.alpaca_run import alpaca_answers

    return alpaca_answers(source, decoding=decoding, say=say, **options)


def _scored(annotations: Path, outputs: Path | None) -> dict[str, Any]:
    from ...evaluation.alpaca_format import read_annotations, read_outputs, score

    return score(read_annotations(annotations), None if outputs is None else read_outputs(outputs))


def _show_score(found: dict[str, Any], as_json: bool) -> None:
    from ...evaluation.score_lines import notes, score_lines

    for line in notes(found):
        say(line)
    if as_json:
        print_json(found)
    else:
        typer.echo("\n".join(score_lines(found)))
