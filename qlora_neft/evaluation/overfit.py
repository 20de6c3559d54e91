"""Does a model recite its training data? Greedy answers to training prompts (NEFTune's Figure 5, arXiv:2310.05914)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..adapter.load import Trained
from ..display.tables import short_names
from ..errors import UserInputError
from ..generation.answers import Answer, Question, exact_match
from ..generation.decode import Decoding
from ..generation.generate import answer_texts

MISSING = "rouge-score and sacrebleu are missing. Install the extra: pip install 'qlora-neft[eval]'"


def check_installed() -> None:
    """Refuse at once what would fail after the answers are generated.

    Raises:
        UserInputError: If the extra is not installed.
    """
    _libraries()


def rouge_l(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-L of each text against its reference, F-measure in percent, without stemming.

    From the longest common subsequence of words, lower case, letters and digits only (``rouge-score``). Lin 2004,
    ROUGE: A Package for Automatic Evaluation of Summaries, section 3.

    Raises:
        UserInputError: If the extra is not installed.
    """
    scorer = _libraries()[0].RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(texts, references, strict=True)
    return [100 * scorer.score(reference, text)["rougeL"].fmeasure for text, reference in pairs]


def bleu(texts: Sequence[str], references: Sequence[str]) -> float:
    """BLEU over all texts together, n-grams up to 4, between 0 and 100.

    As ``sacrebleu`` has it by default: tokenizer 13a, case kept, exponential smoothing. Papineni et al. 2002, BLEU.

    Args:
        texts: At least one.
        references: One for each.

    Raises:
        UserInputError: If the extra is not installed.
    """
    return _libraries()[1].corpus_bleu(list(texts), [list(references)]).score


def _libraries() -> tuple[Any, Any]:
    try:
        import sacrebleu
        from rouge_score import rouge_scorer
    except ModuleNotFoundError as error:
        raise UserInputError(f"eval overfit: {MISSING} ({error})") from error
    return rouge_scorer, sacrebleu


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
    for done, (i, text) in enumerate(answer_texts(trained, prompts, decoding, batch_size=batch_size), 1):
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
