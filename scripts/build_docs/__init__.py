"""The pages of docs/ that are generated from the code, so that they cannot disagree with it."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def pages() -> dict[str, str]:
    """Generated pages: path below docs/, text."""
    from qlora_neft.recipe.json_schema import json_schema
    from scripts.families.page import page_of

    from . import api_page, commands_page, gpu_page, json_page, llms_page, measured_tables, recipes_page, results_page

    families = json.loads((DOCS / "model_families.json").read_text(encoding="utf-8"))
    return {
        "model_families.md": page_of(families),
        "which_recipe.md": gpu_page.text(),
        "recipes.md": recipes_page.text(),
        "commands.md": commands_page.text(),
        "api.md": api_page.text(),
        "json_output.md": json_page.text(),
        "llms.txt": llms_page.text(),
        "recipe.schema.json": json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n",
        "results/index.md": results_page.text(),
        **measured_tables.pages(),
    }
