"""docs/model_families.md, from the audit's results."""

from __future__ import annotations

from typing import Any


def page_of(results: dict[str, Any]) -> str:
    """Return the page."""
    return ""
