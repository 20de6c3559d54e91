"""Every shipped recipe loads, is complete, and says what its sources say."""

import re

import pytest
import yaml

from qlora_neft import list_recipes, load_recipe
from qlora_neft.recipe.keys import fields_of, section_names
from qlora_neft.recipe.load import recipe_dir

RECIPES = sorted(recipe_dir().rglob("*.yaml"))
OTHERS = {"demo", "llama2-7b-platypus", "llama2-7b-sharegpt", "qwen3-4b-chat"}
TABLE_3 = [path for path in RECIPES if path.stem not in OTHERS]
TABLE_1 = {"llama2-7b-platypus": (15, 62.00, 70.61), "llama2-7b-sharegpt": (10, 68.74, 76.28)}


def by_name(path):
    return path.stem


def header(path):
    """Return the comment at the top of a recipe."""
    return path.read_text().split("\n\n")[0]


def column_of_table_3(path):
    """Return win rates by alpha, from the header; alpha 0 is training without noise."""
    rows = re.findall(r"^#   (no noise|alpha \d+) +([\d.]+)$", header(path), flags=re.MULTILINE)
    return {0 if name == "no noise" else int(name.split()[1]): float(rate) for name, rate in rows}


def test_the_names_are_those_of_the_files():
    assert list_recipes() == [path.stem for path in RECIPES]
    assert {"demo", "llama2-7b-alpaca", "llama2-7b-evol", "llama2-13b-alpaca"} < set(list_recipes())
    assert {"llama2-13b-evol", "llama-30b-alpaca"} < set(list_recipes())


@pytest.mark.parametrize("path", RECIPES, ids=by_name)
def test_a_recipe_loads_by_path_and_by_name(path):
    assert load_recipe(path) == load_recipe(path.stem)


@pytest.mark.parametrize("path", RECIPES, ids=by_name)
def test_a_recipe_begins_with_its_own_command(path):
    assert f"#   qlora-neft train {path.stem} --output-dir out/{path.stem}\n" in path.read_text()


@pytest.mark.parametrize("path", RECIPES, ids=by_name)
def test_every_required_key_and_number_stands_in_the_file_with_a_comment(path):
    written = yaml.safe_load(path.read_text())
    assert [section for section in section_names() if section not in written] == []
    for section in section_names():
        required = [name for name, field in fields_of(section).items() if field.is_required()]
        assert [name for name in required if name not in written[section]] == []
    numbers = re.findall(r"^  \w+: [\d.e-]+ *(.*)$", path.read_text(), flags=re.MULTILINE)
    assert numbers
    assert all(comment.startswith("# ") for comment in numbers)


@pytest.mark.parametrize("path", TABLE_3, ids=by_name)
def test_alpha_is_the_best_of_the_column_in_the_header(path):
    column = column_of_table_3(path)
    assert list(column) == [0, 5, 10, 15]
    assert load_recipe(path).neftune.noise_alpha == max(column, key=column.get)


def test_no_two_recipes_have_the_same_column():
    columns = [tuple(column_of_table_3(path).values()) for path in TABLE_3]
    assert len(set(columns)) == len(columns) == 5


@pytest.mark.parametrize("name", TABLE_1)
def test_data_of_table_1_has_its_alpha_and_table_3s_training(name):
    alpha, without, with_noise = TABLE_1[name]
    path = recipe_dir() / f"{name}.yaml"
    assert column_of_table_3(path) == {0: without, alpha: with_noise}
    recipe, alpaca = load_recipe(name), load_recipe("llama2-7b-alpaca")
    assert recipe.neftune.noise_alpha == alpha
    assert (recipe.train, recipe.lora, recipe.quantization) == (alpaca.train, alpaca.lora, alpaca.quantization)


def test_the_chat_recipe_uses_messages_and_the_tokenizers_template():
    data = load_recipe("qwen3-4b-chat").data
    assert (data.format, data.prompt_template, data.eval_split) == ("messages", "chat", "test")


@pytest.mark.parametrize("path", TABLE_3, ids=by_name)
def test_qlora_defaults(path):
    recipe = load_recipe(path)
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.target_modules) == (64, 16, "all-linear")
    assert recipe.lora.lora_dropout == (0.05 if "30b" in path.stem else 0.1)
    assert recipe.quantization.bnb_4bit_use_double_quant
    assert (recipe.train.optim, recipe.train.lr_scheduler_type) == ("paged_adamw_32bit", "constant")
    assert (recipe.train.max_grad_norm, recipe.train.adam_beta2) == (0.3, 0.999)
    assert (recipe.train.num_train_epochs, recipe.data.max_length) == (1, 512)
    assert recipe.machine == type(recipe.machine)()


@pytest.mark.parametrize("path", [path for path in TABLE_3 if "30b" not in path.stem], ids=by_name)
def test_30b_doubles_the_batch_and_halves_the_learning_rate(path):
    small, large = load_recipe(path).train, load_recipe("llama-30b-alpaca").train
    assert large.effective_batch_size == 2 * small.effective_batch_size
    assert large.learning_rate == small.learning_rate / 2
