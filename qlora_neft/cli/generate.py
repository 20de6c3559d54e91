"""The verbs that talk with an adapter: generate and chat."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..display.terminal import echo_result
from ..errors import UserInputError
from ..evaluation.defaults import REPETITION_PENALTY
from ..imports import imports_that_stay
from .options import (
    AdapterArgument,
    BaseOption,
    DeviceOption,
    LeastTokensOption,
    PenaltyOption,
    PrecisionOption,
    RevisionOption,
    SampleOption,
    SeedOption,
    TemperatureOption,
    TokensOption,
    TopKOption,
    TopPOption,
    decoding_of,
    json_only,
    say,
)

if TYPE_CHECKING:
    from ..adapter.folder import AdapterFolder
    from ..adapter.load import Trained
    from ..generation.begun import Begun
    from ..generation.decode import Decoding
    from ..generation.output import Replies
    from ..generation.requests import Request

TemplateOption = Annotated[
    str | None,
    typer.Option(
        metavar="alpaca|vicuna|chat|none|FILE.jinja",
        help="Prompt template (also alpaca-newline, alpaca-space); default: the run's own.",
    ),
]
SystemOption = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="System message; default: the run's own (data.system_prompt); '': none."),
]
BaseAloneOption = Annotated[bool, typer.Option("--base-alone", help="Ask the base, without the adapter.")]
CompareOption = Annotated[bool, typer.Option("--compare", help="Ask both the base and the adapter.")]


def generate(
    dir: AdapterArgument,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="Prompts; - reads one from standard input.")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Prompts: .txt or - (one per line), or rows of .jsonl, .json, .csv, .parquet.",
        ),
    ] = None,
    system: SystemOption = None,
    compare: CompareOption = False,
    base_alone: BaseAloneOption = False,
    max_new_tokens: TokensOption = 512,
    min_new_tokens: LeastTokensOption = 0,
    repetition_penalty: PenaltyOption = REPETITION_PENALTY,
    sample: SampleOption = False,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time; changes no answer.")] = 8,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="New file: .json a list, .jsonl JSON lines, others as printed."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")] = False,
    base: BaseOption = None,
    revision: RevisionOption = None,
    prompt_template: TemplateOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Answer prompts with a trained adapter.

    Prompts are formatted with the prompt template of the training run.
    """
    from ..adapter.folder import find_adapter

    _check_who_answers(compare=compare, base_alone=base_alone)
    drawing = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    adapter = find_adapter(dir, revision=revision, base=base)  # a wrong DIR is reported before torch is loaded
    decoding = decoding_of(max_new_tokens, min_new_tokens, repetition_penalty, sample=sample, **drawing)
    # Before the model is loaded, as everything that can be wrong with the input: a prompt file, the decoding, the
    # output.
    requests = _requests(prompts or [], file, adapter)
    names = ["base", "adapter"] if compare else ["base"] if base_alone else ["adapter"]
    from ..generation.output import check_new

    # Never overwritten: answers took hours to compute.
    if output is not None:
        check_new(output, "--output")
    with _loaded(adapter, prompt_template, device, precision) as trained:
        _say_system(trained, system)
        if system:
            requests = _with_system(trained, requests, system)
        elif system is not None:
            trained.prompts.system = None
        # Token by token only for somebody who watches; a pipe or a file gets whole answers.
        if sys.stdout.isatty() and len(requests) == 1 and not as_json and output is None:
            _stream(trained, requests, decoding, names)
        else:
            _answer_all(trained, requests, decoding, names, batch_size, output, as_json)


