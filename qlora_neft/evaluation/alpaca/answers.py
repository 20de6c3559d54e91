"""AlpacaEval from an adapter to a score: answers, a judge's verdicts, the win rate."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from ...adapter.folder import WEIGHTS, AdapterFolder, find_adapter
from ...adapter.load import Trained, load_trained
from ...errors import UserInputError
from ...files import sha256_of_file, write_json
from ...generation.decode import Decoding
from ...generation.generate import answer_texts
from ...run_folder.record import keep_measures
from .files import DATASPLIT, RowsFile, read_annotations, read_instructions, read_outputs, score
from .judge import PROGRAM, annotate, check_judge, find_program, judge_with_package, load_judge

T = TypeVar("T")


def answers_file(
    path: Path,
    folder: AdapterFolder,
    instructions: Sequence[dict[str, Any]],
    *,
    generator: str,
    decoding: Decoding,
    meta_prompt: str = "",
) -> RowsFile:
    """The file of an adapter's answers, with those that are there already. Nothing is loaded.

    Raises:
        UserInputError: If the file holds answers of another adapter or of other settings.
    """
    digest = sha256_of_file(folder.path / WEIGHTS)
    base = {"base": folder.own_base} if folder.own_base else {}
    asked = {"meta_prompt": meta_prompt} if meta_prompt else {}
    metadata = json.dumps({"adapter_sha256": digest, **base, **asked, **asdict(decoding)}, sort_keys=True)
    order = [row["instruction"] for row in instructions]
    return RowsFile(path, "--output", order, {"metadata": metadata}, {"generator": generator})


def answer(
    trained: Trained,
    file: RowsFile,
    instructions: Sequence[dict[str, Any]],
    decoding: Decoding,
    *,
    meta_prompt: str = "",
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Answer what is missing; the file is written after each batch.

    Args:
        trained: The model.
        file: From `answers_file`.
        instructions: What is asked; further fields (``dataset``) are kept.
        decoding: How tokens are chosen.
        meta_prompt: Put behind every instruction.
        batch_size: Prompts at a time.
        progress: Told how many are answered, of how many.

    Returns:
        Instructions that fill the model's context; their output is empty.
    """
    asked = set(file.missing())
    rows = [row for row in instructions if row["instruction"] in asked]
    texts = [f"{row['instruction']} {meta_prompt}" if meta_prompt else row["instruction"] for row in rows]
    prompts = [trained.prompts.ids([{"role": "user", "content": text}]) for text in texts]
    for batch in _batches(answer_texts(trained, prompts, decoding, batch_size=batch_size), batch_size):
        file.add([_row(rows[i], text) for i, text in batch])
        progress(len(file.order) - len(file.missing()), len(file.order))
    too_long = file.missing()
    if too_long:
        file.add([_row(row, "") for row in rows if row["instruction"] in set(too_long)])
    return too_long


def _row(asked: dict[str, Any], output: str) -> dict[str, Any]:
    return {
        "instruction": asked["instruction"],
        "output": output,
        "generator": None,  # the file's
        "dataset": asked.get("dataset", "custom"),
        "datasplit": asked.get("datasplit", DATASPLIT),
    }


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch


OUTPUTS = "alpaca_outputs.json"
Say = Callable[[str], None]


