"""A local model as AlpacaEval's judge: which of two answers is better, asked in both orders."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ...adapter.folder import CONFIG
from ...adapter.load import load_trained
from ...adapter.prompts import Prompts
from ...base.config import check_base_config, load_tokenizer
from ...base.nf4 import load_nf4_base
from ...base.precision import resolve_precision
from ...errors import UserInputError
from ..runs import Progress, no_progress
from .files import DATASET, Annotation, Output, Pair, RowsFile

QUESTION = (
    "Two assistants answered the same instruction. Decide which answer serves the person who gave it better: it does "
    "what was asked, it is correct, it is clear. The order of the answers and their length do not matter.\n\n"
    "### Instruction:\n{instruction}\n\n### Answer A:\n{a}\n\n### Answer B:\n{b}\n\n"
    "Which answer is better? Say A or B, nothing else."
)
LETTERS = ("A", "B")
PLAIN_LEAD, PLAIN_LETTERS = "\n\nThe better answer is answer", (" A", " B")  # for a model without a chat template
SAVE_EVERY = 10  # verdicts


@dataclass(frozen=True)
class Judge:
    """A causal language model that is asked for one letter.

    Attributes:
        name: Its name in the annotations.
        model, tokenizer: The model, in eval mode.
        prompts: How it is asked.
    """

    name: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts

    def preference(self, instruction: str, output_1: str, output_2: str) -> float | None:
        """Return a number from 1 (``output_1`` is better) to 2; None if the question does not fit the context.

        It is 1 plus the probability of ``output_2``'s letter against the other's, averaged over both orders: a
        preference for a letter or a place cancels, and equal answers give 1.5.
        """
        first = self._share_of_b(instruction, output_1, output_2)
        second = self._share_of_b(instruction, output_2, output_1)  # now B is output_1
        return None if first is None or second is None else 1 + (first + 1 - second) / 2

    def _share_of_b(self, instruction: str, a: str, b: str) -> float | None:
        asked = self.prompts.text([{"role": "user", "content": QUESTION.format(instruction=instruction, a=a, b=b)}])
        # A base model continues text: it is led to the word before the letter, whose tokens begin with a space.
        plain = self.prompts.name == "none"
        asked, letters = (asked + PLAIN_LEAD, PLAIN_LETTERS) if plain else (asked, LETTERS)
        ids, pair = self._ids(asked, letters)
        model = cast("Any", self.model)  # a PreTrainedModel, or a PEFT model that forwards its attributes
        # A multimodal model keeps its context length in the text part of its configuration.
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and len(ids) > context:
            return None
        with torch.no_grad():  # one pass, logits of the last position only: (1, 1, V)
            output = model(input_ids=torch.tensor([ids], device=model.device), logits_to_keep=1)
        # In float32: bfloat16 would round two close shares to a tie.
        return output.logits[0, -1, pair].float().softmax(-1)[1].item()

    def _ids(self, text: str, letters: Sequence[str]) -> tuple[list[int], list[int]]:
        """Return the ids before the letter, and the first token of each letter after them.

        The letter is encoded together with the text: a tokenizer may merge it with what comes before.
        """
        one, other = (self.prompts.ids_of_text(text + letter) for letter in letters)
        # The first place where the two differ is the letter's, however the text before it was split.
        first = next(i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
        return one[:first], [one[first], other[first]]


def check_judge(source: str) -> None:
    """Refuse what cannot judge, before hours of answering.

    Raises:
        UserInputError: If it is neither a causal language model nor an adapter's folder.
    """
    if (Path(source).expanduser() / CONFIG).is_file():
        return
    with _named():
        check_base_config(source)


def load_judge(source: str, *, device: str = "auto", precision: str = "auto") -> Judge:
    """Load a judge: a causal language model, or an adapter's folder, in NF4.

    Args:
        source: Folder or Hub id.
        device, precision: As in `load_trained`.

    Raises:
        UserInputError: If it cannot be loaded.
    """
    if (Path(source).expanduser() / CONFIG).is_file():
        trained = load_trained(source, device=device, precision=precision)
        # A model trained here can judge too, asked in the template of its training.
        return Judge(source, trained.model, trained.tokenizer, trained.prompts)
    policy = resolve_precision(precision, device)
    with _named():
        tokenizer = load_tokenizer(source)
        model = load_nf4_base(source, device=policy.device, compute_dtype=policy.compute_dtype).eval()
    return Judge(source, model, tokenizer, Prompts(tokenizer, "chat" if tokenizer.chat_template else "none"))


@contextmanager
def _named() -> Generator[None, None, None]:
    """Let errors name the option that the caller wrote, instead of a recipe's key."""
    try:
        yield
    except UserInputError as error:
        raise UserInputError(f"--judge: {str(error).removeprefix('model.name_or_path: ')}") from error


def annotate(
    judge: Judge,
    outputs: Sequence[Output],
    references: Sequence[Output],
    path: Path,
    *,
    progress: Progress = no_progress,
) -> list[Annotation]:
    """Judge outputs against references, in AlpacaEval's format; pairs judged earlier are not judged again.

    Args:
        judge: From `load_judge`.
        outputs: The model's answers.
        references: The reference model's answers.
        path: Where the annotations are written, and found again.
        progress: Called with how many are judged, and of how many.

    Raises:
        UserInputError: If an instruction has no reference, or ``path`` holds another judge's annotations.
    """
    pairs = paired(outputs, references)
    file: RowsFile[Annotation] = RowsFile(path, "--annotations", list(pairs), {"annotator": judge.name})
    # A verdict on an answer that has been given anew since is not one on this pair.
    stale = [name for name, pair in pairs.items() if not _is_of(file.rows.get(name), pair)]
    for start in range(0, len(stale), SAVE_EVERY):
        part = [pairs[name] for name in stale[start : start + SAVE_EVERY]]
        file.add([_judged(pair, judge) for pair in part])
        progress(len(pairs) - len(stale) + start + len(part), len(pairs))
    return file.ordered()


def paired(outputs: Sequence[Output], references: Sequence[Output]) -> dict[str, Pair]:
    """Return what is to be judged, by instruction.

    Raises:
        UserInputError: If an instruction has no reference.
    """
    by_name = {row["instruction"]: row for row in references}
    missing = [row["instruction"] for row in outputs if row["instruction"] not in by_name]
    if missing:
        raise UserInputError(f"--reference: has no answer to {len(missing)} instructions, among them {missing[0]!r}.")
    return {row["instruction"]: _pair(by_name[row["instruction"]], row) for row in outputs}


def _pair(reference: Output, row: Output) -> Pair:
    return {
        "instruction": row["instruction"],
        "output_1": reference["output"],
        "generator_1": reference.get("generator", "reference"),
        "dataset": row.get("dataset", DATASET),
        "output_2": row["output"],
        "generator_2": row.get("generator", "model"),
    }


def _judged(pair: Pair, judge: Judge) -> Annotation:
    preference = judge.preference(pair["instruction"], pair["output_1"], pair["output_2"])
    return cast("Annotation", {**pair, "preference": preference})


def _is_of(stored: Mapping[str, Any] | None, pair: Pair) -> bool:
    """Whether a stored annotation is about this pair, answers included."""
    return stored is not None and all(stored.get(name) == value for name, value in pair.items())