def chat(
    dir: AdapterArgument,
    system: SystemOption = None,
    compare: CompareOption = False,
    base_alone: BaseAloneOption = False,
    max_new_tokens: TokensOption = 512,
    min_new_tokens: LeastTokensOption = 0,
    repetition_penalty: PenaltyOption = REPETITION_PENALTY,
    sample: SampleOption = False,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = None,
    base: BaseOption = None,
    revision: RevisionOption = None,
    prompt_template: TemplateOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Chat with a trained adapter.

    Commands start with a slash: /help lists them.
    """
    from ..adapter.folder import find_adapter

    _check_who_answers(compare=compare, base_alone=base_alone)
    drawing = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    adapter = find_adapter(dir, revision=revision, base=base)  # a wrong DIR is reported before torch is loaded
    decoding = decoding_of(max_new_tokens, min_new_tokens, repetition_penalty, sample=sample, **drawing)
    with contextlib.suppress(ImportError):  # line editing and history, where Python has it
        import readline  # noqa: F401

    from ..display.safe_console import SafeConsole
    from ..generation.chat import Chat
    from ..generation.screen import Screen

    with _loaded(adapter, prompt_template, device, precision) as trained:
        screen = Screen(SafeConsole(highlight=False))
        screen.say(_title(trained), style="bold")
        _say_system(trained, system)
        with _named("--system"):
            talk = Chat(trained, decoding, screen, compare=compare, base_alone=base_alone, system=system)
        talk.run()


def _check_who_answers(*, compare: bool, base_alone: bool) -> None:
    if compare and base_alone:
        raise UserInputError("--compare: cannot be combined with --base-alone. Keep one.")


def _requests(prompts: Sequence[str], file: str | None, adapter: AdapterFolder) -> list[Request]:
    """Return the prompts from the arguments, a file (by the adapter's names of columns), or standard input."""
    from ..generation.requests import Names, requests_of_file, requests_of_stdin, requests_of_texts

    if file is not None:
        if prompts:
            raise UserInputError("--file: cannot be combined with PROMPT. Keep one.")
        data = adapter.recipe.data if adapter.recipe else None
        return requests_of_file(file, Names(data.columns, data.roles) if data else Names())
    # Without a prompt, what is piped in is one; at a terminal the program would seem to hang, waiting for input.
    if list(prompts) == ["-"] or (not prompts and not sys.stdin.isatty()):
        return requests_of_stdin()
    if not prompts:
        raise UserInputError("PROMPT: none given. Write it after DIR, pipe it in, or give --file. To talk: chat DIR.")
    return requests_of_texts(prompts)


def _say_system(trained: Trained, stated: str | None) -> None:
    """Say that requests get the training's system message: they are asked as rows without one were trained."""
    if stated is None and trained.prompts.system is not None:
        say("system message: the run's own, data.system_prompt. --system TEXT sets another, --system '' none.")


def _with_system(trained: Trained, requests: list[Request], system: str) -> list[Request]:
    from ..generation.chat import check_system

    with _named("--system"):
        check_system(trained.prompts, system)
    return [request.with_system(system) for request in requests]


@contextlib.contextmanager
def _loaded(
    adapter: AdapterFolder, prompt_template: str | None, device: str, precision: str
) -> Generator[Trained, None, None]:
    """Load the model, for a block in which the libraries are silent."""
    from rich.text import Text

    from ..display.safe_console import SafeConsole

    with imports_that_stay():
        from ..adapter.load import load_trained
        from ..display.console import quiet_libraries

    # On stderr, so that a redirected stdout holds answers and nothing else.
    console = SafeConsole(stderr=True, highlight=False)
    with quiet_libraries():
        with json_only(), console.status(Text(f"loading {adapter.source}")):
            trained = load_trained(adapter, device=device, precision=precision, prompt_template=prompt_template)
        # After loading: the guess needs the tokenizer.
        if trained.template_is_guessed:
            say(
                f"prompt template: {trained.prompts.name}, a guess: no record says what {adapter.source} was "
                "trained with. Set it with --prompt-template."
            )
        yield trained


def _stream(trained: Trained, requests: list[Request], decoding: Decoding, names: list[str]) -> None:
    """Print one answer, or two side by side, token by token."""
    from ..display.safe_console import SafeConsole
    from ..generation.generate import replies
    from ..generation.output import remarks
    from ..generation.screen import Screen

    found = {}
    with Screen(SafeConsole(highlight=False)).answers(names) as begin:
        for name in names:
            write = begin(name)
            [found[name]] = replies(trained, requests, decoding, base_alone=name == "base", write=write)
    say(*remarks(found))
    _fail_if_unanswered({reply.finish_reason for reply in found.values()})


def _answer_all(
    trained: Trained,
    requests: list[Request],
    decoding: Decoding,
    names: list[str],
    batch_size: int,
    output: Path | None,
    as_json: bool,
) -> None:
    from ..generation.generate import replies
    from ..generation.output import entries, with_progress, write_as_they_come

    # Generators: base and adapter answer batch by batch in turns, and the first answers are printed while later ones
    # are computed.
    suffix = "" if output is None else output.suffix.lower()
    # The file's ending decides, and --json for what goes to the terminal or to other endings.
    form = "list" if suffix == ".json" else "lines" if as_json or suffix == ".jsonl" else "text"
    begun = None if output is None else _begun(output, trained, requests, decoding, names, batch_size, form)
    first = begun.count if begun else 0
    if first:
        say(f"going on behind {first} answers of an interrupted command")
    sides = [
        replies(trained, requests, decoding, base_alone=name == "base", batch_size=batch_size, first=first)
        for name in names
    ]
    found = (dict(zip(names, together, strict=True)) for together in zip(*sides, strict=True))
    reasons: set[str] = set()
    shown = with_progress(found, len(requests) - first)
    lines = entries(_remarked(shown, reasons), form, len(requests), first)
    if output is None:
        for line in lines:
            echo_result(line, is_json=form != "text")
    else:
        say(f"written: {output}, {write_as_they_come(output, lines, begun)} answers")
    _fail_if_unanswered(reasons)


def _begun(
    output: Path,
    trained: Trained,
    requests: list[Request],
    decoding: Decoding,
    names: list[str],
    batch_size: int,
    form: str,
) -> Begun:
    """Return what an interrupted command has written of the same answers."""
    from dataclasses import asdict

    from ..adapter.folder import WEIGHTS
    from ..files import sha256_of_file
    from ..generation.begun import Begun, made_with

    folder = trained.folder
    made = made_with(
        sha256_of_file(folder.path / WEIGHTS),
        [request.to_dict() for request in requests],
        asdict(decoding),
        base=folder.base,
        prompt_template=trained.prompts.name,
        precision=str(trained.policy.compute_dtype),
        answered_by=names,
        batch_size=batch_size,
        form=form,
    )
    return Begun(output, made, batch_size)


def _remarked(answers: Iterator[Replies], reasons: set[str]) -> Iterator[Replies]:
    """Print the remarks on each answer before yielding it; collect why answers ended in ``reasons``."""
    from ..generation.output import remarks

    for found in answers:
        reasons |= {reply.finish_reason for reply in found.values()}
        say(*remarks(found))
        yield found


def _fail_if_unanswered(reasons: set[str]) -> None:
    """End with exit code 1 if no prompt left room for an answer; a script would take the empty text for one."""
    # All of them: with several prompts, those that were answered are a result.
    if reasons == {"no room"}:
        raise typer.Exit(1)


def _title(trained: Trained) -> str:
    from ..paths import shown_path

    base, device = shown_path(trained.folder.base), trained.policy.device
    weights = "not quantized" if trained.folder.quantization is None else "NF4"
    return f"{trained.folder.source} on {base} ({weights}, {device}), prompt template {trained.prompts.name}"


@contextlib.contextmanager
def _named(option: str) -> Generator[None, None, None]:
    """Prefix errors of the block with the option they are about."""
    try:
        yield
    # The error speaks of the text, and a user looks for the option.
    except UserInputError as error:
        raise UserInputError(f"{option}: {error}") from error
