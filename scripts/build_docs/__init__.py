"""The pages of docs/ that are generated from the code, so that they cannot disagree with it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def pages() -> dict[str, str]:
    """Generated pages: path below docs/, text."""
    from . import api_page, commands_page, gpu_page, measured_tables, recipes_page, results_page

    return {
        "which_recipe.md": gpu_page.text(),
        "recipes.md": recipes_page.text(),
        "commands.md": commands_page.text(),
        "api.md": api_page.text(),
        "results/index.md": results_page.text(),
        **measured_tables.pages(),
    }
