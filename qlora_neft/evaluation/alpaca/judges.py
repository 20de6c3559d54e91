"""Judges whose win rates are published: each with the reference its tables are against, and what has become of it.

A win rate belongs to a judge *and* a reference. No torch, no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .files import HUB_FILE, Output

PROGRAM = "alpaca_eval"  # of the package of that name
ANNOTATOR = "alpaca_eval_gpt4"
HUB_FILE_2 = "alpaca_eval_gpt4_baseline.json"  # the same 805 instructions, answered by AlpacaEval 2's reference
UNKNOWN = "not named in its file"
REMEDY = (
    "Give --annotator the path of a configuration with a model that is there (copy the package's, change model_name), "
    "or a local --judge. Its win rates compare with each other, and with no published table."
)


@dataclass(frozen=True)
class PublishedJudge:
    """An annotator of the alpaca_eval package (0.6.6) and the tables made with it.

    Attributes:
        tables: Where its win rates are published; tables of NEFTune, arXiv:2310.05914.
        references: Generators of the reference's answers, under the names they go by.
        hub_file: The instructions with those answers, in AlpacaEval's data set on the Hub.
        model: What it asks.
        gone: When that model was shut down, by OpenAI's page of deprecations as of November 2026; empty if it is there.
        length_controlled: Whether the published rate is the length-controlled one.
    """

    tables: str
    references: tuple[str, ...]
    hub_file: str
    model: str
    gone: str = ""
    length_controlled: bool = False


DAVINCI, GPT4_TURBO = ("text_davinci_003",), ("gpt4_1106_preview", "gpt4_turbo")
PUBLISHED = {
    "alpaca_eval_gpt4": PublishedJudge(
        "AlpacaEval 1; NEFTune's Tables 1, 2, 5, 7, 9", DAVINCI, HUB_FILE, "gpt-4", "2026-10-23"
    ),
    "chatgpt_fn": PublishedJudge(
        "ChatGPT; NEFTune's Tables 3, 6, 10 to 14, and its choice of alpha",
        DAVINCI,
        HUB_FILE,
        "gpt-3.5-turbo-16k-0613",
        "2024",
    ),
    "weighted_alpaca_eval_gpt4_turbo": PublishedJudge(
        "AlpacaEval 2, length-controlled", GPT4_TURBO, HUB_FILE_2, "gpt-4-1106-preview", "2026-10-23", True
    ),
}


def hub_file_of(judge: str, annotator: str) -> str:
    """Return the file on the Hub with the reference's answers that belong to a judge."""
    known = PUBLISHED.get(annotator) if judge == PROGRAM else None
    return known.hub_file if known else HUB_FILE


def reference_of(rows: Sequence[Output]) -> str:
    """Return who gave a reference's answers, by its own rows."""
    names = sorted({str(row.get("generator") or UNKNOWN) for row in rows})
    return ", ".join(names)


def words_on(judge: str, annotator: str, reference: str) -> list[str]:
    """Say what a reader of the win rate must know of the pair of judge and reference; nothing if it is a table's own.

    Args:
        judge: `PROGRAM`, or a local model.
        annotator: The package's annotator.
        reference: From `reference_of`.
    """
    if judge != PROGRAM:
        return [f"judge {judge}, a local model, against {reference}: compares with no published table"]
    known = PUBLISHED.get(annotator)
    if known is None:
        return [f"judge {annotator}, against {reference}: compares with no table of the NEFTune paper"]
    found = []
    if reference not in known.references:
        found.append(
            f"judge {annotator} ({known.tables}) is published against {known.references[0]}, here it is against "
            f"{reference}: this win rate compares with no published table"
        )
    if known.gone:
        found.append(f"judge {annotator} asks {known.model}, which OpenAI has shut down ({known.gone}). {REMEDY}")
    return found
