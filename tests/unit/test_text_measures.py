"""Repetition, log-diversity and lengths against naive computations; every form of outputs file; bad input."""

import json
import math
import os
import random
import threading

import pytest
from command_line import invoke, refused

from qlora_neft.display.tables import short_names
from qlora_neft.evaluation.texts import CUTOFFS, MAX_LOG_DIVERSITY, log_diversity, measure_texts, read_texts, repetition


def words(count, vocabulary, seed):
    draw = random.Random(seed)
    return [f"w{draw.randrange(vocabulary)}" for _ in range(count)]


def naive_repetition(tokens, n):
    """Every n-gram that stands further left once already, counted one by one."""
    grams = [" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 100 * sum(gram in grams[:i] for i, gram in enumerate(grams)) / len(grams)


def naive_log_diversity(tokens, scale):
    d = 1.0
    for n in (2, 3, 4):
        d *= 1 - naive_repetition(tokens, n) / 100 / scale
    return 20.0 if d == 1 else min(20.0, -math.log(1 - d))


@pytest.mark.parametrize("vocabulary", [2, 5, 30, 10_000])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_repetition_is_what_counting_gives(vocabulary, n):
    for seed in range(5):
        tokens = words(50, vocabulary, seed)
        assert repetition(tokens, n) == pytest.approx(naive_repetition(tokens, n), abs=1e-12)


def test_repetition_by_hand():
    assert repetition("a b a b".split(), 2) == pytest.approx(100 / 3)  # ab, ba, ab
    assert repetition("a a a a a".split(), 4) == 50
    with pytest.raises(ValueError, match="needs 4 tokens"):
        repetition("a b c".split(), 4)


@pytest.mark.parametrize("scale", [1, 100])
def test_log_diversity_is_what_the_formula_gives(scale):
    for seed in range(8):
        tokens = words(60, 12, seed)
        rates = {n: naive_repetition(tokens, n) for n in (2, 3, 4)}
        assert log_diversity(rates, scale=scale) == pytest.approx(naive_log_diversity(tokens, scale), rel=1e-12)


def test_log_diversity_of_a_text_that_repeats_nothing_and_of_one_that_repeats_everything():
    assert log_diversity({2: 0.0, 3: 0.0, 4: 0.0}) == MAX_LOG_DIVERSITY
    assert log_diversity({2: 100.0, 3: 100.0, 4: 100.0}, scale=1) == 0


def test_means_are_over_the_chunks_of_the_outputs_that_are_long_enough():
    texts = [" ".join(words(count, 9, seed)) for seed, count in enumerate((10, 20, 35, 19, 80))]
    found = measure_texts(texts, 20)
    chunks = [text.split()[:20] for text in texts if len(text.split()) >= 20]
    assert (found.outputs, found.dropped, len(chunks)) == (5, 2, 3)  # 20 words are long enough, 19 are not
    assert found.whitespace_tokens == (10 + 20 + 35 + 19 + 80) / 5
    assert found.characters == sum(map(len, texts)) / 5
    for n in (2, 3, 4):
        rate = sum(naive_repetition(chunk, n) for chunk in chunks) / 3
        assert getattr(found, f"repetition_{n}") == pytest.approx(rate, rel=1e-12)
    assert found.log_diversity == pytest.approx(sum(naive_log_diversity(c, 100) for c in chunks) / 3, rel=1e-12)
    assert found.log_diversity_unscaled == pytest.approx(sum(naive_log_diversity(c, 1) for c in chunks) / 3, rel=1e-12)


def test_what_comes_after_the_chunk_changes_lengths_alone():
    text = " ".join(words(50, 20, 1))
    one, other = measure_texts([text], 50), measure_texts([text + " again" * 100], 50)
    assert one.repetition_2 == other.repetition_2 and one.log_diversity == other.log_diversity
    assert one.characters < other.characters


def test_all_too_short_leaves_lengths():
    found = measure_texts(["one two", "", "  "], 50)
    assert (found.dropped, found.empty, found.repetition_2, found.log_diversity) == (3, 2, None, None)
    assert found.whitespace_tokens == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '[{"output": "one\\u2028two"}, {"output": "three"}]'),
        ("a.json", '["one\\u2028two", "three"]'),
        ("a.jsonl", '{"completion": "one\u2028two", "n": 1}\n\n{"completion": "three"}\n'),
        ("a.jsonl", '\ufeff{"text": "one\\u2028two"}\n{"output": "three", "text": "no"}'),
        ("a.txt", "one\u2028two\nthree\n"),
    ],
)
def test_every_form_of_file_is_read(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read_texts(tmp_path / name, "--outputs") == ["one\u2028two", "three"]


def test_the_command_measures_files_side_by_side_and_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [" ".join(words(60, 30, seed)) for seed in range(4)]
    (tmp_path / "long.json").write_text(json.dumps([{"output": text} for text in texts]))
    (tmp_path / "short.txt").write_text("\n".join(text[:40] for text in texts))
    code, stdout, _ = invoke("eval", "text", "--outputs", "long.json", "--json")
    assert code == 0 and json.loads(stdout) == measure_texts(texts, 50).to_dict()
    code, stdout, _ = invoke("eval", "text", "long.json", "--outputs", "short.txt", "--cutoff", "evol", "--json")
    assert code == 0 and [found["chunk"] for found in json.loads(stdout).values()] == [100, 100]
    code, stdout, _ = invoke("eval", "text", "long.json", "short.txt", "--chunk", "10")
    assert code == 0 and stdout.splitlines()[0].split() == ["long.json", "short.txt"]
    assert ["chunk,", "whitespace", "tokens", "10", "10"] in [line.split() for line in stdout.splitlines()]


def test_outputs_may_come_from_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("one\ntwo\n"))
    writer.start()
    assert read_texts(tmp_path / "pipe", "--outputs") == ["one", "two"]
    writer.join()


def test_the_papers_cutoffs():
    assert CUTOFFS == {"alpaca": 50, "evol": 100, "sharegpt": 150, "platypus": 150}


def test_bad_input_is_told_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "no.json": "{", "map.json": "{}", "none.json": "[]", "row.jsonl": '{"output": "a"}\n{"said": 1}', "e.txt": "",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(content)
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xe9")
    assert "is not valid JSON" in refused("eval", "text", "no.json")
    assert "JSON list, got dict" in refused("eval", "text", "map.json")
    assert "is empty" in refused("eval", "text", "none.json")
    assert "is empty" in refused("eval", "text", "e.txt")
    assert "entry 2 must have its output" in refused("eval", "text", "row.jsonl")
    assert "cannot be read" in refused("eval", "text", "latin.txt")
    assert "does not exist" in refused("eval", "text", "--outputs", "absent.json")
    assert "--outputs FILE" in refused("eval", "text")
    assert "give only one of them" in refused("eval", "text", "e.txt", "--chunk", "5", "--cutoff", "evol")
    assert "one of alpaca, evol" in refused("eval", "text", "e.txt", "--cutoff", "dolly")
    assert "at least 4" in refused("eval", "text", "e.txt", "--chunk", "3")


def test_columns_are_called_by_what_differs():
    assert short_names(["runs/a/out.json", "runs/b/out.json"]) == ["a", "b"]
    assert short_names(["runs/a", "runs/b/c"]) == ["a", "b/c"]
    assert short_names(["x.json"]) == ["x.json"]
    assert short_names(["a", "a/b"]) == ["a", "a/b"]
