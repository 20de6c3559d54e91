"""Two rows are the same, and two preparations, by what is trained of them: wherever it lies, whatever day it is."""

from datetime import datetime, timedelta

import datasets.config
import pytest
from data_cases import CHATML
from data_files import plain, prepare, section_of, source_of, write
from tiny import byte_tokenizer

from qlora_neft.data.prepare import prepare_data
from qlora_neft.data.store import cache_root
from qlora_neft.data.template_date import dated, with_date, written
from qlora_neft.files import new_held

DAY = datetime(2026, 3, 1, 23, 59, 58)
DATED = "{{ 'Today is ' + strftime_now('%d %b %Y') + '\\n' }}" + CHATML


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer():
    found = byte_tokenizer()
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    found.chat_template = CHATML
    return found


def talk(request, response, **beside):
    return {"messages": [{"role": "user", "content": request, **beside}, {"role": "assistant", "content": response}]}


def overlap_warnings(data):
    return [line for line in data.report["warnings"] if "held-out row" in line]


# ---- The same row ----


def swapped(row):
    """A conversation with its keys in another order."""
    return {"messages": [dict(reversed(message.items())) for message in row["messages"]]}


ROW = talk("Say 1", "It is 1.", id="t1")
SAME = [
    talk("Say 1", "It is 1.", id="e1"),
    talk("Say 1", "It is 1.", timestamp=datetime(2020, 1, 1).isoformat(), meta={"deep": [1]}),
    swapped(talk("Say 1", "It is 1.")),
    {**ROW, "id": 7, "source": "elsewhere"},
]
NEAR = [talk("Say 1", "It is one."), talk("  say\t1", "It is 1.")]
OTHER = [talk("Say 2", "It is 1.")]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        *((row, "1 held-out row is a training row as well") for row in SAME),
        *((row, "1 held-out row begins with the request of a training row and goes on otherwise") for row in NEAR),
        *((row, None) for row in OTHER),
    ],
)
def test_held_out_rows_are_compared_by_what_is_trained(tmp_path, tokenizer, row, said):
    source, held_out = write(tmp_path / "a.jsonl", [ROW, talk("b", "c")]), write(tmp_path / "b.jsonl", [row])
    warnings = overlap_warnings(prepare(source, tokenizer=tokenizer, prompt_template="chat", eval_path=held_out.path))
    assert len(warnings) == (said is not None)
    assert said is None or warnings[0].startswith(f"data.eval_path: {said}")


@pytest.mark.parametrize("row", SAME)
def test_what_no_template_writes_makes_no_other_row(tmp_path, tokenizer, row):
    data = prepare(write(tmp_path / "a.jsonl", [ROW, row]), tokenizer=tokenizer, prompt_template="chat")
    assert data.report["train"]["duplicates"] == 1
    # And both fall on one side of a split.
    options = {"tokenizer": tokenizer, "prompt_template": "chat", "refuse": False}
    halves = prepare(source_of(str(tmp_path / "a.jsonl")), eval_fraction=0.5, **options)
    assert 0 in (len(halves.train), len(halves.eval))


def test_rows_of_plain_text_have_no_request_in_common(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"text": "one"}])
    held_out = write(tmp_path / "b.jsonl", [{"text": "two"}])
    assert overlap_warnings(prepare(source, eval_path=held_out.path)) == []


def test_a_held_out_share_is_compared_too(tmp_path):
    rows = [{"prompt": f"{n % 5}?", "completion": f" {n}"} for n in range(40)]
    data = prepare(write(tmp_path / "a.jsonl", rows), eval_fraction=0.3)
    [line] = overlap_warnings(data)
    assert line.startswith(f"data.eval_fraction: {len(data.eval)} held-out rows begin with the request")


# ---- The same tokens ----


def test_the_tokens_have_a_hash_of_their_own(tmp_path, tokenizer):
    def sums(rows, **stated):
        train = prepare(write(tmp_path / "a.jsonl", rows), tokenizer=tokenizer, **stated).report["train"]
        return train["sha256"], train["tokens_sha256"]

    first = sums(plain(9))
    assert sums(plain(9)) == first
    assert sums(plain(10))[1] != first[1]
    # The same rows, trained in another way, or in another order.
    with_prompts = sums(plain(9), prompt_loss_weight=1.0)
    assert with_prompts[0] == first[0] and with_prompts[1] != first[1]
    assert sums(plain(9)[::-1])[1] != first[1]
    # Other rows that say the same.
    assert sums([{**row, "id": n} for n, row in enumerate(plain(9))]) == first


