"""A local model as AlpacaEval's judge: which of two answers is better, asked in both orders."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...adapter.folder import CONFIG
from ...adapter.load import load_trained
from ...adapter.prompts import Prompts
from ...base.config import check_base_config, load_tokenizer
from ...base.nf4 import load_nf4_base
from ...base.precision import resolve_precision
from ...errors import RunFailed, UserInputError
from .files import RowsFile

QUESTION = (
    "Two assistants answered the same instruction. Decide which answer serves the person who gave it better: it does "
    "what was asked, it is correct, it is clear. The order of the answers and their length do not matter.\n\n"
    "### Instruction:\n{instruction}\n\n### Answer A:\n{a}\n\n### Answer B:\n{b}\n\n"
    "Which answer is better? Say A or B, nothing else."
)
PLAIN_LEAD, PLAIN_LETTERS = "\n\nThe better answer is answer", (" A", " B")  # for a model without a template
LETTERS = ("A", "B")
SAVE_EVERY = 10  # verdicts


@dataclass(frozen=True)
class Judge:
    """A causal language model that is asked for one letter.

    Attributes:
        name: What the annotations call it.
        model, tokenizer: The model, in eval mode.
        prompts: How it is asked.
    """

    name: str
    model: Any
    tokenizer: Any
    prompts: Prompts

    def preference(self, instruction: str, output_1: str, output_2: str) -> float | None:
        """Between 1 (``output_1`` is better) and 2; None if the question does not fit the model's context.

        1 plus the probability of ``output_2``'s letter against the other's, the mean of both orders: a preference for
        a letter or a place cancels, and equal answers give 1.5.
        """
        first = self._share_of_b(instruction, output_1, output_2)
        second = self._share_of_b(instruction, output_2, output_1)
        return None if first is None or second is None else 1 + (first + 1 - second) / 2

    def _share_of_b(self, instruction: str, a: str, b: str) -> float | None:
        asked = self.prompts.text([{"role": "user", "content": QUESTION.format(instruction=instruction, a=a, b=b)}])
        plain = self.prompts.name == "none"
        asked, letters = (asked + PLAIN_LEAD, PLAIN_LETTERS) if plain else (asked, LETTERS)
        ids, pair = self._ids(asked, letters)
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and len(ids) > context:
            return None
        with torch.no_grad():
            output = self.model(input_ids=torch.tensor([ids], device=self.model.device), logits_to_keep=1)
        return output.logits[0, -1, pair].float().softmax(-1)[1].item()

    def _ids(self, text: str, letters: Sequence[str]) -> tuple[list[int], list[int]]:
        """What comes before the letter, and the token that begins each letter behind it."""
        one, other = (self.prompts.ids_of_text(text + letter) for letter in letters)
        first = next(i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
        return one[:first], [one[first], other[first]]


def check_judge(source: str) -> None:
    """Refuse what cannot judge, before hours of answering.

    Raises:
        UserInputError: If it is no causal language model and no adapter's folder.
    """
    if (Path(source).expanduser() / CONFIG).is_file():
        return
    with _named():
        check_base_config(source)


def load_judge(source: str, *, device: str = "auto", precision: str = "auto") -> Judge:
    """Load a judge: a causal language model, or an adapter's folder, in NF4.

    Args:
        source: Folder or Hub id.
        device, precision: As in `trained.load_trained`.

    Raises:
        UserInputError: If it cannot be loaded.
    """
    if (Path(source).expanduser() / CONFIG).is_file():
        trained = load_trained(source, device=device, precision=precision)
        return Judge(source, trained.model, trained.tokenizer, trained.prompts)
    policy = resolve_precision(precision, device)
    with _named():
        tokenizer = load_tokenizer(source)
        model = load_nf4_base(source, device=policy.device, compute_dtype=policy.compute_dtype).eval()
    return Judge(source, model, tokenizer, Prompts(tokenizer, "chat" if tokenizer.chat_template else "none"))


@contextmanager
def _named() -> Iterator[None]:
    """What cannot be loaded is called by what the caller wrote."""
    try:
        yield
    except UserInputError as error:
        raise UserInputError(f"--judge: {str(error).removeprefix('model.name_or_path: ')}") from error


def annotate(
    judge: Judge,
    outputs: Sequence[dict[str, Any]],
    references: Sequence[dict[str, Any]],
    path: Path,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Judge outputs against references, in AlpacaEval's format; pairs judged earlier are not judged again.

    Args:
        judge: From `load_judge`.
        outputs: Rows of ``instruction``, ``output`` and perhaps ``generator``, ``dataset``.
        references: The same of the reference model.
        path: Where the annotations are written, and found again.
        progress: Told how many are judged, of how many.

    Raises:
        UserInputError: If an instruction has no reference, or ``path`` holds another judge's annotations.
    """
    pairs = paired(outputs, references)
    file = RowsFile(path, "--annotations", list(pairs), {"annotator": judge.name})
    stale = [name for name, pair in pairs.items() if not _is_of(file.rows.get(name), pair)]
    for start in range(0, len(stale), SAVE_EVERY):
        part = [pairs[name] for name in stale[start : start + SAVE_EVERY]]
        file.add([{**pair, "preference": judge.preference(*_texts(pair))} for pair in part])
        progress(len(pairs) - len(stale) + start + len(part), len(pairs))
    return file.ordered()


def paired(outputs: Sequence[dict[str, Any]], references: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Annotations without their preference, by instruction; the reference is number 1.

    Raises:
        UserInputError: If an instruction has no reference.
    """
    by_name = {row["instruction"]: row for row in references}
    missing = [row["instruction"] for row in outputs if row["instruction"] not in by_name]
    if missing:
        raise UserInputError(f"--reference: has no answer to {len(missing)} instructions, among them {missing[0]!r}.")
    return {row["instruction"]: _pair(by_name[row["instruction"]], row) for row in outputs}


def _pair(reference: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    return {
        "instruction": row["instruction"],
        "output_1": reference["output"],
        "generator_1": reference.get("generator", "reference"),
        "dataset": row.get("dataset", "custom"),
        "output_2": row["output"],
        "generator_2": row.get("generator", "model"),
    }


def _texts(pair: dict[str, Any]) -> tuple[str, str, str]:
    return pair["instruction"], pair["output_1"], pair["output_2"]


def _is_of(stored: dict[str, Any] | None, pair: dict[str, Any]) -> bool:
    return stored is not None and all(stored.get(name) == value for name, value in pair.items())


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
