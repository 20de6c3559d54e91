"""Rows out of files and off the Hub: every kind of file, slices, what is refused, and what identifies a source."""

from __future__ import annotations

import csv
import json
import os
from itertools import islice
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import source_of
from datasets import Dataset, IterableDataset, SplitDict, SplitInfo, load_dataset
from huggingface_hub.errors import HTTPError

from qlora_neft.data import read_hub
from qlora_neft.data.reading import read_rows, source_fingerprint
from qlora_neft.data.sources import Row, local_splits
from qlora_neft.errors import UserInputError
from qlora_neft.paths import DATA_SUFFIXES, kind_of

ROWS = [{"instruction": f"Say {n}", "input": "", "output": str(n)} for n in range(10)]
AN_OBJECT = "Every example must be a JSON object with named fields"


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_csv(rows):
    return "".join(",".join(row.values()) + "\n" for row in [dict(zip(ROWS[0], ROWS[0], strict=True)), *rows])


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def write(tmp_path):
    """Write a file into the current directory and return its name."""

    def write_file(content, name="rows.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pa.Table):
            pq.write_table(content, path, row_group_size=4)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    return write_file


def rows_of(path, **kwargs):
    return list(read_rows(source_of(path, **kwargs)))


def values_of(path, **kwargs):
    return [row.values for row in rows_of(path, **kwargs)]


def numbers_of(path, **kwargs):
    return [row.number for row in rows_of(path, **kwargs)]


def problems_of(path, **kwargs):
    """Place and problem of the rows that cannot be read."""
    bad = [row for row in rows_of(path, **kwargs) if row.problem is not None]
    assert all(row.values is None for row in bad)
    return [(row.place, row.problem) for row in bad]


def refusal(path, **kwargs):
    with pytest.raises(UserInputError) as caught:
        rows_of(path, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- Every kind of file ----


def test_every_kind_of_file_gives_the_same_rows(write):
    names = [
        write(as_lines(ROWS)),
        write(as_lines(ROWS), "lines.json"),
        write(json.dumps(ROWS, indent=2), "array.json"),
        write(json.dumps(ROWS), "array.jsonl"),
        write(as_csv(ROWS), "rows.csv"),
        write(pa.Table.from_pylist(ROWS), "rows.parquet"),
        write(as_lines(ROWS), "shouted.JSONL"),
    ]
    for name in names:
        assert values_of(name) == ROWS, name
        assert numbers_of(name) == list(range(1, 11)), name
        assert problems_of(name) == [], name


def test_a_place_is_where_an_editor_finds_the_row(write):
    spaced = write("\n" + as_lines(ROWS[:2]).replace("\n", "\n\n"))
    quoted = write('a\n"one\ntwo"\n\nthree\n', "rows.csv")
    array = write(json.dumps(ROWS[:2]), "rows.json")
    table = write(pa.Table.from_pylist(ROWS[:2]), "rows.parquet")
    assert [row.place for row in rows_of(spaced)] == ["line 2", "line 4"]
    assert [row.place for row in rows_of(quoted)] == ["line 2", "line 5"]
    assert [row.place for row in rows_of(array)] == ["entry 1", "entry 2"]
    assert [row.place for row in rows_of(table)] == ["row 1", "row 2"]
    assert rows_of(spaced)[1] == Row(2, "line 4", ROWS[1], None)


@pytest.mark.parametrize("written", [as_lines, as_csv])
@pytest.mark.parametrize(
    "change",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\n\n" + text.replace("\n", "\n\n"),
        lambda text: "\n" * 9000 + text,
        lambda text: text.rstrip("\n"),
    ],
    ids=["byte order mark", "Windows", "blank lines", "a long blank start", "no last line end"],
)
def test_harmless_differences_change_no_row(write, written, change):
    name = write(change(written(ROWS)), "rows.csv" if written is as_csv else "rows.jsonl")
    assert values_of(name) == values_of(name, split="train[:100%]") == ROWS


def test_a_line_of_spaces_is_no_row(write):
    name = write(" " * 9000 + "\n" + as_lines(ROWS))
    assert values_of(name) == ROWS
    assert numbers_of(name, split="train[9:]") == [10]


def test_line_separators_inside_a_text_do_not_end_a_line(write):
    row = {"instruction": "a\u2028b\x85c", "output": "d"}
    assert values_of(write(json.dumps(row, ensure_ascii=False))) == [row]
    assert values_of(write("instruction,output\na\u2028b\x85c,d\n", "rows.csv")) == [row]


def test_values_keep_their_types_and_rows_their_own_fields(write):
    rows = [{"a": "7"}, {"a": 7, "late": None}, {"a": [{"role": "user"}]}, {"a": 1.5}]
    assert values_of(write(as_lines(rows))) == rows


def test_every_csv_field_is_text_as_it_stands(write):
    name = write('a,b\nNA,007\n"say ""x"", y"," z"\n"two\r\nlines",\n', "rows.csv")
    assert values_of(name) == [{"a": "NA", "b": "007"}, {"a": 'say "x", y', "b": " z"}, {"a": "two\r\nlines", "b": ""}]


def test_a_csv_field_longer_than_pythons_limit_is_read_and_the_limit_restored(write):
    limit = csv.field_size_limit()
    rows = read_rows(source_of(write(f"a\n{'x' * (limit + 1)}\n", "rows.csv")))
    assert len(next(rows).values["a"]) == limit + 1
    assert csv.field_size_limit() == limit


def test_parquet_gives_nested_values_and_nulls(write):
    rows = [{"messages": [{"role": "user", "content": "a"}], "tools": None}, {"messages": [], "tools": "[]"}]
    assert values_of(write(pa.Table.from_pylist(rows), "rows.parquet")) == rows


# ---- Rows that cannot be read are yielded with what is wrong ----


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "rows.jsonl",
            '{"a": "b"}\n{"a": \nhello\n\n{"a": "c"}\n{"a": "d\n',
            [
                ("line 2", "is not JSON (Expecting value)"),
                ("line 3", "is not JSON (Expecting value)"),
                ("line 6", "is not JSON (Invalid control character at)"),
            ],
        ),
        ("rows.jsonl", "hello\n", [("line 1", "is not JSON (Expecting value)")]),
        ("rows.json", 'hello\n{"a": "b"}\n', [("line 1", "is not JSON (Expecting value)")]),
        ("rows.jsonl", '{"a": \n', [("line 1", "is not JSON (Expecting value)")]),
        ("rows.jsonl", '{"a": "b"} {"a": "c"}\n', [("line 1", "is not JSON (Extra data)")]),
        ("rows.jsonl", f'{{"a": {"7" * 5000}}}\n', [("line 1", "is not JSON (a number has too many digits)")]),
        ("rows.jsonl", '{"a": ' + "[" * 100_000, [("line 1", "is not JSON (nested too deep)")]),
        ("rows.jsonl", '{"a": "b"}\nnull\n', [("line 2", f"is NoneType 'None'. {AN_OBJECT}")]),
        (
            "rows.jsonl",
            '{"a": "b"}\n\n3\n[1, 2]',
            [("line 3", f"is int '3'. {AN_OBJECT}"), ("line 4", f"is list '[1, 2]'. {AN_OBJECT}")],
        ),
        (
            "rows.jsonl",
            '{"a": "b"}\n' + "[" * 800 + "]" * 800,
            [("line 2", f"is list '[[[[[[[...]]]]]]]'. {AN_OBJECT}")],
        ),
        ("rows.json", '[{"a": "b"}, "text", {}]', [("entry 2", f"is str 'text'. {AN_OBJECT}")]),
        (
            "rows.csv",
            "a,b\n1,2\n3\n4,5,6\n7,\0\n8,9\n",
            [
                ("line 3", "has 1 fields where the header names 2. Quote a field that holds a comma"),
                ("line 4", "has 3 fields where the header names 2. Quote a field that holds a comma"),
                ("line 5", "holds a NUL byte. Save the file as UTF-8 text"),
            ],
        ),
    ],
)
def test_a_row_that_cannot_be_read_is_yielded_with_its_problem(write, name, content, expected):
    assert problems_of(write(content, name)) == expected


