"""What the documentation gives as a paper's: `docs/paper_numbers.json`, and the numbers claimed in text and recipes.

A claim is a number in a sentence that cites a table, or in a paragraph that begins with "Paper" and the table after it.
Numbers that look like results are looked up. One with a sign is a difference, and ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = json.loads((ROOT / "docs" / "paper_numbers.json").read_text(encoding="utf-8"))["numbers"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "notebooks").glob("*.ipynb"))]
RECIPES = [*sorted((ROOT / "recipes").glob("*.yaml")), *sorted((ROOT / "recipes" / "overrides").glob("*.txt"))]

FENCED = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)
ELSEWHERE = re.compile(r"\]\([^)]*\)|https?://\S+|arXiv:[\d.]+\d")
CITED = re.compile(r"(QLoRA's )?Tables? (\d+(?:(?:, | and | to )\d+)*)")
# A number with a decimal point, an exponent or a percent sign and without a plus or minus; or one alone in parentheses.
RESULT = re.compile(r"(?<![\w.+-])\d[\d,]*(?:\.\d+(?:e-?\d+)?%?|e-?\d+|%)(?![\w.]*\d)|(?<=\()\d{3,4}(?=\))")
QUOTING = ("Paper", "And against")
TAGGED = re.compile(r"\[(NEFTune|QLoRA|code)\b[^\]]*\]")
PAPERS = {
    "NEFTune": ("NEFTune",),
    "QLoRA": ("QLoRA", "QLoRA's code"),
    "code": ("NEFTune's code", "QLoRA's code"),
}


@dataclass(frozen=True)
class Claim:
    """A number that is said to be a paper's.

    Attributes:
        page: The page, from the top of the repository.
        text: The words around it.
        places: The tables cited, as (paper, place).
        number: The number as written.
    """

    page: str
    text: str
    places: tuple[tuple[str, str], ...]
    number: str

    @property
    def is_listed(self) -> bool:
        """Whether a cited table has the number, to the digits that are written."""
        listed = [n["value"] for n in NUMBERS if (n["paper"], n["place"]) in self.places]
        return any(same(self.number, value) for value in listed)


def same(written: str, value: str) -> bool:
    """Compare a number as written, perhaps rounded or in percent, with a listed value."""
    written = written.rstrip("%").replace(",", "")
    if "e" in written or "." not in written:
        return float(written) == float(value) or written == f"{float(value):.0f}"
    digits = len(written.partition(".")[2])
    return f"{float(value):.{digits}f}" == f"{float(written):.{digits}f}"


def claims() -> Iterator[Claim]:
    """Find every claim of the documentation."""
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        for text in _units(_text_of(page)):
            places = tuple(_places(text))
            for number in RESULT.findall(text) if places else ():
                yield Claim(name, text, places, number)


def _text_of(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return ELSEWHERE.sub("", FENCED.sub("", text))


def _units(text: str) -> Iterator[str]:
    """Yield sentences, rows of tables, and whole paragraphs that quote a paper with the table after them."""
    before = ""
    for paragraph in re.split(r"\n\s*\n", text):
        words = " ".join(paragraph.split())
        is_table = words.startswith("|")
        if before.startswith("Paper") and is_table:
            yield f"{before} {words}"
        elif words.startswith(QUOTING):
            yield words
        elif is_table:
            yield from (" ".join(row.split()) for row in paragraph.splitlines())
        else:
            yield from re.split(r"(?<=[.;:]) (?=[A-Z(`*])", words)
        before = words


def _places(text: str) -> Iterator[tuple[str, str]]:
    for whose, numbers in CITED.findall(text):
        found = [int(number) for number in re.findall(r"\d+", numbers)]
        if " to " in numbers:
            found = list(range(found[0], found[-1] + 1))
        yield from (("QLoRA" if whose else "NEFTune", f"Table {number}") for number in found)


# ---- Recipes ----


def tagged_lines(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """Yield (key, value, paper, comment) of each line of a recipe or file of overrides that names a paper."""
    section = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"(\w+):", line):
            section = heading[1]
        found = re.match(r"(?:  (\w+): |([a-z]+\.\w+|[a-z]+)=)(\S+)\s+# (.*)$", line)
        if found is None:
            continue
        own, whole, value, comment = found.groups()
        for tag in TAGGED.finditer(comment):
            yield (f"{section}.{own}" if own else whole), value, tag[1], comment
