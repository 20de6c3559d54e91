"""Every number that recipes, documentation and notebooks give as a paper's is in `docs/paper_numbers.json`."""

from __future__ import annotations

import re

import pytest
from paper_claims import NUMBERS, PAPERS, RECIPES, ROOT, claims, same, tagged_lines

from qlora_neft import load_recipe
from qlora_neft.recipe.keys import key_names

CLAIMS = list(claims())
# Numbers of ours in a sentence that cites a table, by page.
OURS = {"docs/results/published_scores.md": {"0.1", "1.46%"}}
# Overrides that are words, not numbers: what they say stands beside them.
LETTER = {"data.prompt_template": "alpaca-space", "data.keep_end_token": False, "train.loss_mean": "sequences"}


# ---- Documentation ----


def test_a_claim_is_in_the_table_it_cites():
    wrong = [claim for claim in CLAIMS if not claim.is_listed and claim.number not in OURS.get(claim.page, set())]
    # List it in docs/paper_numbers.json with its source; if it is ours, in OURS; or cite the right table.
    assert not wrong, "\n".join(f"{claim.page}: {claim.number} in: {claim.text[:200]}" for claim in wrong)


def test_there_are_claims_and_no_exception_is_left_over():
    assert len(CLAIMS) > 80
    for page, numbers in OURS.items():
        assert {c.number for c in CLAIMS if c.page == page and not c.is_listed} == numbers, page


def test_a_replication_is_quoted_as_published():
    page = (ROOT / "docs" / "does_it_help.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| (?:\[Georgian\]|the same, (?:QLoRA|\d|summ)).*$", page, re.MULTILINE)
    listed = {n["what"]: n["value"] for n in NUMBERS if n["paper"] == "Georgian"}
    assert len(quoted) == 9
    for line in quoted:
        rows = re.search(r"([\d,]+) rows", line)
        layers = "all layers" if "all layers" in line else "attention"
        what = f"QLoRA on {layers}, {rows[1].replace(',', '')} rows" if rows else f"QLoRA on {layers}"
        measure = "accuracy" if rows else "ROUGE-1"
        found = [value for name, value in listed.items() if name.startswith(measure) and f"{what}, " in name]
        assert re.findall(r"\d\d\.\d\d", line) == found, line


@pytest.mark.parametrize(
    ("written", "value", "is_same"),
    [
        ("64.69", "64.69", True),
        ("64.7", "64.69", True),
        ("64.68", "64.69", False),
        ("375", "375.22", True),
        ("5e-5", "5e-05", True),
        ("74.6%", "74.6", True),
        ("2e-4", "0.0001", False),
        ("1,061.9", "1061.89", True),
    ],
)
def test_a_rounded_number_is_the_same_and_a_wrong_one_is_not(written, value, is_same):
    assert same(written, value) == is_same


def test_the_table_is_complete_and_has_no_number_twice():
    places = {(n["paper"], n["place"]) for n in NUMBERS}
    assert {("NEFTune", f"Table {number}") for number in range(1, 15)} | {("QLoRA", "Table 9")} <= places
    named = [(n["paper"], n["place"], n["what"]) for n in NUMBERS]
    assert len(set(named)) == len(named)
    assert {n["key"] for n in NUMBERS if "key" in n} <= set(key_names())


# ---- Recipes ----


def size_of(recipe):
    """The size in QLoRA's Table 9 that a recipe's name stands for."""
    found = re.search(r"(\d+)b", recipe)
    return {"13": "13B", "30": "33B"}.get(found[1] if found else "", "7B")


