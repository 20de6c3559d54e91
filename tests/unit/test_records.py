"""What a run wrote is read back: whole, damaged, and by another version."""

import json

import pytest

from qlora_neft.errors import UserInputError
from qlora_neft.recipe import load_recipe, recipe_of_record
from qlora_neft.run_folder.record import Answers, Measures, Record, RunFile, RunSummary

ANSWER = {"prompt": "p", "reference": "r", "text": "t"}
ROWS = {"rows": 1, "tokens": 2, "sha256": "a"}


def demo(**changes):
    """The demo recipe as it is recorded, some sections changed: a key of None is taken out."""
    recipe = load_recipe("demo").to_dict()
    for section, keys in changes.items():
        recipe[section] = {key: value for key, value in {**recipe[section], **keys}.items() if value is not None}
    return recipe


def test_a_recorded_recipe_is_that_recipe():
    recipe = load_recipe("demo")
    assert recipe_of_record(recipe.to_dict()) == recipe


@pytest.mark.parametrize("values", [None, [], "demo", 3])
def test_what_is_no_mapping_is_no_recipe(values):
    assert recipe_of_record(values) is None


@pytest.mark.parametrize(
    ("changes", "section", "key", "value"),
    [
        ({"lora": {"of_a_newer_version": 1}}, "lora", "r", 16),
        ({"quantization": {"bnb_4bit_use_double_quant": None}}, "quantization", "bnb_4bit_use_double_quant", True),
        ({"lora": {"r": None}}, "lora", "r", None),
        ({"lora": {"r": "many"}}, "lora", "r", None),
        ({"lora": {"r": "many"}}, "lora", "lora_alpha", 32),
        ({"lora": {"target_modules": [1]}}, "lora", "target_modules", None),
        ({"machine": {"threads": "few"}}, "machine", "threads", "auto"),
        ({"data": {"prompt_template": "odd"}}, "data", "prompt_template", "odd"),
        ({"data": {"revision": "abc"}}, "data", "revision", "abc"),  # has no effect, and was recorded
        ({"data": {"mixture": 3}}, "data", "mixture", []),
        ({"neftune": {"final_alpha": 1.0}}, "neftune", "final_alpha", 1.0),
    ],
)
def test_a_recorded_recipe_of_another_version_is_used_as_far_as_it_goes(changes, section, key, value):
    assert getattr(getattr(recipe_of_record(demo(**changes)), section), key) == value


def test_sections_that_are_not_recorded_have_their_defaults():
    recipe = recipe_of_record({"data": {"path": "rows.jsonl"}, "lora": [1]})
    assert recipe.data.path == "rows.jsonl" and recipe.data.max_length is None
    assert recipe.model.name_or_path is None and recipe.neftune is None and recipe.machine.device == "auto"
    assert recipe.to_dict()["data"]["path"] == "rows.jsonl"


def test_a_recorded_mixture_is_used_as_far_as_it_goes():
    recipe = recipe_of_record(demo(data={"mixture": [{"path": "a", "weight": "much", "of_later": 1}]}))
    [source] = recipe.data.mixture
    assert (source.path, source.weight) == ("a", 1.0)


def test_what_is_learned():
    recipe = load_recipe("demo")
    learned = recipe.learned()
    assert learned["train.learning_rate"] == recipe.train.learning_rate
    assert learned.keys() < recipe.flat().keys()
    assert not any(key.startswith("machine.") for key in learned) and "data.eval_path" not in learned


@pytest.mark.parametrize("noise", [["neftune=null"], ["neftune.noise_alpha=0", "neftune.distribution=gaussian"]])
def test_without_noise_the_same_is_learned(noise):
    assert load_recipe("demo", noise).learned() == load_recipe("demo", ["neftune.noise_alpha=0"]).learned()


@pytest.mark.parametrize("override", ["machine.threads=1", "data.eval_path=null", "train.max_bad_steps=3"])
def test_what_is_not_learned(override):
    more = ["machine.eval_answers=auto"]  # without held-out rows there are none to answer
    assert load_recipe("demo", [*more, override]).learned() == load_recipe("demo", more).learned()


def test_a_record_that_is_missing_is_none(tmp_path):
    assert RunSummary.read(tmp_path / "summary.json", "Remove it.") is None


@pytest.mark.parametrize(
    ("shape", "content", "place"),
    [
        (RunFile, {"before": {"answers": [{}]}}, "before.answers.0.prompt"),
        (RunSummary, {"hardware": {"name": "a card"}}, "hardware.device"),
        (RunSummary, {"data": {"train": {"rows": 1}}}, "data.train.tokens"),
        (Answers, {"answers": [{**ANSWER, "text": None}]}, "answers.0.text"),
        (Measures, {"text": "long"}, "text"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, shape, content, place):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserInputError, match=rf"record.json: is damaged at {place} \(.*\)\. Remove it\."):
        shape.read(path, "Remove it.")


@pytest.mark.parametrize(
    ("shape", "content", "usable"),
    [
        (RunSummary, None, {}),
        (RunSummary, {"steps": 5, "of_a_newer_version": 1}, {"steps": 5}),
        (RunSummary, {"steps": "five", "seed": 1}, {"seed": 1}),
        (RunSummary, {"hardware": {"name": "a card"}, "seed": 1}, {"seed": 1}),
        (RunSummary, {"hardware": "a card", "seed": 1}, {"seed": 1}),
        (RunSummary, {"data": {"warnings": ["a", 1, "b"]}}, {"data": {"warnings": ["a", "b"]}}),
        (RunSummary, {"data": {"train": {"rows": 1}, "eval": ROWS}}, {"data": {"eval": ROWS}}),
        (RunSummary, {"peak_memory": {"host_bytes": "much", "cuda": 1}}, {"peak_memory": {"cuda": 1}}),
        (RunFile, {"before": {"answers": [{}, ANSWER, {"text": 1}]}}, {"before": {"answers": [ANSWER]}}),
        (RunFile, {"recipe": [1], "base_sha256": "b"}, {"base_sha256": "b"}),
    ],
)  # fmt: skip
def test_of_a_damaged_record_the_rest_is_used(shape, content, usable):
    assert shape.of(content).model_dump(exclude_unset=True) == usable


def test_a_record_without_anything_usable_is_an_empty_one():
    class Needy(Record):
        name: str

    assert Needy.of({"name": 1}).model_dump() == {}
