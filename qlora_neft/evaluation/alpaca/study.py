"""A human study: two models' answers to the same instructions, blind and in random order, the key apart. No torch.

Jain et al. 2023, NEFTune, section "Human Study", arXiv:2310.05914: 140 of AlpacaEval's instructions, one answer of a
model trained with noise and one of a model trained without, in random order; wins / (pairs - draws).
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from ...errors import UserInputError
from ...files import read_record, sha256_of_text, write_json
from ..texts import read_rows
from .files import Annotation, Output, read_outputs
from .score import TIE, Score, score

PAIRS = 140  # in the paper's study
DRAW = 0


def write_study(model: Path, other: Path, study: Path, key: Path, *, rows: int = PAIRS, seed: int = 0) -> int:
    """Write the pairs that people judge, and apart from them which answer is whose.

    Args:
        model: Outputs of the model whose wins are counted.
        other: Outputs of the model it is compared with.
        study: File to write for the people; they fill in each ``verdict``.
        key: File to write that names the models; not for the people.
        rows: Number of pairs, drawn from the instructions that both answered; 0 for all.
        seed: Of the draw of instructions and of the order of answers.

    Returns:
        The number of pairs.

    Raises:
        UserInputError: If a file cannot be used or written, or the models share too few instructions.
    """
    found = {name: _by_instruction(path) for name, path in (("model", model), ("other", other))}
    shared = [text for text in found["model"] if text in found["other"]]
    if len(shared) < max(rows, 1):
        raise UserInputError(
            f"--rows: the two files share {len(shared)} instructions, {rows or 1} are asked for. Give fewer."
        )
    if study.resolve() == key.resolve():
        raise UserInputError(f"--key: must be another file than --output, got {str(key)!r} for both.")
    draw = random.Random(seed)
    chosen = draw.sample(shared, rows) if rows else draw.sample(shared, len(shared))
    pairs, first = [], []
    for number, instruction in enumerate(chosen, 1):
        names = ["model", "other"]
        draw.shuffle(names)
        answers = [found[name][instruction]["output"] for name in names]
        pairs.append(
            {
                "number": number,
                "instruction": instruction,
                "answer_1": answers[0],
                "answer_2": answers[1],
                "verdict": None,
            }
        )
        first.append(names[0])
    names = {
        name: _generator(rows_of, path) for (name, rows_of), path in zip(found.items(), (model, other), strict=True)
    }
    try:
        write_json(study, pairs)
        write_json(key, {**names, "seed": seed, "study_sha256": _fingerprint(pairs), "first": first})
    except OSError as error:
        raise UserInputError(f"--output, --key: cannot be written ({error}).") from error
    return len(pairs)


def score_study(study: Path, key: Path) -> Score:
    """Score a study that people have filled in: `WinRate.wins_without_draws` is the paper's formula.

    Args:
        study: Each ``verdict`` is 1 or 2 for the better answer, 0 for a draw, null where nobody judged.
        key: The file that was written beside it.

    Raises:
        UserInputError: If the two do not belong together, or a verdict is none of these.
    """
    pairs, named = read_rows(study, "FILE"), read_record(key, "Give the file that was written with the study.")
    first = named.get("first")
    is_key = isinstance(first, list) and all(isinstance(pair, dict) for pair in pairs)
    if not is_key or len(first) != len(pairs) or named.get("study_sha256") != _fingerprint(pairs):
        raise UserInputError(
            f"--key: {str(key)!r} is not the key of {str(study)!r}: its pairs are others, or were changed. Only "
            "verdicts may be filled in."
        )
    annotations = [_annotation(pair, is_model_first=whose == "model") for pair, whose in zip(pairs, first, strict=True)]
    made = {"judge": "people", "reference": named.get("other"), "prompts": f"{len(pairs)} blind pairs"}
    found = score(annotations)
    return Score(found.rate, found.avg_length, found.not_annotated, made=made)


def _annotation(pair: dict[str, Any], *, is_model_first: bool) -> Annotation:
    """Turn a verdict on two places into a preference: 2 for the model, 1 for the other."""
    verdict = pair.get("verdict")
    if verdict not in (1, 2, DRAW, None) or isinstance(verdict, bool):
        raise UserInputError(
            f"FILE: pair {pair.get('number')}: verdict must be 1 or 2 for the better answer, 0 for a draw, or null, "
            f"got {verdict!r}."
        )
    preference: float | None = None
    if verdict is not None:
        preference = TIE if verdict == DRAW else 2 if (verdict == 1) == is_model_first else 1
    output = pair["answer_1"] if is_model_first else pair["answer_2"]
    return {"instruction": pair["instruction"], "output_2": output, "preference": preference}


def _by_instruction(path: Path) -> dict[str, Output]:
    return {row["instruction"]: row for row in read_outputs(path, "FILE")}


def _generator(rows: dict[str, Output], path: Path) -> str:
    return str(next(iter(rows.values())).get("generator") or path)


def _fingerprint(pairs: list[Any]) -> str:
    """Hash what must stay as it was: everything but the verdicts."""
    return sha256_of_text(
        repr([[pair.get(k) for k in ("number", "instruction", "answer_1", "answer_2")] for pair in pairs])
    )
