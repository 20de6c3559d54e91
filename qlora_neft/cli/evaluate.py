"""The verbs under `eval`: text, alpaca, overfit, loss, flips, harness."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ..display.terminal import echo
from ..errors import UserInputError
from ..evaluation.defaults import ANSWER_TOKENS, RECITED_ROWS, RECITED_TOKENS, REPETITION_PENALTY
from ..imports import imports_that_stay
from ..paths import kind_of
from . import alpaca
from .alpaca import TemplateOption, answers_of
from .options import (
    AdapterArgument,
    BaseOption,
    BatchOption,
    DeviceOption,
    Group,
    InstructionsOption,
    JsonOption,
    OverridesArgument,
    PenaltyOption,
    PictureOption,
    PrecisionOption,
    RevisionOption,
    RowsOption,
    RunsArgument,
    SetOption,
    TokensOption,
    Verb,
    check_device,
    check_parent,
    complete_recipe,
    decoding_of,
    draw_or_refuse,
    json_only,
    print_json,
    quiet,
    say,
)

OUTPUT_SUFFIXES = (".json", ".jsonl", ".txt", ".csv", ".md")  # a name that ends so is a file, there or not

app = typer.Typer(
    name="eval",
    cls=Group,
    help="Measure what the NEFTune paper measures.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(cls=Verb)
def text(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DIR|MODEL|FILE]...",
            help="Runs or untuned models, which answer AlpacaEval first; files of outputs.",
        ),
    ] = None,
    outputs: Annotated[
        list[Path] | None, typer.Option(help="File of outputs: AlpacaEval JSON, JSON lines, or one output per line.")
    ] = None,
    chunk: Annotated[int | None, typer.Option(help="Count n-grams in the first N words of an output.")] = None,
    cutoff: Annotated[
        str | None,
        typer.Option(
            metavar="alpaca|evol|sharegpt|platypus",
            help="The chunk the paper used for it: 50, 100, 150, 150; default: that of a run's data, or alpaca.",
        ),
    ] = None,
    instructions: InstructionsOption = None,
    rows: RowsOption = 0,
    max_new_tokens: TokensOption = ANSWER_TOKENS,
    repetition_penalty: PenaltyOption = REPETITION_PENALTY,
    batch_size: BatchOption = 8,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    base: BaseOption = None,
    prompt_template: TemplateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure outputs: length, repetition, log-diversity."""
    from ..evaluation.texts import DEFAULT_CHUNK, chunk_length, chunk_of_run, measure_texts, read_texts, text_table
    from ..run_folder.record import keep_measures

    # Options first; files and models after them.
    length = chunk_length(chunk, cutoff)
    named = [*(sources or []), *(str(path) for path in outputs or [])]
    if not named:
        raise UserInputError("eval text: name files of outputs (--outputs FILE), or folders of runs.")
    from ..evaluation.runs import Machine

    options = {"instructions": instructions, "rows": rows, "machine": Machine(device, precision, base, batch_size)}
    options["prompt_template"] = prompt_template
    found = {}
    for name in named:
        if not _is_model(name):
            found[name] = measure_texts(read_texts(Path(name), "--outputs"), length or DEFAULT_CHUNK)
            continue
        with quiet():
            decoding = decoding_of(max_new_tokens, 0, repetition_penalty, sample=False)
            answered = answers_of(name, decoding, **options)
            one = length or chunk_of_run(name)
        found[name] = measure_texts([row["output"] for row in answered.rows], one)
        keep_measures(name, "text", found[name].main(), {**answered.made, "chunk": one})
    chunks = sorted({measures.chunk for measures in found.values()})
    if len(chunks) > 1:
        say(
            f"chunks differ ({', '.join(map(str, chunks))}), each the paper's for its data: repetition and diversity "
            "do not compare. For one chunk give --chunk N."
        )
    if as_json:
        results = {name: measures.to_dict() for name, measures in found.items()}
        # One source gives its measures alone; several are keyed by name.
        print_json(next(iter(results.values())) if len(results) == 1 else results)
    else:
        echo(text_table(found).plain())


def _is_model(name: str) -> bool:
    """Whether a source is a folder or a Hub id; anything else is a file of outputs."""
    # A name that ends like a file is one, even if it is missing: it is then reported as a file, not looked up on the
    # Hub.
    is_hub_id = kind_of(name, suffixes=OUTPUT_SUFFIXES) == "hub" and "/" in name
    return is_hub_id or Path(name).expanduser().is_dir()


app.add_typer(alpaca.app)


@app.command(cls=Verb)
def overfit(
    sources: RunsArgument,
    rows: Annotated[int, typer.Option(min=1, help="Answer the first N training rows of each run.")] = RECITED_ROWS,
    max_new_tokens: TokensOption = RECITED_TOKENS,
    repetition_penalty: PenaltyOption = REPETITION_PENALTY,
    batch_size: BatchOption = 8,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    base: BaseOption = None,
    changes: SetOption = None,
    answers: Annotated[bool, typer.Option("--answers", help="With --json: include every answer.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare greedy answers to training prompts with what was trained.

    By ROUGE-L and BLEU-4; high scores mean answers learned by heart.
    """
    from ..evaluation.overlap import check_installed

    # Before minutes of answering: the measures need an extra.
    check_installed()
    with quiet():
        with imports_that_stay():
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
        echo(overfit_table(found).plain())


@app.command(cls=Verb)
def loss(
    sources: RunsArgument,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FILE", help="Another set to measure on: a data file or Hub id, in the run's own template."
        ),
    ] = None,
    rows: RowsOption = 0,
    batch_size: BatchOption = 8,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    base: BaseOption = None,
    changes: SetOption = None,
    samples: Annotated[bool, typer.Option("--samples", help="With --json: include the loss of every row.")] = False,
    picture: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Draw histograms of the rows' losses to this PNG file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure losses without noise: training rows, held-out rows, other data.

    For the base alone and for each adapter, in nats per trained token.
    """
    from ..evaluation.runs import Machine, named_sets

    # Before the slow imports: what is wrong with an option is said at once.
    sets = named_sets(data or [])
    with quiet():
        with imports_that_stay():
            from ..evaluation.losses import draw_samples, loss_table, losses_of_runs

        options = {"rows": rows, "machine": Machine(device, precision, base, batch_size), "overrides": changes or ()}
        found = losses_of_runs(sources, sets, samples=samples or picture is not None, say=say, **options)
        if picture is not None:
            draw_or_refuse(lambda: draw_samples(found, picture, "losses without noise"), picture)
    if as_json:
        kept = [{key: value for key, value in entry.items() if samples or key != "samples"} for entry in found]
        print_json({"sets": kept})
    else:
        echo(loss_table(found, sources).plain())


PAPER_ROWS = 5200  # the paper's sample of Alpaca


@app.command("noise", cls=Verb, hidden=True)  # the old name
@app.command(cls=Verb)
def flips(
    source: Annotated[
        str,
        typer.Argument(
            metavar="NAME|DIR|MODEL",
            help="A recipe, a run's folder, or a model (Hub id, folder, bundled:...); a model has no data.",
            autocompletion=complete_recipe,
        ),
    ],
    overrides: OverridesArgument = None,
    alpha: Annotated[str, typer.Option(metavar="A,B,...", help="Noise strengths.")] = "5,10,15",
    length: Annotated[
        str | None,
        typer.Option(metavar="L,M,...", help="Noise the whole vocabulary, as in sequences of these lengths."),
    ] = None,
    whole_vocabulary: Annotated[
        bool, typer.Option("--whole-vocabulary", help="Also noise the whole vocabulary, at lengths 50, 100, 200, 500.")
    ] = False,
    rows: Annotated[
        int, typer.Option("-n", "--rows", min=1, help="Maximum number of training sequences.")
    ] = PAPER_ROWS,
    device: DeviceOption = "auto",
    picture: PictureOption = None,
    as_json: JsonOption = False,
) -> None:
    """Count the tokens that noise turns into other tokens.

    Also the top 100 singular values of the embedding similarity matrix. Only the embedding is read.
    """
    alphas = _numbers("--alpha", alpha, float, 0)
    lengths = _numbers("--length", length, int, 1) if length is not None else []
    check_device(device)
    with imports_that_stay():
        from ..evaluation.embeddings.report import draw, lines
        from ..evaluation.embeddings.subject import report_on

    with json_only(as_json):
        report = report_on(
            source,
            overrides or (),
            alphas=alphas,
            lengths=lengths,
            whole_vocabulary=whole_vocabulary,
            rows=rows,
            device=device,
            say=None if as_json else lambda line: say(f"{line} ..."),
        )
    if as_json:
        print_json(report)
    else:
        echo(lines(report))
    if picture is not None:
        name = Path(report["model"]).name if Path(report["model"]).is_dir() else report["model"]
        draw_or_refuse(lambda: draw(report, picture, f"{name}: embeddings under noise"), picture)


def _numbers(option: str, text: str, kind: type, smallest: float) -> list[Any]:
    """Return the distinct numbers of an option such as ``5,10,15``, sorted."""
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(math.isfinite(number) and number >= smallest for number in numbers):
        what = "whole numbers" if kind is int else "numbers"
        raise UserInputError(f"{option}: must be {what} of {smallest} or more separated by commas, got {text!r}.")
    # Distinct and in order, so that tables and pictures do not depend on how the option was written.
    return sorted(set(numbers))


@app.command(cls=Verb)
def harness(
    adapter: AdapterArgument,
    tasks: Annotated[
        str, typer.Option(metavar="A,B,...", help="Tasks or groups of lm-eval.")
    ] = "arc_challenge,hellaswag,mmlu,truthfulqa_mc2",
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question; default: the Open LLM Leaderboard's.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of questions per task, for a quick look.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(exists=False, file_okay=False, help="Folder with your own task files.")
    ] = None,
    base_alone: Annotated[
        bool, typer.Option("--base-alone/--no-base-alone", help="Also measure the base without the adapter.")
    ] = True,
    batch_size: BatchOption = 8,
    base: BaseOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    output: Annotated[Path | None, typer.Option(dir_okay=False, help="Also write the JSON to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure capabilities with lm-eval, base and adapter side by side.

    By default on the tasks of NEFTune's Figure 3.
    """
    # What can be checked without lm-eval is checked before it is imported, which takes long.
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    check_device(device)
    if output is not None:
        check_parent(output)
    with imports_that_stay():
        from ..evaluation.harness import evaluate_adapter, lines
    from ..files import write_json
    from ..run_folder.record import keep_measures

    with json_only(as_json):
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
    if limit is None:  # scores on some of the questions do not belong into a report
        scores = {f"{entry['task']}_{entry['metric']}": entry["adapter"]["value"] for entry in report["results"]}
        made = {
            f"{entry['task']}_{entry['metric']}": {"shots": entry["num_fewshot"], "lm_eval": report["lm_eval"]}
            for entry in report["results"]
        }
        keep_measures(adapter, "harness", scores, made)
    if output is not None:
        try:
            write_json(output, report)
        except OSError as error:
            raise UserInputError(f"--output: {str(output)!r} cannot be written ({error}).") from error
        say(f"written: {output}")
    if as_json:
        print_json(report)
    else:
        echo(lines(report))
