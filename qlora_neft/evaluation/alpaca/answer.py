"""The verb ``eval alpaca answer``: a model's answers to AlpacaEval's instructions, in its official format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from ...adapter.folder import CONFIG, RECIPE, WEIGHTS, AdapterFolder, find_adapter
from ...adapter.load import Loaded, load_trained, tokenizer_of_adapter
from ...adapter.prompts import recorded_template
from ...adapter.untuned import UntunedFolder, find_untuned, load_untuned, template_of_untuned
from ...errors import RunInterrupted, UserInputError
from ...files import sha256_of_file
from ...generation.answers import questions
from ...generation.decode import Decoding
from ...generation.generate import answer_texts
from ...runner.run_data import recipe_data
from ..defaults import HELD_OUT, HELD_OUT_PROMPTS, HELD_OUT_REFERENCE, made_by, prompts_made
from ..runs import Machine, Progress, Say, no_progress, progress_of
from .files import DATASET, DATASPLIT, Instruction, Output, RowsFile, read_instructions

OUTPUTS, HELD_OUT_OUTPUTS = "alpaca_outputs.json", "held_out_outputs.json"

T = TypeVar("T")


@dataclass(frozen=True)
class Answered:
    """Answers to instructions, in their file.

    Attributes:
        path: The file.
        rows: The answers asked for, in order; the file may hold more.
        made: How they were made, see `made_of`.
    """

    path: Path
    rows: list[Output]
    made: dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """What a model is asked.

    Attributes:
        rows: Instructions.
        ids: Their token ids by instruction, where they are more than the template makes of it; else empty.
        what: What they are, in one word.
    """

    rows: list[Instruction]
    ids: dict[str, list[int]] = field(default_factory=dict)
    what: str = "instructions"


def answer_instructions(
    source: str,
    *,
    output: Path | None = None,
    instructions: str | Path | None = None,
    rows: int = 0,
    decoding: Decoding,
    meta_prompt: str = "",
    machine: Machine | None = None,
    prompt_template: str | None = None,
    say: Say = lambda line: None,
) -> Answered:
    """Answer AlpacaEval's instructions; those answered in the file already are not answered again.

    Args:
        source: As in `find_adapter`, or a model without an adapter, as in `find_untuned`.
        output: File to write; see `default_output`.
        instructions: As in `read_instructions`; `HELD_OUT` for the run's own held-out prompts.
        rows: Use only the first N instructions; 0 for all.
        decoding: How tokens are chosen.
        meta_prompt: Text appended to every instruction, as in the paper's Table 5; what is written and judged is the
            instruction alone.
        machine: Where to compute.
        prompt_template: Template of a model without an adapter; an adapter has that of its training.
        say: Called with progress messages.

    Raises:
        UserInputError: If model or instructions cannot be read, or the file holds answers made differently.
        RunInterrupted: On a signal after the first batch.
    """
    machine = machine or Machine()
    untuned = find_untuned(source) if machine.base is None else None
    folder = untuned or find_adapter(source, base=machine.base)
    if isinstance(folder, AdapterFolder):
        if prompt_template is not None:
            raise UserInputError(
                "--prompt-template: is for a model without an adapter; an adapter has its own. Omit it."
            )
    else:
        prompt_template = prompt_template or template_of_untuned(folder)
    asked = asked_of(folder, instructions, rows)
    file = answers_file(
        output or default_output(source, instructions),
        folder,
        asked.rows,
        generator=name_of(source),
        decoding=decoding,
        meta_prompt=meta_prompt,
        prompt_template=prompt_template,
    )
    if file.missing():  # otherwise no model is loaded at all
        options = {"device": machine.device, "precision": machine.precision}
        if isinstance(folder, AdapterFolder):
            model: Loaded = load_trained(folder, **options)
        else:
            say(f"{source}: no adapter; asked in the prompt template {prompt_template} (--prompt-template)")
            model = load_untuned(folder, prompt_template=prompt_template, **options)
        options = {"batch_size": machine.batch_size, "progress": progress_of(say, "answers")}
        too_long = answer(model, file, asked, decoding, meta_prompt=meta_prompt, **options)
        if too_long:
            say(f"{len(too_long)} instructions fill the model's context; their output is empty")
    template = prompt_template if isinstance(folder, UntunedFolder) else recorded_template(folder)
    return Answered(file.path, file.ordered(), made_of(file.ordered(), template, asked.what))


def made_of(rows: Sequence[Output], template: str | None = None, what: str = "instructions") -> dict[str, Any]:
    """Say how answers in a file were made, as their own rows record it.

    Args:
        rows: Answers; ``metadata`` of another program's is not known.
        template: The prompt template, if it is known and not recorded there.
        what: What was asked.
    """
    made = prompts_made([row["instruction"] for row in rows], what)
    try:
        stored = json.loads(str(dict(rows[0]).get("metadata")))
        made |= made_by(stored) | {key: stored[key] for key in ("meta_prompt", "prompt_template") if key in stored}
    except (ValueError, KeyError, TypeError, IndexError):
        made["decoding"] = "not recorded"
    return made if template is None else {"prompt_template": template} | made


def asked_of(folder: AdapterFolder | UntunedFolder, instructions: str | Path | None, rows: int = 0) -> Asked:
    """Return what a model is asked: a file's instructions, AlpacaEval's, or a run's own held-out prompts.

    Raises:
        UserInputError: If there are none.
    """
    if str(instructions) != HELD_OUT:
        found = read_instructions(instructions)
        return Asked(found[:rows] if rows else found)
    if not isinstance(folder, AdapterFolder):
        raise UserInputError(
            f"--instructions: {HELD_OUT} are a run's own rows, and {folder.source} is no run. Give a file."
        )
    tokenizer = tokenizer_of_adapter(folder)
    data = recipe_data(folder, tokenizer)
    if data.eval is None:
        raise UserInputError(f"{folder.source}: the run has no held-out rows to ask. Give --instructions FILE.")
    # By prompt: a judge's verdicts are found by it, and of rows with one prompt the first is asked.
    found = {
        question.prompt: question
        for question in reversed(questions(data.eval, tokenizer, rows or HELD_OUT_PROMPTS, data.stop_token_ids))
    }
    if not found:
        raise UserInputError(f"{folder.source}: no held-out row has a prompt, so there is nothing to answer.")
    asked = list(reversed(found.values()))
    return Asked(
        [{"instruction": q.prompt, "output": q.reference, "generator": HELD_OUT_REFERENCE} for q in asked],
        {q.prompt: q.prompt_ids for q in asked},
        "held-out prompts",
    )


def held_out_references(source: str, rows: int = 0) -> list[Output]:
    """Return a run's held-out prompts with the responses that its own rows have to them.

    Raises:
        UserInputError: As `asked_of`.
    """
    return [{**row, "output": row["output"]} for row in asked_of(find_adapter(source), HELD_OUT, rows).rows]


def default_output(source: str, instructions: str | Path | None = None) -> Path:
    """Return where answers go: into a run's own folder, or for any other model into the current one, under its name."""
    name = HELD_OUT_OUTPUTS if str(instructions) == HELD_OUT else OUTPUTS
    folder = Path(source).expanduser()
    if folder.is_dir() and ((folder / CONFIG).is_file() or (folder / RECIPE).is_file()):
        return folder / name
    return Path(f"{name_of(source).replace('/', '--').replace(':', '--')}.{name}")