def test_the_rows_around_a_bad_one_are_read_and_all_are_counted(write):
    name = write('{"a": "b"}\nhello\n\n{"a": "c"}\n')
    assert values_of(name) == [{"a": "b"}, None, {"a": "c"}]
    assert numbers_of(name) == [1, 2, 3]
    assert problems_of(name, split="train[2:]") == []


# ---- Files that are refused ----


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("rows.jsonl", None, "no file at 'rows.jsonl'. Paths are relative to the current directory."),
        ("./rows", None, "no file at 'rows'"),
        ("rows*.jsonl", None, "no file matches 'rows*.jsonl'. Paths are relative to the current directory."),
        (
            "rows.txt",
            "a",
            "must be a .json, .jsonl, .csv, .parquet or .arrow file, a folder or a Hub id, got 'rows.txt'.",
        ),
        ("rows.jsonl", "", "'rows.jsonl' is empty. It needs one JSON object per example."),
        ("rows.jsonl", " \n\n ", "is empty"),
        ("rows.jsonl", b"\xef\xbb\xbf\r\n", "is empty"),
        ("rows.json", "[]", "is empty"),
        ("rows.csv", "", "'rows.csv' is empty. It needs one row per example."),
        ("rows.csv", "instruction,output\n", "is empty"),
        ("rows.parquet", pa.table({"a": pa.array([], pa.string())}), "'rows.parquet' is empty. It needs one row"),
        ("rows.json", '[{"a": "b"},\n {"a" "b"}]', "line 2, is not JSON (Expecting ':' delimiter). The file needs one"),
        ("rows.json", '[{"a": "b"}]\n[]', "line 2, is not JSON (Extra data)"),
        ("rows.json", "[" * 100_000, "'rows.json' is not JSON (nested too deep). The file needs one object per line"),
        ("rows.json", f"[{'7' * 5000}]", "'rows.json' is not JSON (a number has too many digits). The file needs"),
        ("rows.json", json.dumps({"a": ROWS, "b": ROWS}, indent=1), "line 1, is not JSON (Expecting property name"),
        ("rows.json", json.dumps({"a": 1}, indent=1), "The file needs one object per line, or one array of objects."),
        ("rows.jsonl", b'{"instruction": "caf\xe9", "output": "b"}\n', "is not UTF-8 text, byte 21 is not. Save it"),
        ("rows.jsonl", b'\xef\xbb\xbf{"a": "b"}\r\n\r\n{"a": "\xe9"}', "byte 25 is not"),
        ("rows.jsonl", b'\xef\xbb\xbf{"a": "\xe9"}', "byte 11 is not"),
        ("rows.json", b'[{"a": "b"},\n{"a": "\xe9"}]', "byte 21 is not"),
        ("rows.csv", b"a\nb\n\xe9\n", "byte 5 is not"),
        ("rows.jsonl", as_lines(ROWS).encode("utf-16"), "is not UTF-8 text, byte 1 is not"),
        ("rows.csv", ",a\n0,b\n", "line 1, the header, has no name for column 1. Name every column; from pandas"),
        ("rows.csv", "a, \n0,b\n", "has no name for column 2"),
        ("rows.csv", "a,b,a\n0,b,c\n", "line 1, the header, names the column 'a' twice."),
        ("rows.csv", "\n\na;b\n0;b\n", "line 3, the header, names the one column 'a;b'. Separate columns by commas."),
        ("rows.csv", "a\0\nb\n", "line 1, the header, holds a NUL byte"),
        ("rows.csv", 'a\nb\n"c\nd\n', "line 3, is not CSV (unexpected end of data). A field that holds a comma"),
        ("rows.csv", 'a\n"b"c\n', "line 2, is not CSV (',' expected after '\"')"),
        ("rows.csv", f'a\n"{"x" * 2**24}\n', "line 2, is not CSV (field larger than field limit"),
        ("rows.parquet", b"PAR1 and no more", "'rows.parquet' cannot be read as Parquet. Check that it is whole. ("),
        ("rows.parquet", b"", "cannot be read as Parquet"),
        (
            "rows.parquet",
            pa.table([["a"], ["b"]], names=["a", "a"]),
            "'rows.parquet' names a column twice. Give each its own name.",
        ),
    ],
)
def test_a_file_that_cannot_be_read_as_rows_is_refused(write, name, content, rule):
    if content is not None:
        write(content, name)
    message = refusal(f"./{name}" if name.endswith(".txt") else name)
    assert message.startswith("data.path: ")
    assert message.count("data.path: ") == 1
    assert rule in message


