"""Malformed data files, several hundred of them: each ends with exit code 2 and a message that names file and row.

And mutants of good files, of which nothing is known but that they must not end with a traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
from pathlib import Path

import malformed_files
import pytest
import test_bad_input
from malformed_files import (
    FLAT,
    FORMATS,
    KINDS,
    WRITTEN,
    as_lines,
    files_of,
    good,
    mutated_bytes,
    mutated_rows,
    write_files,
)
from test_bad_input import contents, invoke

from qlora_neft.base.config import load_tokenizer
from qlora_neft.data.prepare import prepare_data
from qlora_neft.errors import UserInputError
from qlora_neft.recipe.schema import Data

PLACE = re.compile(r"\b(?:line|entry|row) \d+")

workplace = test_bad_input.workplace


@pytest.fixture
def chat_workplace(workplace):
    """With a chat template, which the tiny model has none of."""
    Path("chat.jinja").write_text(malformed_files.CHAT_TEMPLATE)
    return workplace


def everything():
    return sorted(Path().rglob("*")), contents(".")


def said_by_train(words):
    code, stdout, stderr = invoke("train", "mine.yaml", "--output-dir", "out", "--dry-run", *words)
    assert (code, stdout) == (2, ""), (words, stdout, stderr)
    return stderr


def said_by_preview(words):
    code, _, stderr = invoke("preview", "mine.yaml", *words)
    assert code == 2, (words, stderr)
    return stderr


def said_by_json(words):
    code, report, stderr = invoke("preview", "mine.yaml", "--json", *words)
    problems = json.loads(report, parse_constant=pytest.fail)["problems"]
    assert code == 2, (words, stderr)
    assert isinstance(problems, list) and problems and all(problem in stderr for problem in problems)
    return stderr


WAYS = (said_by_train, said_by_preview, said_by_json)


def refusals(path, *overrides, ways=WAYS):
    """What the verbs say as they refuse a path."""
    return [way((f"data.path={path}", *overrides)) for way in ways]


def check(path, message, place=None):
    """A message names the file, and as the first of all rows the one that is known to be at fault."""
    assert message.startswith("error: ") and message.endswith("\n") and message.count("error: ") == 1, message
    assert "Traceback" not in message
    assert repr(path) in message, message
    assert message.encode(), "half of a surrogate pair, which no terminal can be given"
    if place is not None:
        assert PLACE.findall(message)[:1] == [place], message


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_malformed_file_is_refused_by_name(chat_workplace, kind):
    files = files_of(kind)
    write_files(files)
    before = everything()
    for number, (name, file) in enumerate(files.items()):  # one verb a file: every kind has more files than verbs
        [message] = refusals(name, *file.overrides, ways=[WAYS[number % len(WAYS)]])
        check(name, message, file.place)
    assert everything() == before


def test_there_are_enough_of_them():
    counts = {kind.__name__: len(files_of(kind)) for kind in KINDS}
    assert min(counts.values()) >= 4, counts
    assert sum(counts.values()) >= 200


def test_the_good_files_are_good(chat_workplace):
    """Else every file above might be refused for something else than what is wrong with it."""
    for row, overrides in FORMATS.items():
        for suffix in WRITTEN if row in FLAT else (".jsonl", ".json", ".parquet"):
            Path(f"good{suffix}").write_bytes(WRITTEN[suffix](good(row)))
            code, _, stderr = invoke("preview", "mine.yaml", f"data.path=good{suffix}", *overrides)
            assert (code, stderr) == (0, ""), (row, suffix)


def test_a_column_that_is_missing_in_one_row_is_called_by_its_name(chat_workplace):
    rows = good(malformed_files.messages)
    Path("bad.jsonl").write_bytes(as_lines([*rows, {"tools": []}]))
    for message in refusals("bad.jsonl", *malformed_files.CHAT):
        assert f"line {len(rows) + 1}: messages is missing" in message


def test_columns_of_no_format_are_told_on_one_short_line(workplace):
    columns = ["a\nb", "\x1b[31m", malformed_files.HALF_PAIR, "x" * 9999, *(f"y{number}" for number in range(5000))]
    Path("bad.jsonl").write_bytes(as_lines([dict.fromkeys(columns, 1)]))
    for message in refusals("bad.jsonl"):
        check("bad.jsonl", message)
        assert len(message) < 1000 and message.count("\n") == 1 and message.strip().isprintable()


# ---- Paths that are no file ----


@pytest.mark.parametrize(
    "path",
    [
        "none.jsonl",
        "./none",
        "none/*.jsonl",
        "fol*/*.csv",
        "folder.jsonl",
        "folder",
        "link.json",
        "pipe.csv",
        "rows.txt",
    ],
)
def test_a_path_that_is_no_data_file(workplace, path):
    Path("folder.jsonl").mkdir()
    Path("folder").mkdir()
    Path("link.json").symlink_to("nowhere")
    Path("rows.txt").write_bytes(as_lines(good()))
    os.mkfifo("pipe.csv")
    before = sorted(Path().rglob("*"))
    for message in refusals(path):
        check(path.removeprefix("./"), message)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read any file")
def test_a_file_that_may_not_be_read(workplace):
    Path("rows.jsonl").chmod(0)
    for message in refusals("rows.jsonl"):
        check("rows.jsonl", message)


def test_one_bad_file_of_several_is_named(workplace):
    Path("data").mkdir()
    Path("data/a.jsonl").write_bytes(as_lines(good()))
    Path("data/b.jsonl").write_bytes(as_lines([*good()[:2], 5]))
    for message in refusals("data/*.jsonl"):
        check("data/*.jsonl", message)
        assert "b.jsonl, line 3" in message


# ---- Mutants ----


@pytest.fixture(scope="module")
def tokenizer(llama):
    tokenizer = load_tokenizer(str(llama))
    tokenizer.chat_template = malformed_files.CHAT_TEMPLATE
    return tokenizer


def survives(tokenizer, path, **kwargs):
    """Prepared, or refused with an error that is the user's to mend; anything else fails the test."""
    with contextlib.suppress(UserInputError):
        prepare_data(tokenizer, Data(path=path, max_length=250, **kwargs))


@pytest.mark.parametrize("suffix", WRITTEN)
def test_mutated_bytes_never_end_with_a_traceback(tokenizer, tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    draw = random.Random(suffix)
    for number in range(100):
        name = f"mutant-{number}{suffix}"
        Path(name).write_bytes(mutated_bytes(draw, WRITTEN[suffix](good())))
        survives(tokenizer, name)


@pytest.mark.parametrize("template", ["auto", "vicuna", "alpaca", "chat"])
@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.__name__)
def test_mutated_rows_never_end_with_a_traceback(tokenizer, tmp_path, monkeypatch, row, template):
    monkeypatch.chdir(tmp_path)
    draw = random.Random(f"{row.__name__} {template}")
    for number in range(5):
        name = f"mutants-{number}.jsonl"
        Path(name).write_bytes(as_lines([*good(row), *mutated_rows(draw, row, 40)]))
        survives(tokenizer, name, prompt_template=template)
