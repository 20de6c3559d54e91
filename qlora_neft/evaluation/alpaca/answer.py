"""The verb ``eval alpaca answer``: an adapter's answers to AlpacaEval's instructions, in its official format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TypeVar

from ...adapter.folder import WEIGHTS, AdapterFolder, find_adapter
from ...adapter.load import Trained, load_trained
from ...errors import UserInputError
from ...files import sha256_of_file
from ...generation.decode import Decoding
from ...generation.generate import answer_texts
from ..runs import Machine, Progress, Say, no_progress, progress_of
from .files import DATASET, DATASPLIT, Instruction, Output, RowsFile, read_instructions

OUTPUTS = "alpaca_outputs.json"

T = TypeVar("T")


def answer_instructions(
    source: str,
    *,
    output: Path | None = None,
    instructions: Path | None = None,
    rows: int = 0,
    decoding: Decoding,
    meta_prompt: str = "",
    machine: Machine | None = None,
    say: Say = lambda line: None,
) -> Path:
    """Answer AlpacaEval's instructions; those answered in the file already are not answered again.

    Args:
        source: As in `find_adapter`.
        output: File to write; ``alpaca_outputs.json`` in the adapter's own folder by default.
        instructions: As in `read_instructions`.
        rows: Use only the first N instructions; 0 for all.
        decoding: How tokens are chosen.
        meta_prompt: Text appended to every instruction, as in the paper's Table 5; what is written and judged is the
            instruction alone.
        machine: Where to compute.
        say: Called with progress messages.

    Returns:
        The file.

    Raises:
        UserInputError: If adapter or instructions cannot be read, or the file holds answers made differently.
    """
    machine = machine or Machine()
    folder = find_adapter(source, base=machine.base)
    path = output or default_output(source)
    asked = read_instructions(instructions)
    asked = asked[:rows] if rows else asked
    file = answers_file(path, folder, asked, generator=name_of(folder), decoding=decoding, meta_prompt=meta_prompt)
    if file.missing():  # otherwise no model is loaded at all
        trained = load_trained(folder, device=machine.device, precision=machine.precision)
        options = {"batch_size": machine.batch_size, "progress": progress_of(say, "answers")}
        too_long = answer(trained, file, asked, decoding, meta_prompt=meta_prompt, **options)
        if too_long:
            say(f"{len(too_long)} instructions fill the model's context; their output is empty")
    return path


def default_output(source: str) -> Path:
    """Return ``alpaca_outputs.json`` in a local folder.

    Raises:
        UserInputError: For a Hub id.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise UserInputError(f"--output: name the file for the answers of {source}, which is not a local folder.")
    return folder / OUTPUTS


def name_of(folder: AdapterFolder) -> str:
    """Return the generator's name in the answers: the Hub id, or the folder's name."""
    local = Path(folder.source).expanduser()
    return local.resolve().name if local.is_dir() else folder.source


def answers_file(
    path: Path,
    folder: AdapterFolder,
    instructions: Sequence[Instruction],
    *,
    generator: str,
    decoding: Decoding,
    meta_prompt: str = "",
) -> RowsFile[Output]:
    """Open the file of an adapter's answers, with those that are there already. Nothing is loaded.

    Raises:
        UserInputError: If the file holds answers of another adapter or made with other settings.
    """
    # The weights, not the folder's name: answers of a run trained again under its old name are refused, not mixed.
    digest = sha256_of_file(folder.path / WEIGHTS)
    base = {"base": folder.own_base} if folder.own_base else {}
    asked = {"meta_prompt": meta_prompt} if meta_prompt else {}
    metadata = json.dumps({"adapter_sha256": digest, **base, **asked, **asdict(decoding)}, sort_keys=True)
    # The file's order is that of the instructions, whatever the order of answering.
    order = [row["instruction"] for row in instructions]
    return RowsFile(path, "--output", order, {"metadata": metadata}, {"generator": generator})


def answer(
    trained: Trained,
    file: RowsFile[Output],
    instructions: Sequence[Instruction],
    decoding: Decoding,
    *,
    meta_prompt: str = "",
    batch_size: int,
    progress: Progress = no_progress,
) -> list[str]:
    """Answer what is missing; the file is written after each batch.

    Args:
        trained: The model.
        file: From `answers_file`.
        instructions: What is asked; further fields (``dataset``) are kept.
        decoding: How tokens are chosen.
        meta_prompt: Text appended to every instruction.
        batch_size: Prompts at a time.
        progress: Called with how many are answered, and of how many.

    Returns:
        Instructions that fill the model's context; their output is empty.
    """
    asked = set(file.missing())
    rows = [row for row in instructions if row["instruction"] in asked]
    # The meta-prompt is asked but not written: a judge must compare answers to the same instruction.
    texts = [f"{row['instruction']} {meta_prompt}" if meta_prompt else row["instruction"] for row in rows]
    prompts = [trained.prompts.ids([{"role": "user", "content": text}]) for text in texts]
    # Written batch by batch: hours of answers survive an interruption.
    for batch in _batches(answer_texts(trained, prompts, decoding, batch_size=batch_size), batch_size):
        file.add([_row(rows[i], text) for i, text in batch])
        progress(len(file.order) - len(file.missing()), len(file.order))
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