def alpaca_answers(
    source: str,
    *,
    output: Path | None = None,
    instructions: Path | None = None,
    rows: int = 0,
    decoding: Decoding,
    meta_prompt: str = "",
    batch_size: int,
    device: str = "auto",
    precision: str = "auto",
    base: str | None = None,
    say: Say = lambda line: None,
) -> Path:
    """Answer AlpacaEval's instructions; what is in the file already is not answered again.

    Args:
        source: As in `find_adapter`.
        output: File to write; ``alpaca_outputs.json`` in the adapter's own folder by default.
        instructions: As in `read_instructions`.
        rows: The first so many of them; 0 for all.
        decoding: How tokens are chosen.
        meta_prompt: Put behind every instruction, as in the paper's Table 5; what is written and judged is the
            instruction alone.
        batch_size: Prompts at a time.
        device, precision, base: As in `load_trained`.
        say: Told how far it is.

    Returns:
        The file.
    """
    folder = find_adapter(source, base=base)
    path = output or default_output(source)
    asked = read_instructions(instructions)
    asked = asked[:rows] if rows else asked
    file = answers_file(path, folder, asked, generator=name_of(folder), decoding=decoding, meta_prompt=meta_prompt)
    if file.missing():
        trained = load_trained(folder, device=device, precision=precision)
        too_long = answer(
            trained,
            file,
            asked,
            decoding,
            meta_prompt=meta_prompt,
            batch_size=batch_size,
            progress=lambda done, total: say(f"answers {done:,} of {total:,}"),
        )
        if too_long:
            say(f"{len(too_long)} instructions fill the model's context; their output is empty")
    return path


def default_output(source: str) -> Path:
    """``alpaca_outputs.json`` in a local folder.

    Raises:
        UserInputError: For a Hub id.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise UserInputError(f"--output: say where the answers of {source} go; it is no folder of yours.")
    return folder / OUTPUTS


def name_of(folder: AdapterFolder) -> str:
    """What the answers call their generator: the Hub id, or the folder's name."""
    local = Path(folder.source).expanduser()
    return local.resolve().name if local.is_dir() else folder.source


def check_judging(judge: str, reference: Path | None, instructions: Path | None) -> None:
    """Refuse what `judged` would refuse, before hours of answering.

    Raises:
        UserInputError: If there is no such judge, or no reference's answers.
    """
    _references(reference, instructions)
    if judge == PROGRAM:
        find_program()
    else:
        check_judge(judge)


def judged(
    judge: str,
    outputs: Path,
    *,
    reference: Path | None,
    annotator: str,
    instructions: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Let a judge compare answers with a reference's, and score its verdicts.

    Args:
        judge: ``alpaca_eval`` for the package, else a local judge model's folder or Hub id.
        outputs: The answers.
        reference: The reference model's; by default the instructions' own (AlpacaEval's are text_davinci_003's).
        annotator: The package's annotator.
        instructions: As in `read_instructions`.
        device, precision: Of a local judge.
        say: Told how far it is.

    Returns:
        As `alpaca_format.score`, and ``annotations``, the file they are in.
    """
    rows = read_outputs(outputs)
    references = _references(reference, instructions)
    if judge == PROGRAM:
        program = find_program()
        annotations = judge_with_package(program, outputs, _written(references, rows, outputs.parent), annotator)
    else:
        annotations = outputs.with_name(f"{outputs.stem}.annotations.json")
        model = load_judge(judge, device=device, precision=precision)
        found = annotate(model, rows, references, annotations, progress=_judging(say))
        too_long = sum(row["preference"] is None for row in found)
        if too_long:
            say(f"{too_long} pairs do not fit the judge's context and have no verdict")
    return {**score(read_annotations(annotations), rows), "annotations": str(annotations)}


def keep_score(source: str, found: dict[str, Any]) -> None:
    """Keep a run's win rate where reports find it."""
    names = ("win_rate", "standard_error", "avg_length")
    keep_measures(source, "alpaca", {f"alpaca_{name}": found[name] for name in names})


def _judging(say: Say) -> Callable[[int, int], None]:
    return lambda done, total: say(f"verdicts {done:,} of {total:,}")


def _references(reference: Path | None, instructions: Path | None) -> list[dict[str, Any]]:
    if reference is not None:
        return read_outputs(reference, "--reference")
    rows = read_instructions(instructions)
    if not all(isinstance(row.get("output"), str) for row in rows):
        raise UserInputError("--reference: the instructions come without a reference's answers. Give a file of them.")
    return rows


def _written(references: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], folder: Path) -> Path:
    """The references of what is judged, in a file for the package."""
    asked = {row["instruction"] for row in rows}
    path = folder / "alpaca_reference.json"
    write_json(path, [row for row in references if row["instruction"] in asked])
    return path
