"""Data files that no run may train on, by what is wrong with them, and mutants of good files.

What is wrong is known here without the package under test: by how a file was made, or by ``json.loads`` of each line.
"""

from __future__ import annotations

import bz2
import copy
import gzip
import io
import json
import lzma
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

NUM_ROWS = 8
CHAT_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<s>{{ m.role }} {{ m.name }}\n{{ m.content }}"
    "{% for call in m.tool_calls %}{{ call | tojson }}{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant \n{% endif %}"
)
CHAT = ("data.prompt_template=chat.jinja",)
HALF_PAIR = "a\ud800b"  # one of two UTF-16 surrogates; JSON can spell it
NOT_TEXT = [7, -1.5, True, False, [], ["a"], {}, {"a": {"b": [1]}}, HALF_PAIR, int("9" * 4000)]
DEPTHS = (101, 300, 500, 900, 1000, 5000, 100_000)


class Malformed(NamedTuple):
    """A file that must be refused.

    Attributes:
        suffix: Its kind.
        content: Its bytes.
        place: The first row at fault, as a message names it; None if it is the file as a whole.
        overrides: What the recipe must say besides.
    """

    suffix: str
    content: bytes
    place: str | None = None
    overrides: tuple[str, ...] = ()


Files = Iterator[Malformed]


# ---- Good rows, and how they are written ----


def alpaca(number: int) -> dict[str, Any]:
    return {"instruction": f"Say {number}: é", "input": "", "output": f"ü {number}"}


def completion(number: int) -> dict[str, Any]:
    return {"prompt": f"Say {number}:", "completion": f" {number}"}


def text(number: int) -> dict[str, Any]:
    return {"text": f"Said {number}."}


def shared(number: int) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"Say {number}"}, {"from": "gpt", "value": str(number)}]
    return {"system": "Be brief.", "conversations": turns}


def messages(number: int) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"Say {number}", "name": "Ann"}, {"role": "assistant", "content": str(number)}]
    return {"messages": turns, "tools": [{"name": "count"}]}


FORMATS: dict[Callable[[int], dict[str, Any]], tuple[str, ...]] = {
    alpaca: (),
    completion: (),
    text: (),
    shared: (),
    messages: CHAT,
}  # to what their recipe must say
FLAT = (alpaca, completion, text)  # those that CSV can hold


def good(row: Callable[[int], dict[str, Any]] = alpaca) -> list[Any]:
    return [row(number) for number in range(NUM_ROWS)]


def as_lines(rows: list[Any]) -> bytes:
    return b"".join(_json(row) + b"\n" for row in rows)


def as_array(rows: list[Any]) -> bytes:
    """One entry a line, from line 2 on."""
    return b"[\n" + b",\n".join(map(_json, rows)) + b"\n]\n"


def as_csv(rows: list[dict[str, str]]) -> bytes:
    return "".join(",".join(fields) + "\n" for fields in [list(rows[0]), *(row.values() for row in rows)]).encode()


def as_parquet(rows: list[dict[str, Any]] | pa.Table) -> bytes:
    stream = io.BytesIO()
    pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), stream, row_group_size=3)
    return stream.getvalue()


WRITTEN = {".jsonl": as_lines, ".json": as_array, ".csv": as_csv, ".parquet": as_parquet}


def place_in(suffix: str, number: int) -> str:
    """What a message calls a row, counted from 1, in a file that `WRITTEN` wrote."""
    return {
        ".jsonl": f"line {number}",
        ".json": f"entry {number}",
        ".csv": f"line {number + 1}",
        ".parquet": f"row {number}",
    }[suffix]


def _json(value: Any) -> bytes:
    """Text as it is, but for half pairs, which UTF-8 cannot hold."""
    spelled = json.dumps(value, ensure_ascii=False)
    return (spelled if spelled.isprintable() else json.dumps(value)).encode()