def name_of(source: str) -> str:
    """Return the generator's name in the answers: the Hub id, or the folder's name."""
    local = Path(source).expanduser()
    return local.resolve().name if local.is_dir() else source


def answers_file(
    path: Path,
    folder: AdapterFolder | UntunedFolder,
    instructions: Sequence[Instruction],
    *,
    generator: str,
    decoding: Decoding,
    meta_prompt: str = "",
    prompt_template: str | None = None,
) -> RowsFile[Output]:
    """Open the file of a model's answers, with those that are there already. Nothing is loaded.

    Raises:
        UserInputError: If the file holds answers of another model or made with other settings.
    """
    # The weights, not the folder's name: answers of a run trained again under its old name are refused, not mixed.
    if isinstance(folder, AdapterFolder):
        digest = {"adapter_sha256": sha256_of_file(folder.path / WEIGHTS)}
        base = {"base": folder.own_base} if folder.own_base else {}
    else:
        weights = "nf4" if folder.is_quantized else "not quantized"
        digest = {"model": folder.identity(), "weights": weights, "prompt_template": prompt_template}
        base = {}
    asked = {"meta_prompt": meta_prompt} if meta_prompt else {}
    metadata = json.dumps({**digest, **base, **asked, **asdict(decoding)}, sort_keys=True)
    # The file's order is that of the instructions, whatever the order of answering.
    order = [row["instruction"] for row in instructions]
    return RowsFile(path, "--output", order, {"metadata": metadata}, {"generator": generator})


def answer(
    model: Loaded,
    file: RowsFile[Output],
    asked_for: Asked | Sequence[Instruction],
    decoding: Decoding,
    *,
    meta_prompt: str = "",
    batch_size: int,
    progress: Progress = no_progress,
) -> list[str]:
    """Answer what is missing; the file is written after each batch.

    Args:
        model: The model.
        file: From `answers_file`.
        asked_for: What is asked; further fields (``dataset``) are kept.
        decoding: How tokens are chosen.
        meta_prompt: Text appended to every instruction.
        batch_size: Prompts at a time.
        progress: Called with how many are answered, and of how many.

    Returns:
        Instructions that fill the model's context; their output is empty.

    Raises:
        RunInterrupted: On a signal, if answers are there.
    """
    instructions = asked_for if isinstance(asked_for, Asked) else Asked(list(asked_for))
    asked = set(file.missing())
    rows = [row for row in instructions.rows if row["instruction"] in asked]
    # The meta-prompt is asked but not written: a judge must compare answers to the same instruction.
    texts = [f"{row['instruction']} {meta_prompt}" if meta_prompt else row["instruction"] for row in rows]
    # A held-out prompt is in its template already, and may be a conversation.
    prompts = [
        instructions.ids.get(row["instruction"])
        or model.prompts.ids(model.prompts.with_system([{"role": "user", "content": text}]))
        for row, text in zip(rows, texts, strict=True)
    ]
    # Written batch by batch: hours of answers survive an interruption.
    try:
        for batch in _batches(answer_texts(model, prompts, decoding, batch_size=batch_size), batch_size):
            file.add([_row(rows[i], text) for i, text in batch])
            progress(len(file.order) - len(file.missing()), len(file.order))
    except KeyboardInterrupt as stop:
        there = len(file.order) - len(file.missing())
        if not there:
            raise
        raise RunInterrupted.by(
            stop, f"stopped after {there} answers, kept in {str(file.path)!r}. To go on, run the same command again."
        ) from None
    too_long = file.missing()  # no answer came for these
    if too_long:  # judged like any other output: leaving hard rows out would flatter the model
        file.add([_row(row, "") for row in rows if row["instruction"] in set(too_long)])
    return too_long


def _row(asked: Instruction, output: str) -> Output:
    return {
        "instruction": asked["instruction"],
        "output": output,
        "generator": None,  # here for the order of the fields; the file gives the name
        "dataset": asked.get("dataset", DATASET),
        "datasplit": asked.get("datasplit", DATASPLIT),
    }


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch
