"""The verbs under `eval alpaca`: answer AlpacaEval's instructions, have the answers judged, score the verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..display.terminal import echo
from ..errors import UserInputError
from ..evaluation.alpaca.judges import ANNOTATOR
from ..evaluation.defaults import ANSWER_TOKENS, HELD_OUT, REPETITION_PENALTY
from ..imports import imports_that_stay
from .options import (
    AnsweringArgument,
    BaseOption,
    BatchOption,
    DeviceOption,
    Group,
    InstructionsOption,
    JsonOption,
    LeastTokensOption,
    PenaltyOption,
    PrecisionOption,
    RowsOption,
    SampleOption,
    SeedOption,
    TemperatureOption,
    TokensOption,
    TopKOption,
    TopPOption,
    Verb,
    decoding_of,
    print_json,
    quiet,
    say,
)

if TYPE_CHECKING:
    from ..evaluation.alpaca.answer import Answered
    from ..evaluation.alpaca.score import Score
    from ..generation.decode import Decoding

OLD_FORM = "old-form"

AnswersOption = Annotated[
    Path | None,
    typer.Option(help="File for the answers; default: alpaca_outputs.json in DIR, or MODEL.alpaca_outputs.json here."),
]
TemplateOption = Annotated[
    str | None,
    typer.Option(
        metavar="alpaca|vicuna|chat|none|FILE",
        help="How MODEL is asked; default: its chat template, or else alpaca. An adapter has that of its training.",
    ),
]
MetaPromptOption = Annotated[
    str, typer.Option(metavar="TEXT", help="Text appended to every instruction, such as: Generate a long response")
]
JUDGES = "alpaca_eval|DIR|ID"
ReferenceOption = Annotated[
    Path | None,
    typer.Option(
        help="Answers of the model to compare with; default: those the judge's tables are against, from AlpacaEval."
    ),
]
AnnotatorOption = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE",
        help="Annotator of the alpaca_eval package: alpaca_eval_gpt4 (AlpacaEval 1), chatgpt_fn (NEFTune's Table 3), "
        "weighted_alpaca_eval_gpt4_turbo (AlpacaEval 2), any other, or a configuration of your own.",
    ),
]


class _Alpaca(Group):
    """Also takes the form before there were three verbs, ``eval alpaca DIR|--score FILE ...``, for one more version."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # Anything but a verb or a request for help is the old form: its first word is a folder or an option.
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            say("eval alpaca: now three verbs, `eval alpaca answer|judge|score`; this form ends with the next version")
            args = [OLD_FORM, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="alpaca",
    cls=_Alpaca,
    help="AlpacaEval: answer its instructions, have the answers judged, score the verdicts.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command(cls=Verb)
def answer(
    source: AnsweringArgument,
    output: AnswersOption = None,
    instructions: InstructionsOption = None,
    rows: RowsOption = 0,
    meta_prompt: MetaPromptOption = "",
    max_new_tokens: TokensOption = ANSWER_TOKENS,
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
    prompt_template: TemplateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer AlpacaEval's instructions with an adapter, or with an untuned model.

    Repeat the command to continue where it was interrupted.
    """
    drawing = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    from ..evaluation.runs import Machine

    machine = Machine(device, precision, base, batch_size)
    options = {"output": output, "instructions": instructions, "rows": rows, "meta_prompt": meta_prompt}
    with quiet():
        decoding = decoding_of(max_new_tokens, min_new_tokens, repetition_penalty, sample=sample, **drawing)
        found = answers_of(source, decoding, machine=machine, prompt_template=prompt_template, **options)
    _print_outputs(found.path, as_json)


@app.command(cls=Verb)
def judge(
    source: Annotated[
        str, typer.Argument(metavar="DIR|FILE", help="A run whose answers are judged, or a file of answers.")
    ],
    judge: Annotated[str, typer.Option(metavar=JUDGES, help="The judge: the alpaca_eval package, or a local model.")],
    reference: ReferenceOption = None,
    annotator: AnnotatorOption = ANNOTATOR,
    instructions: InstructionsOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Let a judge compare the answers with a reference's, and score its verdicts.

    Pairs judged before are not judged again.
    """
    # A score is kept with a run, so a folder is looked into; a file of answers belongs to nobody.
    outputs, is_run = Path(source).expanduser(), Path(source).expanduser().is_dir()
    is_held_out = is_run and str(instructions) == HELD_OUT
    if is_run:
        outputs /= "held_out_outputs.json" if is_held_out else "alpaca_outputs.json"
        if not outputs.is_file():
            raise UserInputError(f"{source}: has no {outputs.name}. Write it first: qlora-neft eval alpaca answer DIR.")
    with quiet():
        with imports_that_stay():
            from ..evaluation.alpaca.answer import held_out_references
            from ..evaluation.alpaca.judge import check_judging
        from ..evaluation.runs import Machine

        against = held_out_references(source) if is_held_out and reference is None else reference
        # A judge that is missing, or cannot work, is reported before a model is loaded for it.
        check_judging(judge, against, instructions, annotator)
        options = {"reference": against, "annotator": annotator, "instructions": instructions}
        found = judged(judge, outputs, source if is_run else None, machine=Machine(device, precision), **options)
    _print_score(found, as_json)


@app.command(cls=Verb)
def score(
    annotations: Annotated[Path, typer.Argument(metavar="FILE", help="Annotations of a judge.")],
    outputs: Annotated[Path | None, typer.Option(help="The answers that were judged, for their lengths.")] = None,
    key: Annotated[
        Path | None, typer.Option(help="The key of a study that `pairs` wrote: FILE is the study, filled in.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Score a judge's annotations, or people's: win rate, standard error, length.

    Needs no model and loads no torch.
    """
    if key is not None:
        from ..evaluation.alpaca.study import score_study

        if outputs is not None:
            raise UserInputError("--outputs: has no effect on a study, which holds its answers. Omit it.")
        _print_score(score_study(annotations, key), as_json)
        return
    from ..evaluation.alpaca.score import score_files

    _print_score(score_files(annotations, outputs, "FILE"), as_json)


@app.command(cls=Verb)
def pairs(
    model: Annotated[Path, typer.Argument(metavar="DIR|FILE", help="The run, or answers, whose wins are counted.")],
    other: Annotated[Path, typer.Argument(metavar="DIR|FILE", help="The run, or answers, it is compared with.")],
    output: Annotated[
        Path, typer.Option(help="File to write for the people who judge; each fills in the verdicts.")
    ] = Path("study.json"),
    key: Annotated[Path, typer.Option(help="File to write that says which answer is whose; keep it apart.")] = Path(
        "study.key.json"
    ),
    rows: Annotated[int, typer.Option(min=0, help="Number of pairs (0: all); the paper had 140.")] = 140,
    seed: Annotated[int, typer.Option(help="Of the draw of instructions and of the order of answers.")] = 0,
) -> None:
    """Write blind pairs of two models' answers for a human study, in random order.

    Score what people filled in with: eval alpaca score STUDY --key KEY.
    """
    from ..evaluation.alpaca.study import write_study

    files = [path / "alpaca_outputs.json" if path.is_dir() else path for path in (model, other)]
    count = write_study(*files, output, key, rows=rows, seed=seed)
    echo(f"written: {output}, {count} pairs; each verdict is to be 1 or 2 for the better answer, or 0 for a draw")
    echo(f"written: {key}, which answer is whose")


@app.command(OLD_FORM, cls=Verb, hidden=True)
def answer_judge_or_score(
    source: Annotated[str | None, typer.Argument(metavar="[DIR]")] = None,
    annotations: Annotated[Path | None, typer.Option("--score", metavar="ANNOTATIONS")] = None,
    outputs: Annotated[Path | None, typer.Option()] = None,
    output: AnswersOption = None,
    by: Annotated[str | None, typer.Option("--judge", metavar=JUDGES)] = None,
    reference: ReferenceOption = None,
    annotator: AnnotatorOption = ANNOTATOR,
    instructions: InstructionsOption = None,
    rows: RowsOption = 0,
    meta_prompt: MetaPromptOption = "",
    max_new_tokens: TokensOption = ANSWER_TOKENS,
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
    """Do the work of all three verbs, as the form before them did. It goes with the next version."""
    # Score only: options of the other verbs would have no effect, and are refused.
    if annotations is not None:
        if source is not None or by is not None:
            raise UserInputError("--score: scores existing annotations; give no DIR and no --judge with it.")
        for option, given in (("--output", output), ("--reference", reference), ("--instructions", instructions)):
            if given is not None:
                raise UserInputError(f"{option}: has no effect on --score, got {str(given)!r}. Omit it.")
        from ..evaluation.alpaca.score import score_files

        _print_score(score_files(annotations, outputs, "--score"), as_json)
        return
    # A model answers (DIR), or its answers are at hand (--outputs): one of the two.
    if (source is None) == (outputs is None):
        raise UserInputError("eval alpaca: give a DIR that answers, or --outputs FILE with --judge or --score.")
    if by is None and source is None:
        raise UserInputError("--outputs: give --judge or --score with it. Lengths and repetition: eval text.")
    if source is None:
        judge(str(outputs), str(by), reference, annotator, instructions, device, precision, as_json)
        return
    drawing = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    from ..evaluation.runs import Machine

    machine = Machine(device, precision, base, batch_size)
    # Answer, and judge if there is a judge.
    asked = {"output": output, "instructions": instructions, "rows": rows, "meta_prompt": meta_prompt}
    comparing = {"reference": reference, "annotator": annotator, "instructions": instructions}
    found = None
    with quiet():
        decoding = decoding_of(max_new_tokens, min_new_tokens, repetition_penalty, sample=sample, **drawing)
        if by is not None:
            with imports_that_stay():
                from ..evaluation.alpaca.judge import check_judging

            check_judging(by, reference, instructions, annotator)  # before hours of answering
        answers = answers_of(source, decoding, machine=machine, **asked)
        if by is not None:
            found = judged(by, answers.path, source, machine=machine, **comparing)
    if found is not None:
        _print_score(found, as_json)
    else:
        _print_outputs(answers.path, as_json)


def answers_of(source: str, decoding: Decoding, **options: Any) -> Answered:
    """Return a model's answers to AlpacaEval's instructions, after answering what is missing."""
    with imports_that_stay():
        from ..evaluation.alpaca.answer import answer_instructions

    return answer_instructions(source, decoding=decoding, say=say, **options)


def judged(judge: str, outputs: Path, source: str | None, **options: Any) -> Score:
    """Have answers judged; keep the score with the run they are from, if there is one."""
    with imports_that_stay():
        from ..evaluation.alpaca.judge import judge_outputs
    from ..run_folder.record import keep_measures

    found = judge_outputs(judge, outputs, say=say, **options)
    if source is not None:
        keep_measures(source, "alpaca", found.measures(), found.made)
    return found


def _print_outputs(outputs: Path, as_json: bool) -> None:
    echo(json.dumps({"outputs": str(outputs)}) if as_json else f"written: {outputs}")


def _print_score(found: Score, as_json: bool) -> None:
    # On stderr: stdout holds the score alone.
    say(*found.notes())
    if as_json:
        print_json(found.to_dict())
    else:
        echo("\n".join(found.lines()))
