"""Recipes of others have a size, a depth and an alias budget: one message, in a moment."""

import time

import pytest

from qlora_neft.errors import RecipeError, UserInputError
from qlora_neft.files import read_record
from qlora_neft.recipe import load_recipe

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
ATTACKS = {
    "aliases that expand": LAUGHS,
    "aliases of keys": "x: &a {k: v}\ny:\n" + "  - *a\n" * 2000,
    "merges that expand": "a0: &a0 {k: v}\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)),
    "deep in brackets": "model: " + "[" * 10_000 + "]" * 10_000,
    "deep in braces": "model: " + "{a: " * 5_000 + "1" + "}" * 5_000,
    "deep by indentation": "".join(" " * i + "a:\n" for i in range(200)),
    "recursion": "model: &m\n  self: *m\n",
    "recursion in a list": "model: &m [1, *m]\n",
    "length": "model:\n  name_or_path: " + "a" * 2_000_000,
    "many keys": "model: {" + ", ".join(f"k{i}: 1" for i in range(12_000)) + "}",
}


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS)
def test_one_message_in_a_moment(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    began = time.monotonic()
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(tmp_path / "recipe.yaml"))
    with pytest.raises(UserInputError) as record:
        read_record(tmp_path / "recipe.yaml")
    for message in (str(caught.value), str(record.value)):
        assert len(message) < 500 and "recipe.yaml" in message
    assert time.monotonic() - began < 20


def test_aliases_that_help_are_read(tmp_path):
    (tmp_path / "r.yaml").write_text("a: &a {b: 1}\nc: *a\nd: [*a, *a]\n")
    assert read_record(tmp_path / "r.yaml") == {"a": {"b": 1}, "c": {"b": 1}, "d": [{"b": 1}] * 2}
