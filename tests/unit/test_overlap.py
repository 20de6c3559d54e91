"""ROUGE-L and BLEU-4 against naive computations from their definitions."""

import collections
import math
import random
import re
import sys

import pytest

from qlora_neft.errors import UserInputError
from qlora_neft.evaluation.overlap import bleu, check_installed, rouge_l

pytest.importorskip("rouge_score", reason="the extra eval is not installed")
pytest.importorskip("sacrebleu", reason="the extra eval is not installed")

TEXTS = [
    "The cat sat on the mat, and the dog (an old one) slept.",
    "Paris is the capital of France.",
    "1. Eat well\n2. Sleep well\n3. Move",
    "nothing in common here at all",
    "",
]
REFERENCES = [
    "The dog slept on the mat; the cat, an old one, sat.",
    "The capital of France is Paris.",
    "1. Sleep well\n2. Eat well\n3. Rest",
    "quite another sentence",
    "something",
]


def longest_common_subsequence(a, b):
    """By dynamic programming, the whole table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def naive_rouge_l(text, reference):
    said, wanted = (re.findall("[a-z0-9]+", part.lower()) for part in (text, reference))
    common = longest_common_subsequence(said, wanted)
    if not common:
        return 0.0
    precision, recall = common / len(said), common / len(wanted)
    return 100 * 2 * precision * recall / (precision + recall)


def naive_bleu(texts, references):
    """Corpus BLEU of texts without punctuation: clipped n-gram matches, geometric mean, brevity penalty."""
    logs = []
    for n in range(1, 5):
        matched = total = 0
        for text, reference in zip(texts, references, strict=True):
            said, wanted = (
                collections.Counter(tuple(part.split()[i : i + n]) for i in range(len(part.split()) - n + 1))
                for part in (text, reference)
            )
            matched += sum(min(count, wanted[gram]) for gram, count in said.items())
            total += sum(said.values())
        logs.append(math.log(matched / total))
    said, wanted = (sum(len(part.split()) for part in parts) for parts in (texts, references))
    return 100 * min(1.0, math.exp(1 - wanted / said)) * math.exp(sum(logs) / 4)


def random_pairs(count, seed):
    draw = random.Random(seed)
    references = [[f"w{draw.randrange(15)}" for _ in range(draw.randint(8, 40))] for _ in range(count)]
    texts = [[w if draw.random() < 0.8 else "other" for w in r][: draw.randint(6, 40)] for r in references]
    return [" ".join(text) for text in texts], [" ".join(reference) for reference in references]


def test_rouge_l_is_the_longest_common_subsequence():
    for text, reference, found in zip(TEXTS, REFERENCES, rouge_l(TEXTS, REFERENCES), strict=True):
        assert found == pytest.approx(naive_rouge_l(text, reference), abs=1e-9)
    texts, references = random_pairs(30, 0)
    expected = [naive_rouge_l(*pair) for pair in zip(texts, references, strict=True)]
    assert rouge_l(texts, references) == pytest.approx(expected, abs=1e-9)
    assert len({round(value) for value in expected}) > 5  # not all the same


@pytest.mark.parametrize("seed", range(4))
def test_bleu_is_the_geometric_mean_with_its_brevity_penalty(seed):
    texts, references = random_pairs(20, seed)
    assert bleu(texts, references) == pytest.approx(naive_bleu(texts, references), rel=1e-9)
    assert sum(map(len, texts)) < sum(map(len, references))  # the penalty counts


def test_equal_texts_score_a_hundred():
    assert rouge_l(TEXTS[:3], TEXTS[:3]) == pytest.approx([100, 100, 100])
    assert bleu(TEXTS[:3], TEXTS[:3]) == pytest.approx(100)


def test_without_the_extra_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserInputError, match=r"pip install 'qlora-neft\[eval\]'"):
        check_installed()
