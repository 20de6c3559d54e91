"""The whole preparation: by how many processes, what is kept, and when it is found again."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from data_cases import LLAMA2
from data_files import plain, prepare, source_of, talks, texts, write
from tiny import byte_tokenizer

from qlora_neft.data.parallel import CHUNK, MIN_ROWS_PER_PROCESS
from qlora_neft.data.store import cache_root
from qlora_neft.data.worker import RowWorker
from qlora_neft.errors import RunFailed, UserInputError
from qlora_neft.recipe.schema import Data


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def columns(data):
    return [None if part is None else part.to_dict() for part in (data.train, data.eval)]


def kept_folders():
    return sorted(cache_root().iterdir()) if cache_root().exists() else []


# ---- Processes ----


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """2,600 rows of two sources, with some of everything: empty, repeated, too long, split, cut, to be held out."""
    folder = tmp_path_factory.mktemp("large")
    rows = plain(2100)
    for n in range(0, 2100, 7):
        rows[n] = {"prompt": "p" * (n % 400), "completion": " r" * (n % 150) or " "}
    return write(folder / "a.jsonl", rows + rows[100:200]), write(folder / "b.jsonl", talks(400))


@pytest.fixture(scope="module")
def by_one_process(large, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("one"))
        seen = []
        data = prepare(*large, eval_fraction=0.1, max_length=320, progress=seen.append)
        [folder] = kept_folders()
    assert seen == [CHUNK] * 4 + [200, 400]
    return data, folder


@pytest.mark.parametrize("num_proc", [3, "auto"])
def test_any_number_of_processes_writes_the_same_bytes(large, by_one_process, num_proc):
    one, folder = by_one_process
    assert sum(d["rows"] for d in one.report["sources"]) > MIN_ROWS_PER_PROCESS
    seen = []
    many = prepare(*large, eval_fraction=0.1, max_length=320, num_proc=num_proc, progress=seen.append)
    assert sum(seen) == 2600 and not many.from_cache
    assert many.report == one.report
    assert (many.largest_token_id, many.stop_token_ids) == (one.largest_token_id, one.stop_token_ids)
    [other] = kept_folders()
    for name in ("train.arrow", "eval.arrow", "state.json"):
        assert (other / name).read_bytes() == (folder / name).read_bytes()


def test_a_process_that_dies_is_said_to_have(tmp_path, monkeypatch):
    monkeypatch.setattr(RowWorker, "__call__", lambda self, rows: os._exit(9))
    with pytest.raises(RunFailed, match=r"a process that prepares data died.*machine\.dataset_num_proc=1"):
        prepare(write(tmp_path / "a.jsonl", plain(1200)), num_proc=2)
    assert kept_folders() == []


# ---- The cache ----


def test_what_was_prepared_is_found_again(tmp_path):
    source = write(tmp_path / "a.jsonl", plain(50))
    first, second = (prepare(source, eval_fraction=0.2) for _ in range(2))
    assert (first.from_cache, second.from_cache) == (False, True)
    assert columns(first) == columns(second)
    assert replace(second, train=None, eval=None) == replace(first, train=None, eval=None, from_cache=True)
    [folder] = kept_folders()
    assert sorted(path.name for path in folder.iterdir()) == ["eval.arrow", "state.json", "train.arrow"]


def other_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["completely"])
    return tokenizer


# Each changes one thing that the sequences follow from.
OTHER = {
    "template": lambda source: ([replace(source, prompt_template="vicuna")], {}),
    "format": lambda source: ([replace(source, format="prompt-completion")], {}),
    "columns": lambda source: ([replace(source, columns={"prompt": "instruction", "completion": "output"})], {}),
    "roles": lambda source: ([replace(source, roles={"bot": "assistant"})], {}),
    "system_prompt": lambda source: ([replace(source, system_prompt="Be brief.")], {}),
    "weight": lambda source: ([replace(source, weight=2.0)], {}),
    "split": lambda source: ([replace(source, split="train[:10]")], {}),
    "twice": lambda source: ([source, source], {}),
    "tokenizer": lambda source: ([source], {"tokenizer": other_tokenizer()}),
    "eval_fraction": lambda source: ([source], {"eval_fraction": 0.25}),
    "eval_path": lambda source: ([source], {"eval_path": str(Path(source.path).with_name("held_out.jsonl"))}),
    "eval_split": lambda source: ([source], {"eval_split": "train[:5]"}),
    "max_length": lambda source: ([source], {"max_length": 255}),
    "max_prompt_length": lambda source: ([source], {"max_prompt_length": 100}),
    "max_response_length": lambda source: ([source], {"max_response_length": 100}),
    "split_text": lambda source: ([source], {"split_text": True}),
    "train_on": lambda source: ([source], {"train_on": "last-response"}),
    "prompt_loss_weight": lambda source: ([source], {"prompt_loss_weight": 0.5}),
    "train_on_prompt": lambda source: ([source], {"train_on_prompt": True}),
    "keep_end_token": lambda source: ([source], {"keep_end_token": False}),
    "split_conversations": lambda source: ([source], {"split_conversations": False}),
}


def test_whatever_the_sequences_follow_from_is_in_the_key(tmp_path):
    elsewhere = {
        "path",
        "mixture",
        "revision",
        "data_files",
        "name",
        "prompt_template",
        "chat_template_kwargs",
    }  # other bytes; other tests
    allowed = {name for name in Data.model_fields if name.endswith("_fraction") and name != "eval_fraction"}
    assert Data.model_fields.keys() - elsewhere - allowed <= OTHER.keys()
    source = write(tmp_path / "a.jsonl", plain(20))
    write(tmp_path / "held_out.jsonl", plain(9))
    prepare(source)
    for name, changed in OTHER.items():
        sources, options = changed(source)
        assert not prepare(*sources, **options).from_cache, name
    assert len(kept_folders()) == 1 + len(OTHER)
    write(Path(source.path), plain(21))
    assert not prepare(source).from_cache
    write(Path(source.path), plain(20))
    assert prepare(source).from_cache  # the bytes decide


def test_a_template_files_text_is_in_the_key(tmp_path):
    path = tmp_path / "own.jinja"
    source = replace(write(tmp_path / "a.jsonl", talks(3)), prompt_template=str(path))
    for text, found in ((LLAMA2, False), (LLAMA2, True), (LLAMA2.replace("[INST]", "[ASK]"), False)):
        path.write_text(text)
        data = prepare(source, max_length=1000)
        assert data.from_cache == found and data.chat_template == text
    assert "[ASK]" in texts(data.train)[0]
    other = path.rename(tmp_path / "renamed.jinja")
    data = prepare(replace(source, prompt_template=str(other)), max_length=1000)
    assert data.report["sources"][0]["prompt_template"] == str(other)


def test_whatever_changes_no_sequence_is_not_in_the_key(tmp_path):
    source = write(tmp_path / "a.jsonl", plain(20))
    first = prepare(source)
    os.utime(source.path, (1, 1))
    padded = byte_tokenizer()
    padded(["a", "abc"], padding=True, truncation=True, max_length=2)
    options = [
        {"max_dropped_fraction": 0.5, "max_truncated_fraction": 0.1, "max_duplicate_fraction": 0.2},
        {"num_proc": 2},
        {"refuse": False},
        {"tokenizer": padded},
        {},
    ]
    for option in options:
        data = prepare(source, key="--data", **option)
        assert data.from_cache, option
        assert columns(data) == columns(first)


def cut_file(name, share):
    def damage(folder):
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[: int(len(raw) * share)])

    return damage


def without_its_last_batch(folder):
    with pa.ipc.open_stream((folder / "train.arrow").read_bytes()) as stream:
        schema, batches = stream.schema, list(stream)
    assert len(batches) > 1
    with pa.ipc.new_stream(str(folder / "train.arrow"), schema) as out:
        for batch in batches[:-1]:
            out.write_batch(batch)


def replaced(name, text):
    return lambda folder: (folder / name).write_text(text)


def overwritten(name, place, content):
    """Writes over a share of the way into a file, which keeps its size."""

    def damage(folder):
        path = folder / name
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.seek(int(size * place))
            file.write(content[: size - file.tell()])

    return damage


DAMAGES = {
    **{f"train {share}": cut_file("train.arrow", share) for share in (0.0, 0.02, 0.3, 0.7, 0.99)},
    **{f"state {text!r}": replaced("state.json", text) for text in ("", "{", "[]", "null", "{}", '{"train": 1}')},
    "train shorter": without_its_last_batch,
    # Arrow reads these without an error.
    "a token of train": overwritten("train.arrow", 0.5, b"\x01"),
    "a page of train": overwritten("train.arrow", 0.4, bytes(4096)),
    "half of eval": overwritten("eval.arrow", 0.5, bytes(10**6)),
    "a number of state": lambda folder: (folder / "state.json").write_text(
        (folder / "state.json").read_text().replace('"ended": ', '"ended": 1')
    ),
    "train gone": lambda folder: (folder / "train.arrow").unlink(),
    "eval gone": lambda folder: (folder / "eval.arrow").unlink(),
    "state gone": lambda folder: (folder / "state.json").unlink(),
    "other train": replaced("train.arrow", "not Arrow at all"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_data_is_prepared_anew_once(tmp_path, damage):
    source = write(tmp_path / "a.jsonl", plain(700))
    first = prepare(source, eval_fraction=0.2)
    expected, report = columns(first), first.report
    del first
    [folder] = kept_folders()
    damage(folder)
    again = prepare(source, eval_fraction=0.2)
    assert not again.from_cache
    assert columns(again) == expected and again.report == report
    assert prepare(source, eval_fraction=0.2).from_cache
    assert kept_folders() == [folder]


def stopper(error):
    def progress(count):
        raise error

    return progress


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_preparation_that_ends_early_leaves_nothing_behind(tmp_path, error, num_proc):
    source = write(tmp_path / "a.jsonl", plain(1200))
    with pytest.raises(error):
        prepare(source, num_proc=num_proc, progress=stopper(error))
    assert kept_folders() == []
    assert not prepare(source).from_cache


def test_data_that_breaks_off_leaves_nothing_behind(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\n" + "a,b\n" * 700 + 'a,"b\n')
    with pytest.raises(UserInputError, match="is not CSV"):
        prepare(source_of(str(path)))
    assert kept_folders() == []


def test_refused_data_is_kept_all_the_same(tmp_path):
    source = write(tmp_path / "a.jsonl", plain(5) * 9)
    with pytest.raises(UserInputError, match="max_duplicate_fraction"):
        prepare(source, max_duplicate_fraction=0.5)
    assert prepare(source).from_cache


def test_a_cache_that_cannot_be_written_to_is_done_without(tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl", plain(30))
    expected = columns(prepare(source))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for _ in range(2):
        data = prepare(source)
        assert columns(data) == expected and not data.from_cache


def prepare_together(sources, barrier, results):
    found = []
    for source in sources:
        data = prepare(source, progress=lambda count: barrier.wait(10))
        found.append((data.from_cache, columns(data), data.report))
    results.put(found)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_two_processes_prepare_the_same_at_once(tmp_path):
    sources = [write(tmp_path / f"{n}.jsonl", plain(50, f"{n} ")) for n in range(30)]
    fork = multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(2), fork.Queue()
    processes = [fork.Process(target=prepare_together, args=(sources, barrier, results), daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    one, other = (results.get(timeout=30) for _ in processes)
    for process in processes:
        process.join()
    assert one == other and not any(from_cache for from_cache, _, _ in one)
    assert len(kept_folders()) == len(sources)
    for source, (_, expected, _) in zip(sources, one, strict=True):
        data = prepare(source)
        assert data.from_cache and columns(data) == expected
