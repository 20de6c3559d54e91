"""The same rows out of every container: compressed files, tables, folders; and the same example from every one."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_cases import examples
from data_files import source_of
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from qlora_neft.data.formats import row_reader
from qlora_neft.data.reading import read_rows, source_fingerprint
from qlora_neft.errors import UserInputError

ROWS = [{"instruction": f"Say {n}", "input": "", "output": str(n)} for n in range(10)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=1).encode()
TABLE = "".join(",".join(row) + "\n" for row in [ROWS[0], *(row.values() for row in ROWS)]).encode()


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def values_of(path, **stated):
    return [row.values for row in read_rows(source_of(str(path), **stated))]


def refusal(path, **stated):
    with pytest.raises(UserInputError) as caught:
        values_of(path, **stated)
    return str(caught.value)


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


# ---- Files ----


@pytest.mark.parametrize("packed", PACKED)
def test_compressed_text_is_read_and_counted(tmp_path, packed):
    for kind, content in {".jsonl": LINES, ".json": ARRAY, ".csv": TABLE}.items():
        path = tmp_path / f"rows{kind}{packed}"
        path.write_bytes(PACKED[packed](content))
        assert values_of(path) == ROWS
        assert values_of(path, split="train[-3:]") == ROWS[-3:]
        path.write_bytes(PACKED[packed](content * 50)[:-20])
        assert f"cannot be decompressed as {packed}. Check that it is whole." in refusal(path)
        path.write_bytes(content)
        assert "cannot be decompressed" in refusal(path)


def test_arrow_files_are_read_in_both_forms(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    for name, new in {"stream.arrow": pa.ipc.new_stream, "file.arrow": pa.ipc.new_file}.items():
        with new(name, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
        assert values_of(name) == ROWS
        assert values_of(name, split="train[:3]") == ROWS[:3]
    (tmp_path / "bad.arrow").write_bytes(LINES)
    assert "cannot be read as Arrow" in refusal("bad.arrow")


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["data", "examples"])
def test_rows_may_stand_under_a_name(tmp_path, name, indent):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": 1, name: ROWS}, indent=indent))
    assert values_of(path) == ROWS
    assert values_of(path, split="train[8:]") == ROWS[8:]


def test_a_single_row_is_a_row(tmp_path):
    talk = {"messages": [{"role": "user", "content": "a"}], "data": [{"b": 1}]}
    for row in (talk, {"talk": [{"b": 1}]}):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        assert values_of("rows.jsonl") == [row]


def test_names_in_a_header_are_stripped(tmp_path):
    (tmp_path / "sp.csv").write_bytes(b"\xef\xbb\xbfinstruction, input, output\nSay one, , One\n")
    assert values_of("sp.csv") == [{"instruction": "Say one", "input": " ", "output": " One"}]


def test_brackets_in_a_folders_name_are_no_pattern(tmp_path):
    folder = tmp_path / "run [1]*"
    (folder / "in").mkdir(parents=True)
    (folder / "in" / "a[1].jsonl").write_bytes(LINES)
    (folder / "b.jsonl").write_bytes(LINES)
    assert values_of("run [1]*/in/a[1].jsonl") == values_of("run [1]*/*.jsonl") == values_of("run [1]*/in/*") == ROWS
    assert values_of(f"{folder}/**/*.jsonl") == ROWS * 2


# ---- Folders ----


def test_what_save_to_disk_writes_is_read(tmp_path):
    both = DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:4]))
    both.save_to_disk("both", num_shards={"train": 3, "test": 1})
    both["train"].save_to_disk("one")
    assert values_of("one") == values_of("both") == ROWS
    assert values_of("both", split="test") == ROWS[:4]
    assert values_of("both", split="train[-2:]+test[:50%]") == [*ROWS[-2:], *ROWS[:2]]
    numbers = [row.number for row in read_rows(source_of("both", split="train[-2:]+test[:2]"))]
    assert numbers == [1, 2, 3, 4]  # counted through, as each split has a row 1
    assert "a folder with the splits train, test" in refusal("both", split="dev[:2]")
    before = source_fingerprint(source_of("both"))
    next(iter((tmp_path / "both" / "train").glob("*-00001-*"))).unlink()
    assert "was written by save_to_disk and is not whole: 'data-00001-of-00003.arrow' is missing" in refusal("both")
    assert before != source_fingerprint(source_of("one"))


README = """---
license: mit
configs:
- config_name: main
  data_files:
  - {split: train, path: "main/*.jsonl"}
  - {split: test, path: [main/more/held.jsonl, ../secret.jsonl]}
