"""Every shipped recipe loads, is complete, and says what its sources say."""

import re

import pytest
import yaml

from qlora_neft import list_recipes, load_recipe
from qlora_neft.fit import plan_recipe
from qlora_neft.fit.shipped import CARDS, shipped_recipes
from qlora_neft.recipe.keys import fields_of, section_names
from qlora_neft.recipe.licenses import license_of_data, license_of_model
from qlora_neft.recipe.load import recipe_dir
from scripts.set_repository import RAW, ROOT, repository_of

RECIPES = sorted(recipe_dir().rglob("*.yaml"), key=lambda path: path.stem)
TABLE_3 = [path for path in RECIPES if "(NEFTune, Table 3, " in path.read_text()]
CURRENT = [path for path in RECIPES if path.stem != "demo" and not path.stem.startswith(("llama-", "llama2-"))]
SCHEMA = f"{RAW}{repository_of(ROOT)}/main/docs/recipe.schema.json"
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


# ---- Current models ----


@pytest.mark.parametrize("path", RECIPES, ids=by_name)
def test_an_editor_finds_the_schema(path):
    assert path.read_text().startswith(f"# yaml-language-server: $schema={SCHEMA}\n")
    assert (ROOT / SCHEMA.partition("/main/")[2]).is_file()


@pytest.mark.parametrize("path", [path for path in CURRENT if path.stem != "qwen3-4b-chat"], ids=by_name)
def test_a_current_recipe_takes_your_rows_in_a_word(path):
    text, recipe = path.read_text(), load_recipe(path.stem)
    assert f"train {path.stem} --output-dir out/mine data.path=my_rows.jsonl\n" in text
    # Nothing of its own data set is in the way of other rows.
    assert (recipe.data.split, recipe.data.format, recipe.data.eval_fraction) == ("train", "auto", 0.02)
    mine = load_recipe(path.stem, ["data.path=my_rows.jsonl"])
    assert mine.data == recipe.data.model_copy(update={"path": "my_rows.jsonl"})
    assert "not measured" in header(path) and f"qlora-neft tune {path.stem}." in header(path)


@pytest.mark.parametrize("path", CURRENT, ids=by_name)
def test_a_model_that_was_tuned_gets_its_template_and_a_base_the_papers_prompt(path):
    recipe = load_recipe(path.stem)
    is_base = recipe.model.name_or_path in {
        "meta-llama/Llama-3.1-8B",
        "mistralai/Mistral-7B-v0.3",
        "mistralai/Ministral-3-8B-Base-2512",
    }
    assert recipe.data.prompt_template == ("alpaca" if is_base else "chat")
    if path.stem != "qwen3-4b-chat":  # the paper's settings on a current model
        assert recipe.neftune.noise_alpha == (5.0 if is_base else 0.0)
        assert recipe.lora.lora_alpha == 32
    # Hybrids think unless they are told not to; these data sets hold no thoughts.
    hybrids = {"qwen3-0.6b", "qwen3-1.7b", "qwen3-8b", "qwen3-14b", "smollm3-3b"}
    assert recipe.data.chat_template_kwargs == ({"enable_thinking": False} if path.stem in hybrids else {})
    # Their templates write the empty thought before the last response alone, where generation writes it too.
    assert recipe.data.train_on == ("last-response" if path.stem in hybrids else "responses")


def test_licenses_are_told_of_what_the_recipes_name_and_of_nothing_else():
    recipes = [load_recipe(path) for path in RECIPES]
    table = yaml.safe_load((ROOT / "qlora_neft" / "recipe" / "licenses.json").read_text())
    assert set(table["models"]) == {recipe.model.name_or_path for recipe in recipes}
    assert set(table["data"]) == {recipe.data.path for recipe in recipes}
    for path, recipe in zip(RECIPES, recipes, strict=True):
        gated = license_of_model(recipe.model.name_or_path).gated
        assert bool(gated) == ("hf auth login" in header(path)), path.stem
    assert str(license_of_model("google/gemma-3-4b-it")) == "Gemma, gated"
    assert str(license_of_data("ann/rows")) == "license not known here"


def test_the_listed_card_is_the_smallest_that_fit_accepts():
    listed = shipped_recipes()
    assert {one.group for one in listed} == {"demo", "papers", "current"}
    assert [one.name for one in listed if one.group == "current"] == [path.stem for path in CURRENT]
    for one in listed:
        if one.name in ("llama-30b-alpaca", "qwen3-30b-a3b", "qwen3-8b", "gemma3-12b"):
            fits = [card for card in CARDS if plan_recipe(one.recipe, f"{card}GiB")["fits"]]
            assert one.card == fits[0]
            assert one.is_helped == (one.name in ("llama-30b-alpaca", "qwen3-8b"))
    assert {one.name: one.card for one in listed}["qwen3-30b-a3b"] == 24


def test_the_readmes_recipe_for_a_card_fits_on_it_without_help():
    rows = re.findall(r"^\| (\d+) GB \| `qlora-neft train (\S+) ", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [int(card) for card, _ in rows] == list(CARDS[:4])
    for card, name in rows:
        plan = plan_recipe(load_recipe(name), f"{card}GiB")
        assert plan["fits"] and not plan["paged_out_bytes"] and plan["plan"]["activation_offloading"] is not True
