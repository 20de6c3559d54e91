"""Every relative link, anchor and picture of the documentation leads somewhere. No network, no site built.

Links elsewhere (http) are not followed. Anchors are made as GitHub makes them and as the site does.
"""

import re
import unicodedata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOP = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
PAGES = [ROOT / name for name in TOP if (ROOT / name).exists()] + sorted((ROOT / "docs").rglob("*.md"))
FENCED = re.compile(r"^( *)(```+|~~~+).*?^\1\2", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\]|!\[[^\]]*\]\([^)]*\))*\]\(\s*<?([^)\s>]+)>?[^)]*\)")
PICTURE = re.compile(r"<(?:img|source)\b[^>]*?\b(?:src|srcset)=\"([^\"\s]+)\"")
ELSEWHERE = ("http://", "https://", "mailto:")


def prose_of(page):
    """The text without fenced blocks and without code spans, in which brackets are no links."""
    return re.sub(r"(`+)(?:(?!\1).)+\1", "code", FENCED.sub("", page.read_text(encoding="utf-8")), flags=re.DOTALL)


def links_of(page):
    text = prose_of(page)
    return [link for link in LINK.findall(text) + PICTURE.findall(text) if not link.startswith(ELSEWHERE)]


def anchors_of(page):
    """Both spellings of every heading: GitHub keeps two hyphens where a sign fell away between two spaces."""
    headings = re.findall(r"^#{1,6}\s+(.+?)\s*#*$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "") for heading in headings]
    return {spelled for words in plain for spelled in (_on_github(words), _on_the_site(words))}


def _on_github(words):
    return re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")


def _on_the_site(words):
    ascii_only = unicodedata.normalize("NFKD", words).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower())


def problems_of(page, root=ROOT):
    found = []
    for link in links_of(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            found.append(f"{link}: not there")
        elif not target.is_relative_to(root):
            found.append(f"{link}: outside of the repository")
        elif anchor and target.suffix == ".md" and anchor not in anchors_of(target):
            found.append(f"{link}: no such heading")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    assert problems_of(page) == []


def test_pages_of_the_site_link_only_within_the_site():
    """MkDocs publishes docs/ alone: a link to a file beside it works on GitHub and is dead on the site."""
    docs = ROOT / "docs"
    outside = {
        f"{page.relative_to(ROOT)}: {link}"
        for page in docs.rglob("*.md")
        for link in links_of(page)
        if link.partition("#")[0] and not (page.parent / link.partition("#")[0]).resolve().is_relative_to(docs)
    }
    assert outside == set()


def test_every_page_is_in_the_navigation_once():
    """A page that nobody can reach is as good as none. Read as text: the file has tags that only MkDocs knows."""
    named = re.findall(r"^\s+- (?:[^:\n]+: )?([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES if (ROOT / "docs") in page.parents]
    assert sorted(named) == sorted(pages)


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# One, two: three & four\n\n```\n# no heading\n```\n")
    page.write_text(
        "# Here\n[good](other.md#one-two-three-four) [too](other.md#one-two-three--four) [here](#here)\n"
        "`[code](no.md)` [web](https://example.org/x.md)\n```\n[fenced](no.md)\n```\n"
        "[gone](gone.md) [heading](other.md#no-heading) ![picture](no.png)\n"
        "[![badge](other.md)](badge.md) [up](../up.md)\n"
    )
    (tmp_path.parent / "up.md").touch()
    assert problems_of(page, tmp_path) == [
        "gone.md: not there",
        "other.md#no-heading: no such heading",
        "no.png: not there",
        "badge.md: not there",
        "../up.md: outside of the repository",
    ]
