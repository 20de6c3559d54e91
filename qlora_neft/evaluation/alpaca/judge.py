"""The verb ``eval alpaca judge``: a judge compares a model's answers with a reference's.

The judge is a local model (`local_judge`) or the program of the alpaca_eval package.
"""

from __future__ import annotations

import csv
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from ...errors import RunFailed, UserInputError
from ...files import sha256_of_file, sha256_of_text, write_json
from ..runs import Machine, Say, progress_of
from .answer import made_of
from .files import Output, read_annotations, read_instructions, read_outputs
from .judges import ANNOTATOR, PROGRAM, PUBLISHED, hub_file_of, reference_of, words_on
from .local_judge import annotate, check_judge, load_judge, paired
from .score import Score, score

STDERR = 2  # the program prints its leaderboard; our standard output may be JSON


def check_judging(
    judge: str,
    reference: Path | Sequence[Output] | None = None,
    instructions: Path | str | None = None,
    annotator: str = ANNOTATOR,
) -> list[str]:
    """Refuse what `judge_outputs` would refuse, before hours of answering.

    Returns:
        What a reader of the win rate must know, see `words_on`.

    Raises:
        UserInputError: If there is no such judge, or no reference answers.
    """
    by = reference_of(references_of(judge, reference, instructions, annotator))
    if judge == PROGRAM:
        find_program()
    else:
        check_judge(judge)
    return words_on(judge, annotator, by)


def judge_outputs(
    judge: str,
    outputs: Path,
    *,
    rows: Sequence[Output] | None = None,
    reference: Path | Sequence[Output] | None = None,
    annotator: str = ANNOTATOR,
    instructions: Path | None = None,
    machine: Machine | None = None,
    made: Mapping[str, Any] | None = None,
    say: Say = lambda line: None,
) -> Score:
    """Let a judge compare answers with a reference's, and score its verdicts.

    Args:
        judge: ``alpaca_eval`` for the package, else a local judge model's folder or Hub id.
        outputs: File of the answers.
        rows: The answers to judge, if the file holds more.
        reference: File of the reference model's answers, or the answers; by default those that belong to the judge
            (`hub_file_of`), or that come with ``instructions``.
        annotator: The package's annotator.
        instructions: As in `read_instructions`.
        machine: Where a local judge is computed.
        made: How the answers were made, if the caller knows more than their rows say.
        say: Called with progress messages.

    Returns:
        The score, with the file of the annotations and how it was made.

    Raises:
        UserInputError: If judge or answers cannot be used, or an instruction has no reference.
        RunFailed: If the package's program fails.
    """
    # Both are read before a model is loaded, so that a damaged file costs nothing.
    rows = read_outputs(outputs) if rows is None else rows
    references = references_of(judge, reference, instructions, annotator)
    paired(rows, references)  # for its errors: an instruction may have no reference
    by = reference_of(references)
    for line in words_on(judge, annotator, by):
        say(line)
    if judge == PROGRAM:
        program, published = find_program(), PUBLISHED.get(annotator)
        # The regression behind the length-controlled rate knows one reference, and the difficulty of the 805.
        controlled = published is not None and published.length_controlled and by in published.references
        asked_for = _part(outputs, rows)
        annotations = judge_with_package(
            program, asked_for, _written(references, rows, outputs.parent), annotator, length_controlled=controlled
        )
        rate = _length_controlled(annotations.with_name("leaderboard.csv"), rows) if controlled else None
    else:
        # A file for each judge: verdicts of two are never mixed, and none is asked again for another's sake.
        name = Path(judge).expanduser().resolve().name
        annotations, machine = outputs.with_name(f"{outputs.stem}.{name}.annotations.json"), machine or Machine()
        model = load_judge(judge, device=machine.device, precision=machine.precision)
        found = annotate(model, rows, references, annotations, progress=progress_of(say, "verdicts"))
        # Told, since these pairs are missing from the win rate.
        too_long = sum(row["preference"] is None for row in found)
        if too_long:
            say(f"{too_long} pairs do not fit the judge's context and have no verdict")
        rate = None
    # Read back from the file: what is scored now is what `score` finds later.
    verdicts, asked = read_annotations(annotations), {row["instruction"] for row in rows}
    scored = score([verdict for verdict in verdicts if verdict["instruction"] in asked], rows)
    how = {**(made if made is not None else made_of(rows)), **judging(judge, annotator, references, rows)}
    return replace(scored, annotations=annotations, made=how, length_controlled=rate)


