"""Does a model recite its training data? Greedy answers to training prompts (NEFTune's Figure 5, arXiv:2310.05914)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..adapter.load import Trained, load_trained
from ..display.tables import Table, short_names
from ..errors import UserInputError
from ..generation.answers import Answer, Question, exact_match, questions
from ..generation.decode import Decoding
from ..generation.generate import answer_texts
from ..run_folder.record import keep_measures
from ..runner.run_data import recipe_data
from .defaults import made_by, prompts_made
from .overlap import bleu, rouge_l
from .runs import Machine, Progress, Say, folders_of, no_progress, progress_of

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
    """Answers to training prompts, compared with what was trained.

    Attributes:
        answers: Prompt, reference and answer of each row.
        rouge_l: Mean of `overlap.rouge_l`.
        bleu: `overlap.bleu` of all answers together.
    """

    answers: list[Answer]
    rouge_l: float
    bleu: float

    def to_dict(self, *, answers: bool = False) -> dict[str, Any]:
        """Return plain values for JSON; lengths are means in characters.

        Args:
            answers: Include every answer.
        """
        found = {
            "rows": len(self.answers),
            "rouge_l": self.rouge_l,
            "bleu": self.bleu,
            "exact_match": 100 * exact_match(self.answers),
            "characters": sum(len(answer.text) for answer in self.answers) / len(self.answers),
            "reference_characters": sum(len(answer.reference) for answer in self.answers) / len(self.answers),
        }
        return {**found, "answers": [asdict(answer) for answer in self.answers]} if answers else found


def overfit_of_runs(
    sources: Sequence[str],
    *,
    rows: int,
    decoding: Decoding,
    machine: Machine | None = None,
    overrides: Sequence[str] = (),
    say: Say = lambda line: None,
) -> dict[str, Overfit]:
    """Measure several runs on their first training prompts; each keeps its scores in ``measures.json``.

    Args:
        sources: Folders of runs.
        rows: Training rows of each.
        decoding: How tokens are chosen; the paper's are greedy, with a penalty, see `defaults`.
        machine: Where to compute.
        overrides: Changes to the recipes, for data that has moved.
        say: Called with progress messages.

    Returns:
        Results by source.

    Raises:
        UserInputError: If a run cannot be loaded, or none of its training rows has a prompt.
    """
    machine, found = machine or Machine(), {}
    for folder in folders_of(sources, machine):
        trained = load_trained(folder, device=machine.device, precision=machine.precision)
        asked = training_questions(trained, rows, overrides)
        progress = progress_of(say, f"{folder.source}: answers")
        result = measure_overfit(trained, asked, decoding, batch_size=machine.batch_size, progress=progress)
        # Kept as soon as it is known: a later run may fail to load.
        scores = {"train_prompts_rouge_l": result.rouge_l, "train_prompts_bleu": result.bleu}
        made = prompts_made([question.prompt for question in asked], "training prompts") | made_by(asdict(decoding))
        keep_measures(folder.source, "overfit", scores, made)
        found[folder.source] = result
    return found


def training_questions(trained: Trained, rows: int, overrides: Sequence[str] = ()) -> list[Question]:
    """Return the first training rows of a run as questions.

    Raises:
        UserInputError: If none of them has a prompt.
    """
    data = recipe_data(trained.folder, trained.tokenizer, overrides)
    asked = questions(data.train, trained.tokenizer, rows, data.stop_token_ids)
    if not asked:
        raise UserInputError(f"{trained.folder.source}: no training row has a prompt, so there is nothing to answer.")
    return asked


def measure_overfit(
    trained: Trained,
    asked: Sequence[Question],
    decoding: Decoding,
    *,
    batch_size: int,
    progress: Progress = no_progress,
) -> Overfit:
    """Answer training prompts and compare with what was trained.

    Args:
        trained: The model.
        asked: Training rows, from `training_questions`; at least one.
        decoding: How tokens are chosen.
        batch_size: Prompts at a time.
        progress: Called with how many are answered, and of how many.
    """
    # Answers come in the order of batches; a prompt that fills the context gets none and keeps the empty text.
    texts, prompts = [""] * len(asked), [question.prompt_ids for question in asked]
    for done, (i, text) in enumerate(answer_texts(trained, prompts, decoding, batch_size=batch_size), 1):
        texts[i] = text
        # Once per batch: a line for each answer would only scroll.
        if done % batch_size == 0 or done == len(asked):
            progress(done, len(asked))
    references = [question.reference for question in asked]  # the last response of each row, as it was trained
    scores = rouge_l(texts, references)
    answers = [Answer(question.prompt, question.reference, text) for question, text in zip(asked, texts, strict=True)]
    return Overfit(answers, sum(scores) / len(scores), bleu(texts, references))


def overfit_table(found: dict[str, Overfit]) -> Table:
    """Return one row per measure, one column per run."""
    columns = [result.to_dict() for result in found.values()]
    rows = [[label, *(form.format(column[key]) for column in columns)] for key, label, form in LABELS]
    return Table(["", *short_names(list(found))], rows)
