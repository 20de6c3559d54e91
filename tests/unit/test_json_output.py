"""The published schemas of what verbs print under --json: one for every verb, each a schema, held by real output."""

import json

import jsonschema
import pytest
import typer
from command_line import invoke
from json_outputs import closed

from qlora_neft.cli import app
from qlora_neft.cli.json_output import OUTPUTS, output_schema

CHEAP = [
    ["ls"],
    ["show", "demo"],
    ["show", "--keys"],
    ["diff", "demo", "qwen3-4b"],
    ["validate", "demo", "qwen3-4b"],
    ["fit", "qwen3-8b", "--vram", "24GiB"],
    ["doctor"],
]


def verbs(command, words=()):
    """Every verb that has --json and is shown."""
    for name, inner in getattr(command, "commands", {}).items():
        if not inner.hidden:
            yield from verbs(inner, (*words, name))
    if any("--json" in option.opts for option in command.params):
        yield " ".join(words)


def test_every_verb_that_prints_json_has_a_schema():
    listed = {name for name in OUTPUTS if "--" not in name and name != "an error"}
    assert set(verbs(typer.main.get_command(app))) == listed


@pytest.mark.parametrize("verb", OUTPUTS)
def test_it_is_a_schema(verb):
    jsonschema.Draft202012Validator.check_schema(output_schema(verb))
    code, stdout, _ = invoke("schema", "--of", verb)
    assert code == 0 and json.loads(stdout) == output_schema(verb)


@pytest.mark.parametrize("words", CHEAP, ids=" ".join)
def test_real_output_is_as_its_schema_says(words):
    code, stdout, _ = invoke(*words, "--json")  # which compares
    assert code == 0 and json.loads(stdout)


def test_a_key_that_no_schema_names_is_found():
    with pytest.raises(jsonschema.ValidationError, match="unexpected"):
        jsonschema.validate([{"recipe": "x", "ok": True, "problems": [], "more": 1}], closed("validate"))


def test_another_verb_is_refused():
    code, stdout, stderr = invoke("schema", "--of", "cp")
    assert code == 2 and "--of: must be one of ls, show" in stderr and not stdout