def test_a_parquet_file_damaged_in_the_middle_is_refused_when_it_is_reached(write, tmp_path):
    texts = [os.urandom(2000).hex() for _ in range(1000)]
    name = write(pa.table({"a": texts}), "rows.parquet")
    content = bytearray((tmp_path / name).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20_000] = b"\xff" * 20_000
    write(bytes(content), name)
    rows = read_rows(source_of(name))
    assert next(rows).values == {"a": texts[0]}
    with pytest.raises(UserInputError, match=r"^data.path: 'rows.parquet' cannot be read as Parquet"):
        list(rows)


def test_a_folder_without_rows_is_refused(tmp_path):
    assert "holds no files of rows (.json, .jsonl, .csv, .parquet, .arrow;" in refusal(str(tmp_path))
    (tmp_path / "folder.json").mkdir()
    assert "must be a .json" in refusal("folder.json")
    assert "every file of a pattern must be a .json" in refusal("*.json")


def test_a_file_that_may_not_be_read_is_refused(write, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    name = write(as_lines(ROWS))
    monkeypatch.setattr("pathlib.Path.open", denied)
    assert refusal(name) == "data.path: 'rows.jsonl' cannot be read. (Permission denied)"
    with pytest.raises(UserInputError, match="cannot be read"):
        source_fingerprint(source_of(name))


def test_messages_name_the_key_of_the_caller(write):
    assert refusal("no.jsonl", key="data.eval_path").startswith("data.eval_path: no file")
    name = write(as_lines(ROWS))
    assert refusal(name, split="test", key="data.eval_path").startswith("data.eval_split: 'test'")
    assert refusal(name, split="train[:0]", key="data.eval_path").startswith("data.eval_split: 'train[:0]'")


# ---- Several files ----


def test_a_pattern_reads_its_files_by_name_and_numbers_rows_through(write):
    write(as_csv(ROWS[7:]), "data/c.csv")
    write(as_lines(ROWS[:4]), "data/a.jsonl")
    write(pa.Table.from_pylist(ROWS[4:7]), "data/b.parquet")
    rows = rows_of("data/*")
    assert [row.values for row in rows] == ROWS
    assert [row.number for row in rows] == list(range(1, 11))
    assert [rows[n].place for n in (3, 4, 9)] == ["a.jsonl, line 4", "b.parquet, row 1", "c.csv, line 4"]


def test_files_of_one_name_are_told_apart(write):
    write(as_lines(ROWS[:1]), "data/a/rows.jsonl")
    write("hello", "data/b/rows.jsonl")
    assert problems_of("data/*/rows.jsonl") == [("b/rows.jsonl, line 1", "is not JSON (Expecting value)")]
    assert values_of("data/**") == values_of("./data/**/*.jsonl") == [ROWS[0], None]


def test_a_pattern_of_one_file_names_no_file(write):
    write(as_lines(ROWS))
    assert rows_of("r*.jsonl")[0].place == "line 1"


def test_a_name_with_brackets_is_a_name(write):
    assert values_of(write(as_lines(ROWS), "rows[1].jsonl")) == ROWS


def test_a_pattern_does_not_pass_over_what_it_cannot_read(write):
    write(as_lines(ROWS), "data/a.jsonl")
    write("about", "data/README.md")
    assert (
        "every file of a pattern must be a .json, .jsonl, .csv, .parquet or .arrow file, got 'data/README.md'."
        in refusal("data/*")
    )
    write("", "data/b.jsonl")
    assert refusal("data/*.jsonl") == "data.path: 'data/b.jsonl' is empty. It needs one JSON object per example."


def test_a_home_folder_is_found(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(as_lines(ROWS), "data/rows.jsonl")
    assert values_of("~/data/rows.jsonl") == values_of("~/data/*.jsonl") == ROWS
    assert local_splits(source_of("~/data/*")) == {"train": [tmp_path / "data" / "rows.jsonl"]}


@pytest.mark.parametrize(
    "path", ["a.jsonl", "a.CSV", "x/*.parquet", "./a", "/a", "~/a", "here", "he*", "he?e", "[h]ere", "owner/*"]
)
def test_a_file_is_told_from_a_hub_id(write, path):
    write("", "here")
    assert kind_of(path, suffixes=DATA_SUFFIXES) == "local"


@pytest.mark.parametrize("path", ["tatsu-lab/alpaca", "squad", "owner/a.b", "x" * 5000])
def test_a_hub_id_is_told_from_a_file(path):
    assert kind_of(path, suffixes=DATA_SUFFIXES) == "hub"


# ---- Slices ----

SLICES = [
    ("train", range(10)),
    ("train[:3]", range(3)),
    ("train[3:]", range(3, 10)),
    ("train[-2:]", range(8, 10)),
    ("train[:20%]", range(2)),
    ("train[:500]", range(10)),
    ("train[:2]+train[8:]", [0, 1, 8, 9]),
    ("train[8:] + train[:2]", [8, 9, 0, 1]),
    ("train[:0]+train[4:5]", [4]),
]


@pytest.mark.parametrize(("split", "expected"), SLICES)
@pytest.mark.parametrize("kind", ["lines", "array", "csv", "parquet", "several files"])
def test_splits_slice_as_in_datasets(write, kind, split, expected):
    if kind == "several files":
        for name, part in {"a.jsonl": ROWS[:3], "b.jsonl": ROWS[3:9], "c.jsonl": ROWS[9:]}.items():
            write(as_lines(part), name)
        path = "*.jsonl"
    else:
        path = {
            "lines": lambda: write(as_lines(ROWS)),
            "array": lambda: write(json.dumps(ROWS), "rows.json"),
            "csv": lambda: write(as_csv(ROWS), "rows.csv"),
            "parquet": lambda: write(pa.Table.from_pylist(ROWS), "rows.parquet"),
        }[kind]()
    assert [row["output"] for row in values_of(path, split=split)] == [str(n) for n in expected]
    assert numbers_of(path, split=split) == [n + 1 for n in expected]


@pytest.mark.parametrize("split", ["test", "train[[:3", "", "train[:200%]"])
def test_a_split_that_does_not_exist_is_refused(write, split):
    name = write(as_lines(ROWS))
    assert refusal(name, split=split).startswith(
        f"data.split: {split!r} does not fit 'rows.jsonl', a file with the one"
    )
    assert "'*.jsonl', a file with the one split 'train'." in refusal("*.jsonl", split=split)


@pytest.mark.parametrize("split", ["train[:0]", "train[500:]", "train[5:2]", "train[:5%]"])
def test_a_split_without_rows_is_refused(write, split):
    message = refusal(write(as_lines(ROWS)), split=split)
    assert message == f"data.split: {split!r} takes none of its 10 rows from 'rows.jsonl'. Give a slice with examples."


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_an_empty_file_is_empty_whatever_the_split(write, name):
    assert "is empty" in refusal(write("\n", name), split="train[:3]")


# ---- Rows as they are asked for ----


@pytest.mark.parametrize("written", [as_lines, as_csv])
def test_reading_the_first_rows_does_not_reach_the_end_of_the_file(write, written):
    name = write(written(ROWS * 1000).encode() + b"\xff\n", "rows.csv" if written is as_csv else "rows.jsonl")
    rows = read_rows(source_of(name))
    assert [row.values for row in islice(rows, 10)] == ROWS
    with pytest.raises(UserInputError, match="is not UTF-8 text"):
        list(rows)


def test_nothing_is_read_before_a_row_is_asked_for():
    rows = read_rows(source_of("no.jsonl"))
    with pytest.raises(UserInputError, match="no file at"):
        next(rows)


def test_a_later_file_is_not_opened_before_its_rows_are_asked_for(write):
    write(as_lines(ROWS), "a.jsonl")
    write(b"\xff", "b.jsonl")
    assert len(list(islice(read_rows(source_of("*.jsonl")), 10))) == 10
    assert "'b.jsonl' is not UTF-8 text" in refusal("*.jsonl")


# ---- The Hub ----


@pytest.fixture
def hub(monkeypatch):
    """A Hub with one dataset, its splits as given; the calls to `load_dataset` are recorded."""
    calls = []

    def set_up(**splits):
        def load(path, *, split, streaming, **kwargs):
            calls.append({"path": path, "split": split, "streaming": streaming, **kwargs})
            if streaming and split not in splits:
                raise ValueError(f"Bad split: {split}. Available splits: {list(splits)}")
            if streaming:
                return Dataset.from_list(splits[split]).to_iterable_dataset()
            # From files, for the splits and slices that `datasets` itself makes of them.
            for name, rows in splits.items():
                with open(f"{name}.jsonl", "w") as stream:
                    stream.write(as_lines(rows))
            return load_dataset(
                "json", data_files={name: f"{name}.jsonl" for name in splits}, split=split, cache_dir="cache"
            )

        monkeypatch.setattr(read_hub, "load_dataset", load)
        return calls

    return set_up


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(10)),
        ("train[:3]", range(3)),
        ("train[5:9]", range(5, 9)),
        ("train[7:]", range(7, 10)),
        ("train[:2]+train[8:]", [0, 1, 8, 9]),
        ("train[:500]", range(10)),
    ],
)
def test_hub_rows_keep_their_numbers_in_a_slice(hub, split, expected, streaming):
    hub(train=ROWS)
    rows = list(read_rows(source_of("owner/name", split=split), streaming=streaming))
    assert rows == [Row(n + 1, f"row {n + 1}", ROWS[n]) for n in expected]