def test_data_is_found_in_the_cache_wherever_it_lies(tmp_path):
    rows, moved = tmp_path / "one" / "a.jsonl", tmp_path / "two" / "a.jsonl"
    for path in (rows, moved):
        path.parent.mkdir()
        source = write(path, plain(5))
        data = prepare(source)
        assert data.from_cache == (path == moved)
        assert data.report["sources"][0]["path"] == str(path)


# ---- The date ----


@pytest.mark.parametrize("as_file", [False, True])
def test_a_template_writes_the_date_of_a_runs_beginning(tmp_path, tokenizer, as_file):
    source = write(tmp_path / "a.jsonl", [ROW])
    (tmp_path / "dated.jinja").write_text(DATED)
    chat = byte_tokenizer()
    chat.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    chat.chat_template = None if as_file else DATED
    section = section_of(source, prompt_template=str(tmp_path / "dated.jinja") if as_file else "chat")

    def prepared(now):
        data = prepare_data(chat, section, now=now)
        return data.from_cache, data.report["train"]["tokens_sha256"], data.now

    first, later = prepared(DAY), prepared(DAY + timedelta(seconds=1))
    assert not first[0] and first[2] == DAY.isoformat()
    assert later == (True, first[1], (DAY + timedelta(seconds=1)).isoformat())  # the same day
    next_day = prepared(DAY + timedelta(seconds=2))
    assert not next_day[0] and next_day[1] != first[1]
    for path in cache_root().iterdir():
        path.rename(tmp_path / path.name)
    assert prepared(datetime.fromisoformat(first[2])) == first  # an empty cache, on any day
    assert "01 Mar 2026" in chat.decode(prepare_data(chat, section, now=DAY).train[0]["input_ids"])


def test_a_template_without_a_date_is_the_same_on_every_day(tmp_path, tokenizer):
    section = section_of(write(tmp_path / "a.jsonl", [ROW]), prompt_template="chat")
    assert prepare_data(tokenizer, section, now=DAY).now is None
    assert prepare_data(tokenizer, section, now=DAY + timedelta(days=400)).from_cache
    assert dated(CHATML, DAY) == CHATML and with_date(tokenizer, DAY) is tokenizer and written(CHATML, DAY) == []


FORMATS = ["%d %b %Y", "%A %-d %B %Y", "%H:%M:%S %p", "100%% on %j", "%Y-%m-%d", "no directive", "%x %X %c"]


@pytest.mark.parametrize("before", ["", "  ", "\n", "\n  {% if true %}\nx{% endif %}", "{#- note #}\n"])
def test_a_fixed_date_changes_nothing_else_of_a_template(tokenizer, before):
    now = datetime.now()
    calls = "|".join(f"{{{{ strftime_now('{text}') }}}}" for text in FORMATS)
    template = before + calls + "{{ strftime_now is defined }}{{ strftime_now(format='%Y') | int + 1 }}" + CHATML
    given = tokenizer.apply_chat_template(ROW["messages"], chat_template=template, tokenize=False)
    fixed = tokenizer.apply_chat_template(ROW["messages"], chat_template=dated(template, now), tokenize=False)
    assert datetime.now().second != now.second or given == fixed
    assert dated(template, DAY) != dated(template, DAY + timedelta(days=1))
    assert written(template, DAY) == [DAY.isoformat()]  # format= is made up as it goes
    assert written("{{ strftime_now('%Y') }}{{ strftime_now( \"%d\" ) }}", DAY) == ["2026", "01"]


def test_templates_by_name_are_dated_each(tokenizer):
    several = byte_tokenizer()
    several.chat_template = {"default": DATED, "tool_use": CHATML}
    fixed = with_date(several, DAY)
    assert fixed.chat_template == {"default": dated(DATED, DAY), "tool_use": CHATML}
    assert several.chat_template["default"] == DATED


# ---- What killed preparations leave ----


def test_what_killed_preparations_left_is_swept(tmp_path):
    root = cache_root()
    root.mkdir(parents=True)
    dead, alive, foreign = (root / name for name in (f".{'0' * 16}-abc", f".{'1' * 16}-abc", ".mine"))
    with new_held(alive):
        for path in (dead, alive, foreign):
            path.mkdir(exist_ok=True)
            (path / "train.arrow").write_text("half")
        prepare(write(tmp_path / "a.jsonl", plain(3)))
        assert not dead.exists() and (alive / "train.arrow").exists() and (foreign / "train.arrow").exists()
    prepare(write(tmp_path / "a.jsonl", plain(4)))
    assert not alive.exists() and foreign.exists()