def judging(judge: str, annotator: str, references: Sequence[Output], rows: Sequence[Output]) -> dict[str, Any]:
    """Say who judged against whom, in the words that are stored with a win rate."""
    by_name = {row["instruction"]: row["output"] for row in references}
    texts = "\0".join(by_name.get(row["instruction"], "") for row in rows)
    local = judge != PROGRAM and Path(judge).expanduser().is_dir()
    # A folder's name says little: two judges of one name are told apart by their weights.
    weights = "".join(map(sha256_of_file, sorted(Path(judge).expanduser().glob("*.safetensors")))) if local else ""
    return {
        "judge": annotator if judge == PROGRAM else Path(judge).expanduser().resolve().name if local else judge,
        **({"judge_sha256": sha256_of_text(weights)[:16]} if local else {}),
        "reference": reference_of(references),
        "reference_sha256": sha256_of_text(texts)[:16],
    }


def references_of(
    judge: str,
    reference: Path | Sequence[Output] | None,
    instructions: Path | str | None,
    annotator: str = ANNOTATOR,
) -> list[Output]:
    """Return the answers to compare with: those at hand, a file's, or those that come with instructions.

    Raises:
        UserInputError: If there are none.
    """
    if isinstance(reference, Path):
        return read_outputs(reference, "--reference")
    if reference is not None:
        return list(reference)
    rows = read_instructions(instructions, hub_file_of(judge, annotator))
    if not all(isinstance(row.get("output"), str) for row in rows):
        raise UserInputError("--reference: the instructions come without a reference's answers. Give a file of them.")
    return cast("list[Output]", rows)


# ---- The alpaca_eval package ----


def judge_with_package(
    program: str, outputs: Path, reference: Path, annotator: str, *, length_controlled: bool = False
) -> Path:
    """Let the alpaca_eval package judge a file of outputs; it asks its own service, paid with the user's key.

    Args:
        program: From `find_program`.
        outputs: File in AlpacaEval's format.
        reference: The reference model's outputs, in the same format.
        annotator: Name of one of the package's annotators, or path of a configuration.
        length_controlled: Let it compute the length-controlled rate as well, which downloads what that needs.

    Returns:
        The file of the annotations, beside ``outputs`` in a folder named after the annotator.

    Raises:
        RunFailed: If the program fails.
    """
    command = [program, "evaluate", "--model_outputs", str(outputs), "--reference_outputs", str(reference)]
    command += ["--annotators_config", annotator, "--output_path", str(outputs.parent)]
    metric = ("get_length_controlled_winrate", "length_controlled_winrate")
    metric = metric if length_controlled else ("get_winrate", "win_rate")
    command += ["--fn_metric", metric[0], "--sort_by", metric[1], "--is_overwrite_leaderboard", "True"]
    done = subprocess.run(command, stdout=STDERR, check=False)
    # The package makes a folder named after the annotator, unless the annotator is a path.
    annotations = outputs.parent / ("" if "/" in annotator else annotator) / "annotations.json"
    if done.returncode or not annotations.is_file():
        raise RunFailed(f"alpaca_eval ended with exit code {done.returncode}. The command was: {shlex.join(command)}")
    return annotations


def find_program() -> str:
    """Find the alpaca_eval program in this environment or on the search path.

    Raises:
        UserInputError: If it is not installed.
    """
    # Beside Python first: an environment that is not activated is not on the search path.
    beside = Path(sys.executable).with_name(PROGRAM)
    found = str(beside) if beside.is_file() else shutil.which(PROGRAM)
    if found is None:
        raise UserInputError(
            "--judge: the program alpaca_eval is not installed. Install it, best in an environment of its own "
            "(pipx install alpaca_eval), and set OPENAI_API_KEY; or give a local judge model."
        )
    return found


def _written(references: Sequence[Output], rows: Sequence[Output], folder: Path) -> Path:
    """Write the references of what is judged to a file for the package."""
    # Only these: with --rows the other references have no output to be compared with.
    asked = {row["instruction"] for row in rows}
    path = folder / "alpaca_reference.json"
    write_json(path, [row for row in references if row["instruction"] in asked])
    return path


def _part(outputs: Path, rows: Sequence[Output]) -> Path:
    """Return a file of exactly the answers to judge: the package is paid for every row that it is given."""
    stored = read_outputs(outputs)
    if len(stored) == len(rows):
        return outputs
    path = outputs.with_name(f"{outputs.stem}.asked.json")
    write_json(path, list(rows))
    return path


def _length_controlled(leaderboard: Path, rows: Sequence[Output]) -> float | None:
    """Read our model's length-controlled rate from the package's leaderboard; its first column is the generator."""
    if not leaderboard.is_file():
        return None
    name = str(rows[0].get("generator"))
    with leaderboard.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            if line.get("") == name and line.get("length_controlled_winrate"):
                return float(line["length_controlled_winrate"])
    return None