def test_what_names_a_hub_dataset_is_passed_on(hub):
    calls = hub(train=ROWS)
    source = source_of("owner/name", revision="v1", data_files="a/*.json", name="all")
    list(read_rows(source, streaming=True))
    given = {"path": "owner/name", "split": "train", "revision": "v1", "data_files": "a/*.json", "name": "all"}
    assert calls == [{**given, "streaming": True}]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_several_splits_are_numbered_through(hub, streaming):
    hub(train=ROWS[:4], test=ROWS[4:])
    rows = list(read_rows(source_of("owner/name", split="train[2:]+test"), streaming=streaming))
    assert [row.values for row in rows] == ROWS[2:]
    assert [row.number for row in rows] == list(range(1, 9))


@pytest.mark.parametrize("said", [None, 3, 500])
def test_a_dataset_that_does_not_say_how_long_it_is_is_numbered_all_the_same(monkeypatch, said):
    dataset = Dataset.from_list(ROWS)
    dataset.info.splits = said and SplitDict({"train": SplitInfo("train", num_examples=said)})
    monkeypatch.setattr(read_hub, "load_dataset", lambda *_, **__: dataset)
    assert numbers_of("owner/name") == list(range(1, 11))


@pytest.mark.parametrize("split", ["train[:10%]", "train[-5:]", "train[:-5]", "train[:3]+train[-1:]"])
def test_streaming_needs_row_numbers(hub, split):
    hub(train=ROWS)
    with pytest.raises(UserInputError) as caught:
        list(read_rows(source_of("owner/name", split=split, key="data.eval_path"), streaming=True))
    message = str(caught.value)
    assert message.startswith("data.eval_split: machine.streaming needs row numbers from the start")
    assert f"got {split!r}" in message and "turn machine.streaming off" in message


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("split", ["train[:0]", "train[500:]", "train[5:2]"])
def test_a_hub_split_without_rows_is_refused(hub, split, streaming):
    hub(train=ROWS)
    expected = f"data.split: {split!r} takes none from 'owner/name'. Give a slice with examples."
    with pytest.raises(UserInputError) as caught:
        list(read_rows(source_of("owner/name", split=split), streaming=streaming))
    assert str(caught.value) == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_split_that_does_not_exist_is_refused(hub, streaming):
    hub(train=ROWS)
    with pytest.raises(UserInputError, match=r"^data.split: 'test' does not fit 'owner/name'. \("):
        list(read_rows(source_of("owner/name", split="test"), streaming=streaming))


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("down"),
        RuntimeError("down"),
        HTTPError("down"),
        pa.ArrowException("down"),
        ValueError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_hub_that_fails_is_refused_before_and_between_rows(monkeypatch, error):
    def fail(*_, **__):
        raise error

    def break_off():
        yield from ROWS[:2]
        raise error

    said = str(error) or "ValueError"
    monkeypatch.setattr(read_hub, "load_dataset", fail)
    assert refusal("owner/name") == (
        f"data.path: the dataset 'owner/name' cannot be read from the Hub. Check its name and the network. ({said})"
    )
    monkeypatch.setattr(read_hub, "load_dataset", lambda *_, **__: IterableDataset.from_generator(break_off))
    rows = read_rows(source_of("owner/name"), streaming=True)
    assert [next(rows).values for _ in range(2)] == ROWS[:2]
    with pytest.raises(UserInputError) as caught:
        next(rows)
    assert str(caught.value) == (
        "data.path: the dataset 'owner/name' cannot be read further from the Hub, at the row after 2. Check the "
        f"network, or the dataset's files. ({said})"
    )


