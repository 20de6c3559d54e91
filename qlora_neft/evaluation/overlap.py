"""How much of a reference a text repeats: ROUGE-L and BLEU. Needs the extra ``eval``, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import UserInputError


def check_installed() -> None:
    """Refuse early what would otherwise fail after the answers are generated.

    Raises:
        UserInputError: If the extra is not installed.
    """
    _libraries()


def rouge_l(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return the ROUGE-L of each text against its reference: F-measure in percent, without stemming.

    It is taken from the longest common subsequence of words, in lower case, letters and digits only
    (``rouge-score``).

    Raises:
        UserInputError: If the extra is not installed.

    Source: Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries, section 3.
    """
    scorer = _libraries()[0].RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(texts, references, strict=True)
    return [100 * scorer.score(reference, text)["rougeL"].fmeasure for text, reference in pairs]


def bleu(texts: Sequence[str], references: Sequence[str]) -> float:
    """Return the BLEU of all texts together: n-grams up to 4, between 0 and 100.

    Computed with ``sacrebleu``'s defaults: tokenizer 13a, case kept, exponential smoothing.

    Args:
        texts: At least one.
        references: One for each text.

    Raises:
        UserInputError: If the extra is not installed.

    Source: Papineni et al. 2002, BLEU: a Method for Automatic Evaluation of Machine Translation.
    """
    # Of the corpus, as BLEU is defined: counts of n-grams are added over all answers before they are divided.
    return _libraries()[1].corpus_bleu(list(texts), [list(references)]).score


def _libraries() -> tuple[Any, Any]:
    try:
        import sacrebleu  # here, so that the other verbs run without the extra
        from rouge_score import rouge_scorer
    except ModuleNotFoundError as error:
        raise UserInputError(
            "eval overfit: rouge-score and sacrebleu are missing. Install the extra: pip install 'qlora-neft[eval]' "
            f"({error})"
        ) from error
    return rouge_scorer, sacrebleu