def is_said(recipe, key, value, tag):
    """Whether a paper gives this value to this key, for this recipe."""
    return any(
        n.get("key") == key
        and n["paper"] in PAPERS[tag]
        and n.get("file", recipe) == recipe
        and n.get("size", size_of(recipe)) == size_of(recipe)
        and float(n["value"]) == float(value)
        for n in NUMBERS
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_number_with_a_source_is_that_sources(path):
    found = list(tagged_lines(path))
    for key, value, tag, comment in found:
        if not re.fullmatch(r"[\d.e+-]+", value):
            continue  # a word: nf4, null, alpaca
        # A longer context than the paper's is the chat recipe's own, and has no tag.
        assert is_said(path.stem, key, value, tag), f"{key}: {value} [{tag}]"
        inside = re.search(rf"\[{tag}([^\]]*)\]", comment)[1]
        for number in re.findall(r"(?<![\w.])[\d.]+(?:e-\d)?", re.sub(r"Table \d+|\d+B", "", inside)):
            listed = [n["value"] for n in NUMBERS if n["paper"] in PAPERS[tag]]
            assert any(same(number, value) for value in listed), f"{number} in [{inside}]"
    assert found or path.stem == "demo"


@pytest.mark.parametrize("path", [p for p in RECIPES if "(NEFTune, Table 3, " in p.read_text()], ids=lambda p: p.stem)
def test_the_win_rates_of_a_header_are_its_column_of_table_3(path):
    text = path.read_text()
    column = [n for n in NUMBERS if n.get("column") == int(re.search(r"Table 3, column (\d)", text)[1])]
    model, data = re.search(r"^# Table 3, ([^,]+), ([^:]+):", text, re.MULTILINE).groups()
    assert all(f"QLoRA, {model}, {data}, " in n["what"] for n in column)
    assert rates_of(text) == {n["alpha"]: n["value"] for n in column}
    assert "docs/departures.md" in text


@pytest.mark.parametrize("name", ["llama2-7b-platypus", "llama2-7b-sharegpt"])
def test_the_win_rates_of_the_other_headers_are_those_of_table_1(name):
    text = next(path for path in RECIPES if path.stem == name).read_text()
    data = re.search(r"^# Table 1, LLaMA-2 7B, (\w+):", text, re.MULTILINE)[1]
    rates = {
        n["what"].rpartition(", ")[2]: n["value"]
        for n in NUMBERS
        if n["place"] == "Table 1" and f", {data}," in n["what"]
    }
    alpha = next(n["value"] for n in NUMBERS if n["place"] == "Table 7" and n["what"].endswith(data))
    assert rates_of(text) == {0: rates["without noise"], int(alpha): rates["NEFTune"]}


def rates_of(text):
    """Win rates by alpha, as a header writes them."""
    rows = re.findall(r"^#   (no noise|alpha \d+) +([\d.]+)$", text, re.MULTILINE)
    return {0 if name == "no noise" else int(name.split()[1]): rate for name, rate in rows}


# ---- In the letter ----


@pytest.mark.parametrize("name", ["llama2-7b-alpaca", "llama2-13b-alpaca"])
def test_the_letter_of_qlora_is_its_table_9(name):
    letter, table = (
        load_recipe(name, ["@qlora"]).flat(),
        [n for n in NUMBERS if n["place"] == "Table 9" and n.get("size") == size_of(name)],
    )
    assert len(table) == 5
    for number in table:
        if number["key"] != "train.max_steps":  # NEFTune's one epoch
            assert letter[number["key"]] == float(number["value"])
    assert {key: letter[key] for key in LETTER} == LETTER
    as_long = load_recipe(name, ["@qlora", "train.num_train_epochs=4", "train.max_steps=10000"])
    assert as_long.train.max_steps == next(float(n["value"]) for n in table if n["key"] == "train.max_steps")
    changed = {key for key, value in load_recipe(name).flat().items() if letter[key] != value}
    assert changed == {"data.max_prompt_length", "data.max_response_length", *LETTER}


def test_every_weight_is_trained_with_the_papers_numbers():
    full, large = (load_recipe("llama2-7b-alpaca", [f"@{name}"]) for name in ("full", "full-70b"))
    assert full.trains_all and large.trains_all
    assert (full.train.learning_rate, large.train.learning_rate) == (5e-5, 2e-5)
    assert large.neftune.noise_alpha == 15 and full.neftune.noise_alpha == 5  # the recipe's own