def test_a_hub_file_without_rows_is_refused(monkeypatch):
    def fail(*_, **__):
        raise StopIteration  # as `datasets` does for an empty JSON file

    monkeypatch.setattr(read_hub, "load_dataset", fail)
    assert refusal("owner/name") == "data.split: 'train' takes none from 'owner/name'. Give a slice with examples."


def test_files_that_a_hub_dataset_does_not_have_are_named(monkeypatch):
    def fail(*_, **__):
        raise FileNotFoundError("Unable to find 'hf://datasets/owner/name@1/b*' with any supported extension")

    monkeypatch.setattr(read_hub, "load_dataset", fail)
    message = refusal("owner/name", data_files="b*")
    assert message.startswith("data.path: no file of the dataset 'owner/name' matches 'b*'. (Unable to find ")
    assert "cannot be read from the Hub" in refusal("owner/name")


def test_a_hub_dataset_that_cannot_be_reached_is_refused():
    message = refusal("no-such-owner/no-such-dataset")
    assert message.startswith("data.path: the dataset 'no-such-owner/no-such-dataset' cannot be read from the Hub.")


# ---- What identifies a source ----


def test_the_fingerprint_sees_a_byte_a_split_and_the_order_and_no_name_or_time(write):
    content = as_lines(ROWS)
    base = source_fingerprint(source_of(write(content)))
    os.utime("rows.jsonl", (1, 1))
    assert source_fingerprint(source_of("rows.jsonl")) == base
    assert source_fingerprint(source_of(write(content, "sub/other.json"), key="data.eval_path", weight=2.0)) == base

    write(as_lines(ROWS[:5]), "two/a.jsonl")
    write(as_lines(ROWS[5:]), "two/b.jsonl")
    write(as_lines(ROWS[5:]), "owt/a.jsonl")
    write(as_lines(ROWS[:5]), "owt/b.jsonl")
    others = [
        source_of("rows.jsonl", split="train[:5]"),
        source_of(write(content.replace("Say 3", "say 3"), "changed.jsonl")),
        source_of(write(content + "\n", "longer.jsonl")),
        source_of(write(content, "rows.csv")),
        source_of("two/*"),
        source_of("owt/*"),
    ]
    prints = [base, *map(source_fingerprint, others)]
    assert len(set(prints)) == len(prints)
    assert all(len(digest) == 64 and int(digest, 16) for digest in prints)


