"""A recipe's data as the model would see it: first sequences, numbers and the gate's verdict. No weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired

from rich.console import Console
from typing_extensions import TypedDict

from ..adapter.continued import resolved
from ..base.config import load_tokenizer
from ..data.prepare import Progress
from ..data.report import DataReport
from ..data.store import SourceFacts
from ..disks import check_writable
from ..display.console import quiet_libraries
from ..display.plots import plot_lengths
from ..display.preview_text import LEGEND, WEIGHTED, TokenView, render_example, render_summary, token_views
from ..files import write_json
from ..recipe import Recipe
from ..steps import LOSS_WEIGHTS
from .build import data_of, model_path, policy_of, report_of
from .plan import plan_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextPiece(TypedDict):
    """Text of neighboring tokens that are all trained, or all not; ``weight`` where they count for less than 1."""

    text: str
    trained: bool
    weight: NotRequired[float]


@dataclass(frozen=True)
class Preview:
    """The first sequences, and the report on all.

    Attributes:
        report: The content of ``data_report.json``.
        examples: The title and the tokens of each sequence.
    """

    report: DataReport
    examples: list[tuple[str, list[TokenView]]]


def preview(recipe: Recipe, rows: int = 3, progress: Progress | None = None) -> Preview:
    """Prepare a recipe's data and look at it. The report lists problems of the gate; they do not raise.

    Args:
        recipe: What is learned.
        rows: Number of sequences to show.
        progress: Called with the number of rows finished since its last call.

    Raises:
        UserInputError: If the data or the tokenizer cannot be read at all.
    """
    with quiet_libraries():
        recipe = resolved(recipe)
        tokenizer = load_tokenizer(model_path(recipe), revision=recipe.model.revision)
        data = data_of(recipe, tokenizer, refuse=False, progress=progress)
        report = data.report
        if len(data.train):  # without rows there is nothing to plan, and the gate's problems say why
            report = report_of(recipe, data, plan_of(recipe, policy_of(recipe), data))
        first = data.train.select(range(min(rows, len(data.train))))
        return Preview(report, [(_title(row, report["sources"]), _views(tokenizer, row)) for row in first])


def render(found: Preview, console: Console, *, show_tokens: bool = False) -> None:
    """Print the sequences and the summary."""
    if found.examples:
        weight = found.report["settings"]["prompt_loss_weight"]
        console.print(LEGEND + (WEIGHTED.format(weight=weight) if 0 < weight < 1 else ""), markup=False)
    for title, views in found.examples:
        render_example(console, title, views, show_tokens=show_tokens)
    render_summary(console, {**found.report, "problems": []})  # the error reports them


def to_json(found: Preview) -> dict[str, Any]:
    """Return the report, and under ``examples`` the text of each sequence in pieces, trained or not."""
    examples = [{"title": title, "pieces": _pieces(views)} for title, views in found.examples]
    return {**found.report, "examples": examples}


def save(found: Preview, output_dir: Path) -> list[Path]:
    """Write ``data_report.json`` and ``lengths.png`` into a folder; return the files written."""
    check_writable(output_dir, "--output-dir")
    output_dir.mkdir(parents=True, exist_ok=True)
    report, picture = output_dir / "data_report.json", output_dir / "lengths.png"
    write_json(report, found.report)
    drawn = plot_lengths(found.report, picture, found.report["sources"][0]["path"])
    return [report, picture] if drawn else [report]


def _views(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> list[TokenView]:
    return token_views(tokenizer, row["input_ids"], row["labels"], row.get(LOSS_WEIGHTS))


def _title(row: dict[str, Any], sources: Sequence[SourceFacts]) -> str:
    source = f" of {sources[row['source']]['path']}" if len(sources) > 1 else ""
    trained = sum(label >= 0 for label in row["labels"][1:])  # nothing predicts the first token
    return f"row {row['row']}{source}: {len(row['input_ids'])} tokens, {trained} trained"


def _pieces(views: Sequence[TokenView]) -> list[TextPiece]:
    """Join neighboring tokens of one kind."""
    pieces: list[TextPiece] = []
    kind = None
    for view in views:
        if pieces and kind == (view.trained, view.weight):
            pieces[-1]["text"] += view.text
        else:
            pieces.append({"text": view.text, "trained": view.trained})
            if view.trained and view.weight != 1:
                pieces[-1]["weight"] = round(view.weight, 6)
        kind = (view.trained, view.weight)
    return pieces
