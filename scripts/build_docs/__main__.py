"""Write the pages of docs/ that are generated from the code: python -m scripts.build_docs

No network, no GPU, no torch but for the pictures. ``tests/unit/test_docs_generated.py`` makes them again and compares.
"""

from __future__ import annotations

from . import DOCS, pages


def main() -> None:
    """Write every generated page and picture."""
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
    from .noise_pictures import draw_all

    draw_all(DOCS / "images")


main()
