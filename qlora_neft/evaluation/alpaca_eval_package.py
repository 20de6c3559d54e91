"""The alpaca_eval package as judge: its program, run on files, with the user's own key. No torch."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from ..errors import RunFailed, UserInputError

PROGRAM = "alpaca_eval"
STDERR = 2  # its leaderboard goes there; our standard output may be JSON
ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"  # AlpacaEval 2; the paper's judge of its Table 1 is alpaca_eval_gpt4


def judge_with_package(program: str, outputs: Path, reference: Path, annotator: str) -> Path:
    """Let the alpaca_eval package judge a file of outputs; it asks its own service and is paid by the user's key.

    Args:
        program: From `find_program`.
        outputs: In AlpacaEval's format.
        reference: The reference model's outputs, in the same.
        annotator: Name of one of its annotators, or path of a configuration of one's own.

    Returns:
        Its annotations, beside ``outputs`` in a folder named after the annotator.

    Raises:
        RunFailed: If it fails.
    """
    command = [program, "evaluate", "--model_outputs", str(outputs), "--reference_outputs", str(reference)]
    command += ["--annotators_config", annotator, "--output_path", str(outputs.parent)]
    # The length-controlled rate needs a known reference and a download; our formula is the plain one.
    command += ["--fn_metric", "get_winrate", "--sort_by", "win_rate", "--is_overwrite_leaderboard", "True"]
    done = subprocess.run(command, stdout=STDERR, check=False)
    # The package puts a folder named after the annotator there, unless the annotator is a path.
    annotations = outputs.parent / ("" if "/" in annotator else annotator) / "annotations.json"
    if done.returncode or not annotations.is_file():
        raise RunFailed(f"alpaca_eval ended with exit code {done.returncode}. The command was: {shlex.join(command)}")
    return annotations


def find_program() -> str:
    """The alpaca_eval program, of this environment or on the search path.

    Raises:
        UserInputError: If it is not installed.
    """
    beside = Path(sys.executable).with_name(PROGRAM)
    found = str(beside) if beside.is_file() else shutil.which(PROGRAM)
    if found is None:
        raise UserInputError(
            "--judge: the program alpaca_eval is not installed. Install it, best in an environment of its own "
            "(pipx install alpaca_eval), and set OPENAI_API_KEY; or give a local judge model."
        )
    return found
