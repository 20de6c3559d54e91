"""What `qlora-neft schema` prints accepts the recipes that load, and refuses what an editor should underline."""

import copy

import pytest
import yaml

from qlora_neft.recipe import list_recipes, load_recipe
from qlora_neft.recipe.json_schema import json_schema
from qlora_neft.recipe.keys import key_table
from qlora_neft.recipe.load import recipe_path

jsonschema = pytest.importorskip("jsonschema", reason="nbformat brings it")
SCHEMA = json_schema()


@pytest.fixture(scope="module")
def validator():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    return jsonschema.Draft202012Validator(SCHEMA)


@pytest.fixture
def demo():
    return copy.deepcopy(load_recipe("demo").to_dict())


@pytest.mark.parametrize("name", list_recipes())
def test_the_shipped_recipes_fit_as_they_are_written_and_as_they_are_recorded(validator, name):
    validator.validate(yaml.safe_load(recipe_path(name).read_text(encoding="utf-8")))
    validator.validate(load_recipe(name).to_dict())


def test_base_and_lora_may_be_left_to_an_adapter(validator, demo):
    demo["model"] = {"adapter": "out/demo"}
    del demo["lora"]
    validator.validate(demo)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("lora", "rank", 16),
        ("lora", "r", "16"),
        ("lora", "r", 0),
        ("lora", "target_modules", []),
        ("neftune", "noise_alpha", -1),
        ("neftune", "schedule", "sine"),
        ("data", "eval_fraction", 1),
        ("data", "mixture", [{"path": "a.jsonl", "share": 1}]),
        ("train", "optim", "sgd"),
        ("machine", "streaming", "yes"),
        ("mashine", "threads", 2),
    ],
)
def test_what_breaks_a_rule_of_one_key_is_refused(validator, demo, section, key, value):
    validator.validate(demo)
    demo.setdefault(section, {})[key] = value
    assert not validator.is_valid(demo)


@pytest.mark.parametrize("missing", ["lora", "data", "model.name_or_path", "train.learning_rate"])
def test_what_is_required_is_required(validator, demo, missing):
    section, _, key = missing.partition(".")
    demo[section].pop(key) if key else demo.pop(section)
    assert not validator.is_valid(demo)


def test_every_key_is_explained():
    sections = {name: _section(part) for name, part in SCHEMA["properties"].items()}
    for key in key_table():
        section, _, name = key.name.partition(".")
        assert sections[section][name]["description"] == key.about


def _section(part):
    """The keys of a section, which may be null."""
    references = [part, *part.get("anyOf", ())]
    name = next(p["$ref"] for p in references if "$ref" in p).rsplit("/", 1)[1]
    return SCHEMA["$defs"][name]["properties"]
