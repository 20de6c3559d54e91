"""The verb ``eval alpaca judge``: a judge compares a model's answers with a reference's.

The judge is a local model (`local_judge`) or the program of the alpaca_eval package.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from ...errors import RunFailed, UserInputError
from ...files import write_json
from ..runs import Machine, Say, progress_of
from .files import Output, read_annotations, read_instructions, read_outputs
from .local_judge import annotate, check_judge, load_judge
from .score import Score, score

PROGRAM = "alpaca_eval"
ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"  # AlpacaEval 2; the paper's judge of its Table 1 is alpaca_eval_gpt4
STDERR = 2  # the program prints its leaderboard; our standard output may be JSON


def check_judging(judge: str, reference: Path | None = None, instructions: Path | None = None) -> None:
    """Refuse what `judge_outputs` would refuse, before hours of answering.

    Raises:
        UserInputError: If there is no such judge, or no reference answers.
    """
    _references(reference, instructions)  # read for its errors alone
    if judge == PROGRAM:
        find_program()
    else:
        check_judge(judge)


def judge_outputs(
    judge: str,
    outputs: Path,
    *,
    reference: Path | None = None,
    annotator: str = ANNOTATOR,
    instructions: Path | None = None,
    machine: Machine | None = None,
    say: Say = lambda line: None,
) -> Score:
    """Let a judge compare answers with a reference's, and score its verdicts.

    Args:
        judge: ``alpaca_eval`` for the package, else a local judge model's folder or Hub id.
        outputs: File of the answers.
        reference: File of the reference model's answers; by default those that come with the instructions
            (AlpacaEval's are text_davinci_003's).
        annotator: The package's annotator.
        instructions: As in `read_instructions`.
        machine: Where a local judge is computed.
        say: Called with progress messages.

    Returns:
        The score, with the file of the annotations.

    Raises:
        UserInputError: If judge or answers cannot be used, or an instruction has no reference.
        RunFailed: If the package's program fails.
    """
    # Both are read before a model is loaded, so that a damaged file costs nothing.
    rows, references = read_outputs(outputs), _references(reference, instructions)
    if judge == PROGRAM:
        annotations = judge_with_package(find_program(), outputs, _written(references, rows, outputs.parent), annotator)
    else:
        annotations, machine = outputs.with_name(f"{outputs.stem}.annotations.json"), machine or Machine()
        model = load_judge(judge, device=machine.device, precision=machine.precision)
        found = annotate(model, rows, references, annotations, progress=progress_of(say, "verdicts"))
        # Told, since these pairs are missing from the win rate.
        too_long = sum(row["preference"] is None for row in found)
        if too_long:
            say(f"{too_long} pairs do not fit the judge's context and have no verdict")
    # Read back from the file: what is scored now is what `score` finds later.
    return replace(score(read_annotations(annotations), rows), annotations=annotations)


def _references(reference: Path | None, instructions: Path | None) -> list[Output]:
    if reference is not None:
        return read_outputs(reference, "--reference")
    rows = read_instructions(instructions)
    if not all(isinstance(row.get("output"), str) for row in rows):
        raise UserInputError("--reference: the instructions come without a reference's answers. Give a file of them.")
    return cast("list[Output]", rows)


# ---- The alpaca_eval package ----


def judge_with_package(program: str, outputs: Path, reference: Path, annotator: str) -> Path:
    """Let the alpaca_eval package judge a file of outputs; it asks its own service, paid with the user's key.

    Args:
        program: From `find_program`.
        outputs: File in AlpacaEval's format.
        reference: The reference model's outputs, in the same format.
        annotator: Name of one of the package's annotators, or path of a configuration.

    Returns:
        The file of the annotations, beside ``outputs`` in a folder named after the annotator.

    Raises:
        RunFailed: If the program fails.
    """
    command = [program, "evaluate", "--model_outputs", str(outputs), "--reference_outputs", str(reference)]
    command += ["--annotators_config", annotator, "--output_path", str(outputs.parent)]
    # The length-controlled rate needs a known reference and a download; our formula is the plain one.
    command += ["--fn_metric", "get_winrate", "--sort_by", "win_rate", "--is_overwrite_leaderboard", "True"]
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
