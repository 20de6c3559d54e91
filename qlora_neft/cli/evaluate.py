"""eval text and eval alpaca: what a model's answers are like, and whether they are preferred."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserInputError
from ..paths import kind_of
from .options import (
    REPETITION_PENALTY,
    BaseOption,
    BatchOption,
    DeviceOption,
    InstructionsOption,
    JsonOption,
    LeastTokensOption,
    OverridesArgument,
    PenaltyOption,
    PrecisionOption,
    RowsOption,
    RunsArgument,
    SampleOption,
    SeedOption,
    SetOption,
    TemperatureOption,
    TokensOption,
    TopKOption,
    TopPOption,
    complete_recipe,
    decoding_of,
    print_json,
    quiet,
    say,
)

if TYPE_CHECKING:
    from ..evaluation.alpaca.score import Score
    from ..generation.decode import Decoding

OUTPUT_SUFFIXES = (".json", ".jsonl", ".txt", ".csv", ".md")  # a name that ends so is a file, there or not


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
    from ..evaluation.texts import chunk_length, measure_texts, read_texts, text_table
    from ..run_folder.record import keep_measures

    length = chunk_length(chunk, cutoff)
    named = [*(sources or []), *(str(path) for path in outputs or [])]
    if not named:
        raise UserInputError("eval text: name files of outputs (--outputs FILE), or folders of runs.")
    from ..evaluation.runs import Machine

    options = {"instructions": instructions, "rows": rows, "machine": Machine(device, precision, base, batch_size)}
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
        typer.echo(text_table(found).plain())


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
        from ..evaluation.alpaca.score import score_files

        _show_score(score_files(score, outputs), as_json)
        return
    if (source is None) == (outputs is None):
        raise UserInputError("eval alpaca: give a DIR that answers, or --outputs FILE with --judge or --score.")
    if source is None and judge is None:
        raise UserInputError("--outputs: give --judge or --score with it. Lengths and repetition: eval text.")
    from ..evaluation.runs import Machine

    machine = Machine(device, precision, base, batch_size)
    drawing = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    with quiet():
        decoding = decoding_of(max_new_tokens, min_new_tokens, repetition_penalty, sample=sample, **drawing)
        if judge is not None:
            from ..evaluation.alpaca.judge import check_judging, judge_outputs

            check_judging(judge, reference, instructions)
        if source is not None:
            options = {"output": output, "instructions": instructions, "rows": rows, "machine": machine}
            outputs = _answered(source, decoding, {"meta_prompt": meta_prompt, **options})
        found = None
        if judge is not None:
            asked = {"reference": reference, "annotator": annotator, "instructions": instructions}
            found = judge_outputs(judge, outputs, machine=machine, say=say, **asked)
            if source is not None:
                from ..run_folder.record import keep_measures

                keep_measures(source, "alpaca", found.measures())
    if found is not None:
        _show_score(found, as_json)
    else:
        typer.echo(json.dumps({"outputs": str(outputs)}) if as_json else f"written: {outputs}")


def _is_model(name: str) -> bool:
    """A folder, or a Hub id; anything else is a file of outputs."""
    is_hub_id = kind_of(name, suffixes=OUTPUT_SUFFIXES) == "hub" and "/" in name
    return is_hub_id or Path(name).expanduser().is_dir()


def _answered(source: str, decoding: Decoding, options: dict[str, Any]) -> Path:
    """The file of a model's answers to AlpacaEval's instructions, made where it is not there."""
    from ..evaluation.alpaca.answer import answer_instructions

    return answer_instructions(source, decoding=decoding, say=say, **options)


def _show_score(found: Score, as_json: bool) -> None:
    for line in found.notes():
        say(line)
    if as_json:
        print_json(found.to_dict())
    else:
        typer.echo("\n".join(found.lines()))


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
    from ..evaluation.overlap import check_installed

    check_installed()
    with quiet():
        from ..evaluation.overfit import overfit_of_runs, overfit_table
        from ..evaluation.runs import Machine
        from ..generation.decode import Decoding

        found = overfit_of_runs(
            sources,
            rows=rows,
            decoding=Decoding(max_new_tokens=max_new_tokens, repetition_penalty=repetition_penalty),
            machine=Machine(device, precision, base, batch_size),
            overrides=changes or (),
            say=say,
        )
    if as_json:
        print_json({name: result.to_dict(answers=answers) for name, result in found.items()})
    else:
        typer.echo(overfit_table(found).plain())


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
    from ..evaluation.runs import Machine, named_sets

    sets = named_sets(data or [])
    with quiet():
        from ..evaluation.losses import loss_table, losses_of_runs

        machine = Machine(device, precision, base, batch_size)
        found = losses_of_runs(sources, sets, rows=rows, machine=machine, overrides=changes or (), say=say)
    if as_json:
        print_json({"sets": found})
    else:
        typer.echo(loss_table(found, sources).plain())


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
    from ..evaluation.embeddings.report import draw, lines
    from ..evaluation.embeddings.subject import report_on

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
    from ..evaluation.harness import evaluate_adapter, lines
    from ..files import write_json
    from ..run_folder.record import keep_measures

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


app = typer.Typer(
    name="eval",
    help="Measure what the NEFTune paper measures.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(text)
app.command()(alpaca)
app.command()(overfit)
app.command()(loss)
app.command()(noise)
app.command()(harness)
