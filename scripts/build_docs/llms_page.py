"""``llms.txt``: the documentation's pages in one list for language models (llmstxt.org), from the site's navigation."""

from __future__ import annotations

import tomllib
from typing import Any

import yaml

from . import ROOT

HEAD = """# qlora_neft

> QLoRA fine-tuning with NEFTune noise exactly as published, from one command on one GPU: a frozen base in 4-bit NF4,
> LoRA adapters, uniform noise on the input embeddings. What is learned does not depend on the machine.

Begin with `qlora-neft ls`, `qlora-neft doctor` and `qlora-neft train demo --output-dir out-demo`. Every verb has
`--help`, most have `--json`. Exit codes: 0 done, 1 the run failed, 2 the input is wrong, 128 + signal interrupted (the
same command goes on).
"""


def text() -> str:
    """The page: a heading for each part of the navigation, a link for each page."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    place = f"{project['urls']['Repository']}/blob/main/docs/"
    # Tags for Python objects are mkdocs' business; the navigation has none.
    lines = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    parts = _parts(yaml.safe_load("nav:" + lines)["nav"])
    sections = [
        "\n".join([f"## {heading}", "", *(f"- [{title}]({place}{page})" for title, page in pages)])
        for heading, pages in parts.items()
    ]
    return "\n\n".join([HEAD.strip(), *sections]) + "\n"


def _parts(nav: list[Any]) -> dict[str, list[tuple[str, str]]]:
    """Pages as (title, path) by the part they are in; those of no part come first."""
    found: dict[str, list[tuple[str, str]]] = {"Docs": []}
    for entry in nav:
        for title, content in entry.items():
            if isinstance(content, str):
                found["Docs"].append((title, content))
            else:
                found[title] = [_page(item, title) for item in content]
    return found


def _page(item: str | dict[str, str], title: str) -> tuple[str, str]:
    return (title, item) if isinstance(item, str) else next(iter(item.items()))
