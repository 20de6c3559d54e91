"""The pages of docs/ that are made from the code say what the code says now: python -m scripts.build_docs mends them.

And what the other pages quote of the code is there.
"""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from scripts.build_docs import DOCS, ROOT, pages

GENERATED = pages()
TROUBLE = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", GENERATED)
def test_a_generated_page_is_up_to_date(name):
    assert (DOCS / name).read_text(encoding="utf-8") == GENERATED[name], "run: python -m scripts.build_docs"


def literals():
    """Every string of the package on its own; what an f-string fills in is a line break."""
    found = []
    for path in sorted((ROOT / "qlora_neft").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "\n" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def own_messages():
    own = TROUBLE.partition("## Messages of qlora-neft")[2].partition("\n## ")[0]
    return re.findall(r"^### `(.+)`$", own, re.MULTILINE)


@pytest.fixture(scope="module")
def strings():
    return literals()


@pytest.mark.parametrize("message", own_messages())
def test_a_message_that_is_explained_is_one_that_the_code_says(message, strings):
    """The pieces between its ellipses stand in this order in the package; one of them is a string of its own."""
    pieces = [piece.strip() for piece in message.split("…") if piece.strip()]
    pattern = re.compile(r".*?".join(re.escape(piece) for piece in pieces), re.DOTALL)
    whole = any(pattern.search(string) for string in strings)
    assert whole or all(any(piece in string for string in strings) for piece in pieces)


def test_there_are_messages_to_look_up():
    assert len(own_messages()) > 15
    assert sum("From `" in text for _, text in foreign_sections()) > 8


def foreign_sections():
    """Messages of other libraries: heading, and what stands below it."""
    foreign = TROUBLE.partition("\n## Messages of other libraries")[2]
    return re.findall(r"^### (.+)\n\n((?:(?!^### )[^\n]*\n)+)", foreign, re.MULTILINE)


@pytest.mark.parametrize(("heading", "text"), foreign_sections(), ids=lambda words: words[:40])
def test_a_message_of_another_library_is_one_that_it_says(heading, text):
    """It names the libraries, in whose installed source each message stands; or a thread, where there is no source."""
    named = re.match(r"From ((?:`\w+`(?:, )?)+)\. ", text)
    assert named or re.match(r"Seen in \[[\w-]+#\d+\]\(https://github\.com/", text), text
    if named:
        sources = [said_by(library) for library in re.findall(r"`(\w+)`", named[1])]
        for message in re.findall(r"`([^`]+)`", heading):
            assert any(message in source for source in sources), message


def said_by(library):
    """Every string of a library's source, one after another."""
    [folder] = importlib.util.find_spec(library).submodule_search_locations
    wanted = SPEAKING.get(library, ("",))
    files = [path for path in sorted(Path(folder).rglob("*.py")) if any(part in path.as_posix() for part in wanted)]
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)


# Large libraries: only the files that these messages are from.
SPEAKING = {"torch": ("/amp/",), "transformers": ("/utils/hub.py", "/tokenization_utils_base.py")}


NUMBER = r"(-?\d+(?:\.\d+)?)"
SHAPES = re.compile(rf'<use xlink:href="#m\w+" x="{NUMBER}" y="{NUMBER}"|<path d="M {NUMBER} {NUMBER} \n')


def shapes_of(svg):
    """Where marks, bars and lines begin, in parts of the picture's extent: not where letters put the axes."""
    points = [[float(number) for number in match if number] for match in SHAPES.findall(svg)]
    lows, highs = ([edge(values) for values in zip(*points, strict=True)] for edge in (min, max))
    return [(p - low) / (high - low) for point in points for p, low, high in zip(point, lows, highs, strict=True)]


@pytest.mark.parametrize("name", ["noise_length.svg", "noise_batch.svg", "noise_norm.svg"])
def test_the_pictures_of_the_noise_are_what_the_code_draws(name, pictures):
    drawn, committed = (shapes_of(Path(folder, name).read_text()) for folder in (pictures, DOCS / "images"))
    assert len(committed) > 30
    assert drawn == pytest.approx(committed, abs=0.02)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    pytest.importorskip("matplotlib")
    from scripts.build_docs.noise_pictures import draw_all

    draw_all(folder := tmp_path_factory.mktemp("pictures"))
    return folder


# ---- Architecture ----


def test_the_architecture_page_names_what_is_there_and_every_package():
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    package = ROOT / "qlora_neft"
    named = {path.strip("/") for path in re.findall(r"`([\w/]+(?:\.py|/))`", page)}
    missing = [path for path in named if not (ROOT / path).exists() and not any(package.rglob(path))]
    assert not missing
    assert {path.parent.name for path in package.glob("*/__init__.py")} <= named
