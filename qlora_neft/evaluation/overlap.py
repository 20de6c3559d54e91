"""How much of a reference's words an answer repeats: ROUGE-L and BLEU-4 (NEFTune's Figure 5). No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import UserInputError

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