def first_line_that_is_no_json(content: bytes) -> int | None:
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            if line.strip():
                json.loads(line.decode())
        except ValueError:
            return number
    return None


def with_bad_rows(
    draw: random.Random, bad: list[Any], row: Callable[[int], Any] = alpaca, suffixes: tuple[str, ...] = (".jsonl",)
) -> Files:
    """For each bad row a file of good ones with it in two places; not in the first line, which tells an array."""
    for number, value in enumerate(bad):
        rows, suffix = good(row), suffixes[number % len(suffixes)]
        first, second = sorted(draw.sample(range(1, NUM_ROWS), 2))
        rows[first] = rows[second] = value
        yield Malformed(suffix, WRITTEN[suffix](rows), place_in(suffix, first + 1), FORMATS[row])


# ---- Bytes ----


def truncated_lines(draw: random.Random) -> Files:
    content = as_lines(good())
    yield from _no_json(content[: draw.randrange(1, len(content))] for _ in range(20))


def flipped_bytes(draw: random.Random) -> Files:
    content = as_lines(good())
    yield from _no_json(flipped(content, draw) for _ in range(80))


def inserted_bytes(draw: random.Random) -> Files:
    content = as_lines(good())
    yield from _no_json(inserted(content, draw) for _ in range(30))


def flipped(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def inserted(content: bytes, draw: random.Random) -> bytes:
    place, byte = draw.randrange(len(content)), draw.choice([*b'{}[]",:\\\0\n\x80', draw.randrange(256)])
    return content[:place] + bytes([byte]) + content[place:]


def _no_json(contents: Iterator[bytes]) -> Files:
    """Those that are malformed; what begins with a bracket is an array, and another matter."""
    for content in contents:
        line = first_line_that_is_no_json(content)
        if line is not None and not content.lstrip().startswith(b"["):
            yield Malformed(".jsonl", content, f"line {line}")


def empty(draw: random.Random) -> Files:
    for suffix in WRITTEN:
        yield Malformed(suffix, b"")
        for blank in (b"\n", b" \n\t\n  ", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"):
            yield Malformed(suffix, blank)
    yield Malformed(".json", b"[]")
    yield Malformed(".jsonl", b"\n[ ]\n")


def encodings(draw: random.Random) -> Files:
    for suffix in (".jsonl", ".json", ".csv"):
        spelled = WRITTEN[suffix](good()).decode()
        for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
            yield Malformed(suffix, spelled.encode(encoding), None if suffix == ".json" else "line 1")
        for encoding, word in (("latin-1", "Zoë"), ("cp1252", "“so”"), ("shift_jis", "日本")):
            line = draw.randrange(2, NUM_ROWS)
            yield Malformed(suffix, _with_word(WRITTEN[suffix](good()), line, word.encode(encoding)), f"line {line}")


def _with_word(content: bytes, line: int, word: bytes) -> bytes:
    """Rows of `alpaca` with another word in one line."""
    lines = content.split(b"\n")
    lines[line - 1] = lines[line - 1].replace("ü".encode(), word)
    return b"\n".join(lines)


def nul_bytes(draw: random.Random) -> Files:
    for suffix in (".jsonl", ".csv"):
        for _ in range(3):
            row = draw.randrange(1, NUM_ROWS + 1)
            line = row + (suffix == ".csv")
            yield Malformed(suffix, _with_word(WRITTEN[suffix](good()), line, b"a\0b"), f"line {line}")
    yield Malformed(".csv", as_csv(good()).replace(b"input", b"in\0put"), "line 1")
    yield Malformed(".jsonl", as_lines(good()) + b"\0\n", f"line {NUM_ROWS + 1}")
    yield from (Malformed(suffix, bytes(1000)) for suffix in WRITTEN)


def compressed(draw: random.Random) -> Files:
    for suffix, written in WRITTEN.items():
        content = written(good())
        yield from (Malformed(suffix, pack(content)) for pack in (gzip.compress, bz2.compress, lzma.compress, _zipped))


def _zipped(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows", content)
    return stream.getvalue()


# ---- JSON ----


def wrong_types(draw: random.Random) -> Files:
    fields = {alpaca: ["instruction", "input", "output"], completion: ["prompt", "completion"], text: ["text"]}
    for row, names in fields.items():
        for name in names:
            values = NOT_TEXT if name == "output" else draw.sample(NOT_TEXT, 5)
            values = values + [None] * (name != "input")
            yield from with_bad_rows(draw, [{**row(99), name: v} for v in values], row, (".jsonl", ".json"))


def missing_fields(draw: random.Random) -> Files:
    required = {
        alpaca: ["instruction", "output"],
        completion: ["prompt", "completion"],
        text: ["text"],
        shared: ["conversations"],
        messages: ["messages"],
    }
    for row, names in required.items():
        without = [{key: value for key, value in row(99).items() if key != name} for name in names]
        yield from with_bad_rows(draw, [*without, {}], row)
        yield from with_bad_rows(draw, without, row, (".json",))


def no_objects(draw: random.Random) -> Files:
    values = [None, 5, -0.5, True, "a", "", [], [1], [{"instruction": "a", "output": "b"}], float("nan")]
    yield from with_bad_rows(draw, values)
    yield from with_bad_rows(draw, values, suffixes=(".json",))


def cut_arrays(draw: random.Random) -> Files:
    """Where an array breaks off, or goes on behind its end, is told by its line."""
    content = as_array(good())
    ends = [content[: draw.randrange(1, len(content) - 2)] for _ in range(10)]
    for broken in [*ends, content + b"]", content + b"{}", content.replace(b"\n]", b",\n]"), b"[" + content]:
        try:
            json.loads(broken.decode(errors="replace"))
        except json.JSONDecodeError as error:
            yield Malformed(".json", broken, f"line {error.lineno}")


def nested(draw: random.Random) -> Files:
    for depth in DEPTHS:
        lists, objects = b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth
        for bad in (b'{"instruction": "a", "output": ' + lists + b"}", objects, lists, b'{"instruction": ' + lists):
            line = draw.randrange(2, NUM_ROWS)
            lines = as_lines(good()).splitlines()
            yield Malformed(".jsonl", b"\n".join([*lines[: line - 1], bad, *lines[line - 1 :]]), f"line {line}")
        row = {**messages(99), "tools": "[" * depth + "]" * depth}
        if depth >= 300:  # fewer are no more than many tokens
            yield Malformed(".jsonl", as_lines([*good(messages), row]), f"line {NUM_ROWS + 1}", CHAT)
    yield from (Malformed(suffix, b"[" * 100_000) for suffix in (".json", ".jsonl"))
    deep = {"instruction": "a", "output": json.loads("[" * 500 + "]" * 500)}  # too deep to be handed to a process
    yield Malformed(".jsonl", as_lines([*good(), deep]), f"line {NUM_ROWS + 1}", ("machine.dataset_num_proc=2",))


def huge_numbers(draw: random.Random) -> Files:
    digits = b"7" * 5000
    for bad in (b'{"instruction": "a", "output": %s}', b"%s", b"-%s", b'{"a": [{"b": %s}]}'):
        yield Malformed(".jsonl", as_lines(good()) + bad % digits, f"line {NUM_ROWS + 1}")
    row = {**messages(99), "tools": '[{"limit": ' + digits.decode() + "}]"}
    yield Malformed(".jsonl", as_lines([*good(messages), row]), f"line {NUM_ROWS + 1}", CHAT)
    yield Malformed(".json", b'[{"instruction": "a", "output": %s}]' % digits)


def no_rows(draw: random.Random) -> Files:
    """Objects over several lines."""
    yield Malformed(".json", json.dumps({"train": good(), "test": good()}, indent=1).encode(), "line 1")
    yield Malformed(".json", json.dumps(alpaca(1), indent=1).encode(), "line 1")
    yield Malformed(".json", json.dumps({"data": alpaca(1), "version": 2}, indent=1).encode(), "line 1")
    yield Malformed(".jsonl", json.dumps(alpaca(1), indent=1).encode(), "line 1")


# ---- CSV ----


def csv_fields(draw: random.Random) -> Files:
    for bad in ("a", "a,b", "a,b,c,d", "a,b,c,", ",,,,", '"a,b,c"', "a, b, c, d, e"):
        row = draw.randrange(NUM_ROWS)
        lines = as_csv(good()).decode().splitlines()
        lines[row + 1] = bad
        yield Malformed(".csv", "\n".join(lines).encode(), f"line {row + 2}")


def csv_quotes(draw: random.Random) -> Files:
    for bad in ('"a,b,c', 'a,b,"c', 'a,"b"x,c', '"a" ,b,c', 'a,b,"c""'):
        row = draw.randrange(NUM_ROWS)
        lines = as_csv(good()).decode().splitlines()
        lines[row + 1] = bad
        yield Malformed(".csv", "\n".join(lines).encode(), f"line {row + 2}")
    yield Malformed(".csv", as_csv(good()) + b"a,b\rc,d\n", f"line {NUM_ROWS + 2}")


def csv_headers(draw: random.Random) -> Files:
    rows = as_csv(good()).split(b"\n", 1)[1]
    for header in (b"instruction,output,output", b"a,a,a", b",instruction,output", b"instruction, ,output"):
        yield Malformed(".csv", header + b"\n" + rows, "line 1")
    yield Malformed(".csv", b"instruction;output\na;b\n", "line 1")
    yield Malformed(".csv", b"instruction\toutput\na\tb\n", "line 1")
    yield Malformed(".csv", rows)  # without one, the first row is taken for it
    yield Malformed(".csv", b"a long text, and another\n" * 9)
    yield Malformed(".csv", b"instruction,input,output\n")
    yield Malformed(".csv", b"\n\ninstruction,input,output\n\n\n")


# ---- Parquet ----


def broken_parquet(draw: random.Random) -> Files:
    content = as_parquet(good())
    for size in (
        1,
        4,
        8,
        12,
        len(content) - 1,
        len(content) - 8,
        *(draw.randrange(13, len(content)) for _ in range(6)),
    ):
        yield Malformed(".parquet", content[:size])
    yield Malformed(".parquet", content[:-4] + b"PAR2")
    yield Malformed(".parquet", content[:-8] + b"\xff\xff\xff\x7f" + content[-4:])
    yield Malformed(".parquet", content + b"\n")
    yield from (Malformed(".parquet", write(good())) for write in (as_lines, as_array, as_csv))


def parquet_columns(draw: random.Random) -> Files:
    texts = [str(n) for n in range(NUM_ROWS)]
    columns = [
        list(range(NUM_ROWS)),
        [n / 2 for n in range(NUM_ROWS)],
        [n > 3 for n in range(NUM_ROWS)],
        [[t] for t in texts],
        [{"value": t} for t in texts],
        [t.encode() for t in texts],
        [None] * NUM_ROWS,
    ]
    for number, column in enumerate(columns):
        other = ("instruction", "output")[number % 2]
        here = ("output", "instruction")[number % 2]
        yield Malformed(".parquet", as_parquet(pa.table({other: texts, here: column})), "row 1")
    for _ in range(4):
        row = draw.randrange(NUM_ROWS)
        holed = [None if n == row else t for n, t in enumerate(texts)]
        yield Malformed(".parquet", as_parquet(pa.table({"instruction": texts, "output": holed})), f"row {row + 1}")
    yield Malformed(".parquet", as_parquet(pa.table({"instruction": texts})))
    yield Malformed(".parquet", as_parquet(pa.table({"instruction": pa.array([], pa.string())})))
    yield Malformed(".parquet", as_parquet(pa.table({})))
    yield Malformed(".parquet", as_parquet(pa.table([texts, texts], names=["output", "output"])))


# ---- Conversations ----


def conversations(draw: random.Random) -> Files:
    ask, answer = shared(99)["conversations"]
    speakers = ["robot", "", "GPT4", None, 7, True, [], ["gpt"], {"a": 1}, HALF_PAIR]
    turns = [[{**ask, "from": speaker}, answer] for speaker in speakers]
    turns += [[ask, {"from": "gpt", "value": value}] for value in [*NOT_TEXT, None]]
    turns += [[ask, {"from": "gpt"}], [{"value": "a"}, answer], [ask, None], [ask, "a"], [ask, [answer]], [5]]
    turns += [None, "a", 5, {"0": ask}, [], [ask], [ask, ask], [answer], [ask, {**answer, "value": " "}]]
    bad = [{"conversations": value} for value in turns]
    bad += [{**shared(99), "system": system} for system in (7, ["a"], {"a": 1}, True, HALF_PAIR)]
    bad += [{**shared(99), "tools": tools} for tools in ("[", "none", 7, {"a": 1}, ["a"], [None])]
    yield from with_bad_rows(draw, bad, shared, (".jsonl", ".jsonl", ".json"))


def chats(draw: random.Random) -> Files:
    ask, answer = messages(99)["messages"]
    turns = [[{**ask, "role": role}, answer] for role in ["alien", "", None, 7, [], ["user"], {"a": 1}]]
    turns += [[{**ask, "content": value}, answer] for value in [*NOT_TEXT[:4], *NOT_TEXT[6:], ["a"], [[]], None]]
    turns += [[{**ask, "content": [{"type": kind, "text": value}]}, answer] for kind, value in PARTS]
    turns += [[{"role": "user"}, answer], [ask, {"role": "assistant"}], [{"content": "a"}, answer], [ask, "a"], [7]]
    turns += ["a", 5, {"0": ask}, [], [ask], [ask, {**answer, "content": ""}]]
    turns += [[{**ask, "name": HALF_PAIR}, answer], [ask, {**answer, "tool_calls": [{"name": HALF_PAIR}]}]]
    turns += [[ask, {**answer, "tool_calls": 7}], [ask, {**answer, "tool_calls": True}]]
    bad = [{"messages": value} for value in turns]
    tools = ("[", "none", '{"a": 1}', 7, {"a": 1}, ["a"], [None], [{"name": HALF_PAIR}])
    bad += [{**messages(99), "tools": value} for value in tools]
    yield from with_bad_rows(draw, bad, messages, (".jsonl", ".jsonl", ".json"))


PARTS = [("image", "a"), ("text", None), ("text", 7), (None, "a"), ("text", HALF_PAIR)]


# ---- Rows that are as they should be, and teach nothing ----


def repeated(draw: random.Random) -> Files:
    for row, overrides in FORMATS.items():
        for suffix in WRITTEN if row in FLAT else (".jsonl", ".json", ".parquet"):
            yield Malformed(suffix, WRITTEN[suffix]([row(1)] * NUM_ROWS), place_in(suffix, 2), overrides)
    yield Malformed(".jsonl", as_lines([*good()[:3], *good()[:3], *[alpaca(2)] * 5]), "line 4")


def blank(draw: random.Random) -> Files:
    for suffix, written in WRITTEN.items():
        yield Malformed(suffix, written([{**alpaca(n), "output": ""} for n in range(NUM_ROWS)]), place_in(suffix, 1))
        yield Malformed(suffix, written([{**completion(n), "completion": " "} for n in range(5)]), place_in(suffix, 1))
        yield Malformed(suffix, written([{"text": ""}] * 3), None if suffix == ".csv" else place_in(suffix, 1))
        yield Malformed(suffix, written([{"instruction": " ", "output": "a"}] * 3), place_in(suffix, 1))


def too_long(draw: random.Random) -> Files:
    """A prompt without room for its response is a matter of no row if all are so."""
    for suffix, written in WRITTEN.items():
        responses = [{"instruction": str(n), "output": "long " * 200} for n in range(5)]
        yield Malformed(suffix, written(responses), place_in(suffix, 1))
        yield Malformed(suffix, written([{"instruction": "long " * 200 + str(n), "output": "a"} for n in range(5)]))
        one = [{**completion(n), "prompt": "long " * 200 if n == 3 else "a"} for n in range(NUM_ROWS)]
        yield Malformed(suffix, written(one), place_in(suffix, 4))


def no_format(draw: random.Random) -> Files:
    for suffix, written in WRITTEN.items():
        for names in (("verse", "rhyme"), ("instruction", "rhyme"), ("prompt", "output")):
            yield Malformed(suffix, written([dict.fromkeys(names, str(n)) for n in range(3)]))
        yield Malformed(suffix, written([{"a": "b"}]), None, ("data.format=messages",))
        yield Malformed(suffix, written(good()), None, ("data.format=prompt-completion",))
    yield Malformed(".jsonl", b"{}\n{}\n")
    yield Malformed(".jsonl", as_lines([{"a\nb\x1b[31m": 1, HALF_PAIR: 2, "x" * 9999: 3}]))
    yield Malformed(".jsonl", as_lines([{f"column {n}": n for n in range(5000)}]))


KINDS = [
    truncated_lines,
    flipped_bytes,
    inserted_bytes,
    empty,
    encodings,
    nul_bytes,
    compressed,
    wrong_types,
    missing_fields,
    no_objects,
    cut_arrays,
    nested,
    huge_numbers,
    no_rows,
    csv_fields,
    csv_quotes,
    csv_headers,
    broken_parquet,
    parquet_columns,
    conversations,
    chats,
    repeated,
    blank,
    too_long,
    no_format,
]


def files_of(kind: Callable[[random.Random], Files]) -> dict[str, Malformed]:
    """All files of a kind by name, always the same."""
    files = kind(random.Random(kind.__name__))
    return {f"{kind.__name__}-{number}{file.suffix}": file for number, file in enumerate(files)}


def write_files(files: dict[str, Malformed]) -> None:
    for name, file in files.items():
        Path(name).write_bytes(file.content)


# ---- Mutants, good or not ----


def mutated_rows(draw: random.Random, row: Callable[[int], dict[str, Any]], count: int) -> list[Any]:
    """Rows with one to three values replaced, left out or put elsewhere, at any depth."""
    rows = []
    for number in range(count):
        value = row(number)
        for _ in range(draw.randint(1, 3)):
            value = _mutated(value, draw)
        rows.append(value)
    return rows


def _mutated(value: Any, draw: random.Random) -> Any:
    value = copy.deepcopy(value)
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.1:
        return draw.choice([*NOT_TEXT, None, "", "\ufffd", "</s>", "user", "assistant", "\0", float("inf"), value])
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = draw.choice(keys)
    change = draw.random()
    if change < 0.1:
        del value[key]
    elif change < 0.2:
        value[key] = value[draw.choice(keys)]
    elif change < 0.3 and isinstance(value, list):
        value.insert(key, value[key])
    else:
        value[key] = _mutated(value[key], draw)
    return value


def mutated_bytes(draw: random.Random, content: bytes) -> bytes:
    """A few bytes flipped, put in or cut out, or the end cut off."""
    for _ in range(draw.randint(1, 4)):
        begin = draw.randrange(len(content))
        cut = content[:begin] + content[begin + draw.randint(1, 9) :]
        content = draw.choice([flipped(content, draw), inserted(content, draw), cut, content[: begin + 1]]) or b"\n"
    return content