- config_name: tables
  data_files: tables/*.parquet
---
# A dataset
"""


def test_a_cloned_dataset_has_the_configurations_of_its_readme(tmp_path):
    (tmp_path / "secret.jsonl").write_bytes(LINES)
    clone = tmp_path / "clone"
    (clone / "main" / "more").mkdir(parents=True)
    (clone / "tables").mkdir()
    (clone / "README.md").write_text(README)
    (clone / "main" / "a.jsonl").write_bytes(LINES)
    (clone / "main" / "more" / "held.jsonl").write_bytes(LINES)
    pq.write_table(pa.Table.from_pylist(ROWS[:5]), clone / "tables" / "t.parquet")
    assert values_of("clone", name="main") == values_of("clone", name="main", split="test") == ROWS
    assert values_of("clone", name="tables") == ROWS[:5]
    assert refusal("clone").endswith("comes in several configurations. Name one with data.name: main, tables.")
    assert refusal("clone", name="mine").endswith("It has main, tables.")
    (clone / "README.md").write_text(README.replace("config_name: tables", "config_name: default"))
    assert values_of("clone") == ROWS[:5]


@pytest.mark.parametrize("shape", ["aliases", "deep", "itself"])
def test_a_readme_that_stands_for_billions_of_values_is_not_built(tmp_path, shape):
    laughs = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    text = {
        "aliases": f"a0: &a0 [x, x]\n{laughs}configs: *a11",
        "deep": "configs: " + "[" * 9000,
        "itself": "a: &a [*a]",
    }
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "README.md").write_text(f"---\n{text[shape]}\n---\n")
    (tmp_path / "clone" / "a.jsonl").write_bytes(LINES)
    assert values_of("clone") == ROWS  # as a folder without one


def test_files_of_a_folder_are_of_the_split_that_their_names_tell(tmp_path):
    for name in ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/validation.jsonl.gz"):
        path = tmp_path / "ours" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(LINES) if name.endswith(".gz") else LINES)
    (tmp_path / "ours" / "dataset_infos.json").write_text("{}")
    (tmp_path / "ours" / "LICENSE").write_text("MIT")
    assert values_of("ours") == ROWS * 2
    assert values_of("ours", split="validation") == ROWS
    assert [row.place for row in read_rows(source_of("ours"))][10] == "train-00001-of-00002.jsonl, line 1"
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "retraining.csv").write_bytes(TABLE)  # no word of its own
    assert values_of("plain") == ROWS


# ---- The same rows ----

NAMES = ("city", "hour", "unit", "days", "deep")
SCALARS = {
    "city": st.sampled_from(["Rome", "", "Zoë\n"]) | st.none(),
    "hour": st.sampled_from([6, 7.5, 0, -1.0]) | st.none(),
    "unit": st.booleans(),
    "days": st.lists(st.sampled_from(["Mo", "Tu"]), max_size=2) | st.none(),
}
INNER = st.fixed_dictionaries({}, optional=SCALARS)


@st.composite
def arguments(draw):
    """Some of the arguments, in any order."""
    deep = st.fixed_dictionaries({}, optional={**SCALARS, "deep": INNER, "list": st.lists(INNER, max_size=2)})
    found = {name: draw(deep if name == "deep" else SCALARS[name]) for name in draw(st.permutations(NAMES))}
    return {name: value for name, value in found.items() if draw(st.booleans())}


@st.composite
def tool_rows(draw):
    names = draw(st.lists(st.sampled_from(NAMES), unique=True))
    schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}, "required": names[:2]}
    calls = draw(st.lists(arguments(), min_size=1, max_size=2))
    called = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": found}} for found in calls]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": called}]
    messages.append({"role": "tool", "content": "yes", "tool_call_id": "c"})
    messages.append({"role": "assistant", "content": "Yes.", **({"weight": 0} if draw(st.booleans()) else {})})
    tools = [{"type": "function", "function": {"name": "f", "description": "does", "parameters": schema}}]
    return {"messages": messages, **({"tools": tools} if draw(st.booleans()) else {})}


# With every field, so that no struct is without one, which Parquet cannot store.
WHOLE = {"city": "a", "hour": 1.5, "unit": True, "days": ["Mo"], "deep": None}
DEEP = {**WHOLE, "deep": {"city": "a", "hour": 2, "unit": True, "days": ["Mo"]}}
FULL = {
    "messages": [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "",
            "weight": 1,
            "tool_call_id": None,
            "tool_calls": [
                {
                    "id": "c",
                    "type": "function",
                    "function": {"name": "f", "arguments": {**DEEP, "deep": {**DEEP, "list": [DEEP["deep"]]}}},
                }
            ],
        },
    ],
    "tools": [
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": {
            "type": "object", "properties": {name: {"type": "string"} for name in NAMES}, "required": ["city"]}}}
    ],
}  # fmt: skip


@given(st.lists(tool_rows(), min_size=1, max_size=3))
@examples(25)
def test_the_same_rows_are_the_same_examples_out_of_every_container(tmp_path_factory, rows):
    rows = [FULL, *rows]
    folder = tmp_path_factory.mktemp("rows")
    table = pa.Table.from_pylist(rows)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rows.json").write_text(json.dumps(rows, indent=1))
    with (folder / "rows.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["messages", "tools"])
        writer.writeheader()
        writer.writerows({name: json.dumps(value) for name, value in row.items()} for row in rows)
    as_text = [{**row, "messages": [_with_text(message) for message in row["messages"]]} for row in rows]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in as_text))
    pq.write_table(table, folder / "rows.parquet")
    with pa.ipc.new_file(str(folder / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
    first = spelled(folder / "rows.jsonl")
    for name in ("rows.json", "rows.csv", "text.jsonl", "rows.parquet", "rows.arrow", "saved"):
        assert spelled(folder / name) == first, name


def _with_text(message):
    """A message whose calls have arguments as OpenAI writes them."""
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls} if calls else message


def spelled(path):
    """The examples of a source, written so that the order of keys counts, as it does in a template."""
    rows = values_of(path)
    reader = row_reader(rows)
    found = [reader.read(row).example for row in rows]
    return [json.dumps([example.messages, example.tools, example.trained_turns]) for example in found]