def test_the_fingerprint_of_a_file_that_is_not_there_is_refused():
    with pytest.raises(UserInputError, match="no file at"):
        source_fingerprint(source_of("no.jsonl"))


def test_the_fingerprint_of_a_hub_dataset_goes_by_its_commit(monkeypatch):
    commits = {None: "c0ffee", "main": "c0ffee", "v1": "decade"}
    info = lambda _, path, *, revision: SimpleNamespace(sha=commits[revision])  # noqa: E731
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", info)
    base = source_fingerprint(source_of("owner/name"))
    assert source_fingerprint(source_of("owner/name", revision="main")) == base
    others = [
        source_of("owner/name", revision="v1"),
        source_of("owner/other"),
        source_of("owner/name", data_files="a*"),
        source_of("owner/name", split="test"),
    ]
    assert len({base, *map(source_fingerprint, others)}) == 5


def test_the_fingerprint_without_the_hub_goes_by_the_local_copy(monkeypatch):
    copies = [Dataset.from_list(ROWS), Dataset.from_list(ROWS[1:])]
    prints = []
    for copy in [*copies, copies[0]]:
        monkeypatch.setattr(read_hub, "load_dataset", lambda *_, copy=copy, **__: copy)
        prints.append(source_fingerprint(source_of("owner/name")))
    assert prints[0] == prints[2] != prints[1]


def test_the_fingerprint_of_a_hub_dataset_that_is_nowhere_is_refused():
    with pytest.raises(UserInputError, match="cannot be read from the Hub"):
        source_fingerprint(source_of("no-such-owner/no-such-dataset"))
