"""Sample answers of several runs to the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .arms import Arm
from .record import RunRecord

MAX_PROMPTS = 5


def samples(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """For each of the first prompts: what was wanted, and what the base and each arm's first run said.

    Returns:
        ``prompt``, ``reference`` and ``answers`` (``who``, ``text``) each. A run's answers before training are in its
        ``run.json``, those after it in ``answers.json``, if it has one.
    """
    firsts = [(arm.label, arm.runs[0]) for arm in arms]
    found: dict[str, dict[str, Any]] = {}
    for _, run in firsts:
        for answer in _before(run):
            entry = found.setdefault(answer["prompt"], {**_question(answer), "answers": []})
            said = {"who": f"{run.recipe['model']['name_or_path']}, before training", "text": visible(answer["text"])}
            if said not in entry["answers"]:
                entry["answers"].append(said)
    for label, run in firsts:
        for answer in run.answers:
            entry = found.setdefault(answer["prompt"], {**_question(answer), "answers": []})
            entry["answers"].append({"who": f"{label}, after (seed {run.seed})", "text": visible(answer["text"])})
    return list(found.values())[:MAX_PROMPTS]


def _before(run: RunRecord) -> list[dict[str, str]]:
    return (run.about.get("before") or {}).get("answers") or []


def _question(answer: dict[str, str]) -> dict[str, str]:
    return {"prompt": visible(answer["prompt"]), "reference": visible(answer["reference"])}


def visible(text: str) -> str:
    """Control characters as the sign for what cannot be shown; a blank text as a word that says so."""
    return "".join("\ufffd" if c < " " and c not in "\n\t" else c for c in text) if text.strip() else "(blank)"
