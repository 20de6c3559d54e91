"""Does a model recite its training data? Greedy answers to training prompts (NEFTune's Figure 5, arXiv:2310.05914)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..decoding import Decoding
from ..decoding.answers import Answer, Question, exact_match
from ..trained import Trained
from .overlap import bleu, rouge_l
from .plain_table import short_names

LABELS = (
    ("rows", "training prompts", "{:,}"),
    ("rouge_l", "ROUGE-L", "{:.2f}"),
    ("bleu", "BLEU-4", "{:.2f}"),
    ("exact_match", "exact answers, %", "{:.1f}"),
    ("characters", "characters of the answers", "{:.1f}"),
    ("reference_characters", "characters of the references", "{:.1f}"),
)


@dataclass(frozen=True)
class Overfit:
    """Answers to training prompts beside what was trained.

    Attributes:
        answers: Prompt, reference and answer of each row.
        rouge_l: Mean of `overlap.rouge_l`.
        bleu: `overlap.bleu` of all answers together.
    """

    answers: list[Answer]
    rouge_l: float
    bleu: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON; lengths in characters, means."""
        return {
            "rows": len(self.answers),
            "rouge_l": self.rouge_l,
            "bleu": self.bleu,
            "exact_match": 100 * exact_match(self.answers),
            "characters": sum(len(answer.text) for answer in self.answers) / len(self.answers),
            "reference_characters": sum(len(answer.reference) for answer in self.answers) / len(self.answers),
        }


def measure_overfit(
    trained: Trained,
    asked: Sequence[Question],
    decoding: Decoding,
    *,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Overfit:
    """Answer training prompts and compare with what was trained.

    Args:
        trained: The model.
        asked: Training rows, from `answers.questions`; at least one.
        decoding: How tokens are chosen; the paper's are greedy.
        batch_size: Prompts at a time.
        progress: Told how many are answered, of how many.
    """
    texts, prompts = [""] * len(asked), [question.prompt_ids for question in asked]
    for done, (i, text) in enumerate(trained.texts(prompts, decoding, batch_size=batch_size), 1):
        texts[i] = text
        if done % batch_size == 0 or done == len(asked):
            progress(done, len(asked))
    references = [question.reference for question in asked]
    scores = rouge_l(texts, references)
    answers = [Answer(question.prompt, question.reference, text) for question, text in zip(asked, texts, strict=True)]
    return Overfit(answers, sum(scores) / len(scores), bleu(texts, references))


def table(found: dict[str, Overfit]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows: a measure a row, a run a column."""
    columns = [result.to_dict() for result in found.values()]
    names = short_names(list(found))
    return ["", *names], [[label, *(form.format(column[key]) for column in columns)] for key, label, form in LABELS]


def with_answers(result: Overfit) -> dict[str, Any]:
    """For JSON, every answer included."""
    return {**result.to_dict(), "answers": [asdict(answer) for answer in result.answers]}
