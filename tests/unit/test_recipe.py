"""A recipe is read strictly, checked as a whole, and complete once loaded."""

import json
import math

import pytest
import yaml

from qlora_neft import Recipe, RecipeError, load_recipe
from qlora_neft.errors import UserInputError
from qlora_neft.recipe import recipe_of_record
from qlora_neft.recipe.keys import key_names, key_table

MINIMAL = """\
model: {name_or_path: some/model}
quantization: {}
lora: {r: 8, lora_alpha: 16, lora_dropout: 0.0, target_modules: all-linear}
data: {path: some/data, max_length: 64}
train:
  effective_batch_size: 16
  num_train_epochs: 1
  learning_rate: 2e-4
  lr_scheduler_type: constant
  optim: adamw_torch
  max_grad_norm: 0.3
  seed: 0
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a recipe into the current directory and return its name."""
    monkeypatch.chdir(tmp_path)

    def write_text(text, name="mine.yaml"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return write_text


def problems_of(path, *overrides):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return caught.value.problems


def test_defaults_are_filled_in(write):
    recipe = load_recipe(write(MINIMAL))
    assert recipe.model.revision == "main"
    assert recipe.quantization.bnb_4bit_quant_type == "nf4"
    assert recipe.quantization.bnb_4bit_use_double_quant is True
    assert recipe.neftune is None
    assert recipe.train.adam_beta2 == 0.999
    machine = recipe.machine.model_dump()
    saving = {"save_every_minutes": 10.0, "save_total_limit": 2, "grace_seconds": 30.0, "mirror_dir": None}
    assert {key: machine.pop(key) for key in saving} == saving
    assert machine.pop("streaming") is False
    assert (machine.pop("push_to"), machine.pop("push_every")) == (None, 1)
    assert machine.pop("report_to") == []
    assert set(machine.values()) == {"auto", 0}


def test_a_recipe_cannot_be_changed_after_loading(write):
    recipe = load_recipe(write(MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.seed = 1


@pytest.mark.parametrize("number", ["2e-4", "2.0e-4", "0.0002", "+2E-4", ".2e-3"])
def test_numbers_may_be_written_in_any_usual_form(write, number):
    recipe = load_recipe(write(MINIMAL.replace("2e-4", number)))
    assert recipe.train.learning_rate == 0.0002


@pytest.mark.parametrize(
    ("written", "rule", "got"),
    [
        ("r: true", "whole number >= 1", "got true"),
        ("r: 8.5", "whole number >= 1", "got 8.5"),
        ("r: 0", "whole number >= 1", "got 0"),
        ("r:", "whole number >= 1", "got nothing"),
        ("r: '8'", "whole number >= 1", "got the text '8'. Remove the quotes."),
    ],
)
def test_a_wrong_type_is_refused_with_rule_value_and_remedy(write, written, rule, got):
    [problem] = problems_of(write(MINIMAL.replace("r: 8", written)))
    assert problem.startswith("mine.yaml:3: lora.r: ")
    assert rule in problem
    assert got in problem


@pytest.mark.parametrize("alpha", ["-1", ".nan", ".inf", "-.inf", "nan", "true", "five"])
def test_alpha_must_be_a_finite_number_of_at_least_zero(write, alpha):
    [problem] = problems_of(write(MINIMAL + f"neftune: {{noise_alpha: {alpha}}}\n"))
    assert problem.startswith("mine.yaml:13: neftune.noise_alpha: expected number >= 0, got")


def test_text_where_a_number_would_be_read_needs_quotes(write):
    [problem] = problems_of(write(MINIMAL.replace("some/model", "some/model, revision: 12345678")))
    assert "model.revision: expected text, got 12345678. Put it in quotes." in problem


def test_words_that_old_yaml_takes_for_booleans_are_text(write):
    assert load_recipe(write(MINIMAL.replace("some/data", "no"))).data.path == "no"
    [problem] = problems_of(write(MINIMAL + "machine: {padding_free: yes}\n"))
    assert "Write true." in problem


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(write):
    text = MINIMAL.replace("r: 8", "rank: 8").replace("optim: adamw_torch", "optim: adam_w")
    text = text.replace("  seed: 0\n", "").replace("constant", "cosin") + "trian: {}\n"
    problems = problems_of(write(text))
    assert [problem.split(": ")[:2] for problem in problems] == [
        ["mine.yaml:3", "lora.r"],
        ["mine.yaml:3", "lora.rank"],
        ["mine.yaml:5", "train.seed"],
        ["mine.yaml:9", "train.lr_scheduler_type"],
        ["mine.yaml:10", "train.optim"],
        ["mine.yaml:12", "trian"],
    ]


def test_the_error_counts_its_problems(write):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(MINIMAL.replace("r: 8", "rank: 8")))
    assert str(caught.value).splitlines()[0] == "mine.yaml: 2 problems"
    assert isinstance(caught.value, UserInputError)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("lora.rank", "lora.r"),
        ("lora.alpha", "lora.lora_alpha"),
        ("lora.rslora", "lora.use_rslora"),
        ("lora.loraplus_lr_ratio", "train.loraplus_lr_ratio"),
        ("neftune.alpha", "neftune.noise_alpha"),
        ("neftune.noise_alhpa", "neftune.noise_alpha"),
        ("train.batch_size", "train.effective_batch_size"),
        ("train.lr", "train.learning_rate"),
        ("train.epochs", "train.num_train_epochs"),
        ("train.max_length", "data.max_length"),
        ("data.cutoff_len", "data.max_length"),
        ("data.max_seq_length", "data.max_length"),
        ("machine.gradient_checkpointing", "machine.activation_checkpointing"),
    ],
)
def test_an_unknown_key_brings_a_suggestion(write, wrong, meant):
    [problem] = problems_of(write(MINIMAL), f"{wrong}=1")
    assert f"Did you mean {meant}?" in problem


def test_gradient_accumulation_steps_is_explained(write):
    [problem] = problems_of(write(MINIMAL + "  gradient_accumulation_steps: 4\n"))
    assert "train.effective_batch_size" in problem
    assert "machine.per_device_train_batch_size" in problem


@pytest.mark.parametrize("section", ["model", "quantization", "lora", "data", "train"])
def test_a_missing_section_is_named(write, section):
    values = yaml.safe_load(MINIMAL.replace("2e-4", "2.0e-4"))
    del values[section]
    [problem] = problems_of(write(json.dumps(values)))
    assert problem.startswith(f"mine.yaml: {section}: required section is missing")


def test_a_full_model_is_two_sections_that_are_null(write):
    [problem] = problems_of(write(MINIMAL), "lora=null")
    assert problem.startswith("override lora=null: lora: null trains every weight") and "quantization: null" in problem
    text = MINIMAL.replace("quantization: {}", "quantization: null")
    assert load_recipe(write(text)).quantization is None and not load_recipe(write(text)).trains_all
    recipe = load_recipe(write(text), ["lora=null"])
    assert recipe.trains_all and load_recipe(write(recipe.to_yaml())) == recipe
    assert recipe_of_record(recipe.to_dict() | {"unknown": {}}).trains_all
    # Nothing under a section is not null, which would change what is trained.
    assert load_recipe(write(MINIMAL.replace("quantization: {}", "quantization:"))).quantization is not None
    # A key of a section makes it again; a key without effect is refused.
    assert load_recipe(write(text), ["quantization.bnb_4bit_use_double_quant=false"]).quantization is not None
    [problem] = problems_of(write(text), "lora=null", "machine.fused_lora=true")
    assert "machine.fused_lora: has no effect without LoRA" in problem
    [problem] = problems_of(write(text), "lora=null", "train.loraplus_lr_ratio=4")
    assert "train.loraplus_lr_ratio: has no effect without LoRA, got 4. Remove it." in problem


def test_a_section_must_be_a_mapping(write):
    [problem] = problems_of(write(MINIMAL.replace("quantization: {}", "quantization: nf4")))
    assert problem.startswith("mine.yaml:2: quantization: expected a section with keys")


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (["train.warmup_steps=10"], "train.warmup_steps: has no effect under lr_scheduler_type: constant"),
        (["train.lr_scheduler_type=constant_with_warmup"], "train.warmup_steps: required under"),
        (["train.lr_scheduler_type=linear", "train.warmup_steps=1.5"], "train.warmup_steps: a whole number"),
        (["neftune.noise_alpha=5", "neftune.final_alpha=1"], "neftune.final_alpha: has no effect under"),
        (["neftune.noise_alpha=5", "neftune.schedule=linear"], "neftune.final_alpha: required under"),
        (["neftune.noise_alpha=5", "neftune.adversarial_steps=3"], "neftune.adversarial_step_size: required under"),
        (["neftune.noise_alpha=5", "neftune.adversarial_step_size=1"], "adversarial_step_size: has no effect under"),
        (
            ["neftune={noise_alpha: 5, adversarial_steps: 2, adversarial_step_size: 1, symmetric: true}"],
            "neftune.symmetric: cannot be combined with adversarial_steps: 2",
        ),
        (["machine.eval_steps=5"], "machine.eval_steps: has no effect without held-out rows"),
        (["data.eval_split=train"], "data.eval_split: the held-out rows would be the training rows"),
        (["data.eval_fraction=0.1", "data.eval_path=x"], "data.eval_fraction: cannot be combined with"),
        (["data.path=rows.jsonl", "data.revision=main"], "data.revision: has an effect only on data from"),
        (["quantization.bnb_4bit_quant_type=fp4"], "the frozen base is stored as NF4, got 'fp4'"),
        (
            ["data.prompt_template=chart"],
            "one of auto, alpaca, alpaca-newline, alpaca-space, vicuna, chat, or a .jinja",
        ),
        (["data.mixture=[{weight: 2}]"], "data.mixture[1].path: required key is missing"),
        (["data.mixture=[{path: a, wieght: 2}]"], "data.mixture[1].wieght: unknown key. Did you mean weight?"),
        (["data.mixture=[{path: a, weight: 0}]"], "data.mixture[1].weight: expected number > 0, got 0"),
        (["data.max_truncated_fraction=1.5"], "data.max_truncated_fraction: expected number >= 0 and <= 1, got 1.5"),
        (["train.loraplus_lr_ratio=0.5"], "train.loraplus_lr_ratio: expected number >= 1 or null, got 0.5"),
        (["train.loraplus_lr_ratio=.inf"], "train.loraplus_lr_ratio: expected number >= 1 or null, got inf"),
        (["lora.use_rslora=1"], "lora.use_rslora: expected true or false, got 1"),
        (["train.seed=4294967296"], "train.seed: expected whole number >= 0 and <= 4294967295"),
    ],
)
def test_rules_that_look_at_more_than_a_type(write, overrides, fragment):
    [problem] = problems_of(write(MINIMAL), *overrides)
    assert fragment in problem


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.lr_scheduler_type=cosine", "train.warmup_steps=0.03"],
        ["train.lr_scheduler_type=linear", "train.warmup_steps=10"],
        ["neftune.noise_alpha=15", "neftune.schedule=cosine", "neftune.final_alpha=0"],
        ["neftune.noise_alpha=5", "neftune.adversarial_steps=3", "neftune.adversarial_step_size=2.5"],
        ["neftune.noise_alpha=5", "neftune.symmetric=true", "neftune.distribution=bernoulli"],
        ["neftune.noise_alpha=0"],
        ["data.eval_split=test", "machine.eval_steps=5"],
        ["data.eval_path=held.jsonl"],
        ["data.split=train[:128]", "data.eval_split=train[128:248]"],
        ["lora.target_modules=[q_proj, v_proj]"],
        ["lora.lora_alpha=0.5"],
        ["lora.use_rslora=true", "train.loraplus_lr_ratio=16"],
        ["machine.activation_checkpointing=12"],
        ["machine.activation_checkpointing=false"],
    ],
)
def test_what_makes_sense_is_accepted(write, overrides):
    load_recipe(write(MINIMAL), overrides)


LOCAL = (
    "rows.jsonl",
    "rows/x.JSON",
    "owner/rows.parquet",
    "./rows",
    "../rows",
    "/rows",
    "~/rows",
    "a/b/rows",
    "rows/*",
    "rows/[ab]",
    "rows?",
    "rows/**/part",
    "C:\\\\rows\\\\x",
    "rows\\\\x",
    "two words",
    "rows/",
    "here",  # a folder that exists
    "here/deep",
    "bundled:demo/train.jsonl",
)
HUB = ("alpaca", "tatsu-lab/alpaca", "o/n.json-v1.2", "_o/n_")
HELD_OUT = "data.eval_fraction=0.1"


@pytest.fixture
def here(write, tmp_path):
    """Make the folders ``here`` and ``here/deep`` in the current directory."""
    (tmp_path / "here" / "deep").mkdir(parents=True)


@pytest.mark.parametrize("path", LOCAL)
@pytest.mark.parametrize("key", ["revision=abc", "revision=main", "data_files=x.json", "name=default"])
def test_keys_of_hub_data_are_refused_for_local_data(write, here, path, key):
    [problem] = problems_of(write(MINIMAL), f'data.path="{path}"', f"data.{key}")
    assert f"data.{key.partition('=')[0]}: has an effect only on data from the Hub, and data.path is" in problem
    entry = f"""[{{path: a/b}}, {{path: "{path}", {key.replace("=", ": ")}}}]"""
    [problem] = problems_of(write(MINIMAL), f"data.mixture={entry}")
    assert f"data.mixture[2].{key.partition('=')[0]}: has an effect only on data from the Hub, and its path" in problem


@pytest.mark.parametrize("path", LOCAL[3:])  # the first three could be models on the Hub
def test_a_revision_of_a_local_model_is_refused(write, here, path):
    [problem] = problems_of(write(MINIMAL), f'model.name_or_path="{path}"', "model.revision=abc")
    assert "model.revision: has an effect only on a model from the Hub, and model.name_or_path is" in problem
    load_recipe(write(MINIMAL), [f'model.name_or_path="{path}"', "model.revision=main"])


@pytest.mark.parametrize("path", LOCAL)
def test_streaming_of_local_data_is_refused(write, here, path):
    data = [f'data.path="{path}"', f'data.mixture=[{{path: "{path}"}}]', f'data.eval_path="{path}"']
    [problem] = problems_of(write(MINIMAL), *data, "data.eval_split=test", "machine.streaming=true")
    assert "machine.streaming: has an effect only on data from the Hub" in problem


@pytest.mark.parametrize("path", HUB)
def test_hub_data_and_models_have_their_keys(write, here, path):
    keys = ["data.revision=abc", "data.data_files=x.json", "data.name=default", "machine.streaming=true"]
    load_recipe(write(MINIMAL), [f"data.path={path}", *keys])
    load_recipe(write(MINIMAL), [f"data.mixture=[{{path: {path}, revision: abc, data_files: x, name: y}}]"])
    load_recipe(write(MINIMAL), ["data.path=rows.jsonl", f"data.mixture=[{{path: {path}}}]", "machine.streaming=true"])
    load_recipe(write(MINIMAL), ["data.path=rows.jsonl", f"data.eval_path={path}", "machine.streaming=true"])
    load_recipe(write(MINIMAL), [f"model.name_or_path={path}", "model.revision=abc"])


@pytest.mark.parametrize(
    "override",
    [
        "machine.eval_answers=0",
        "machine.clean_loss_steps=0",
        "machine.save_steps=0",
        "machine.save_every_minutes=0",
        "machine.dataloader_num_workers=0",
        "machine.activation_checkpointing=0",
        "machine.push_every=1",
        "machine.streaming=false",
        "train.warmup_steps=0",
        "train.weight_decay=0",
        "train.max_grad_norm=0",
        "neftune.noise_alpha=0",
        "neftune=null",
        "data.mixture=[]",
        "data.revision=null",
        "data.eval_path=null",
        "data.weight=1",
    ],
)
def test_what_asks_for_nothing_is_accepted(write, override):
    local = ["data.path=rows.jsonl", override]
    assert load_recipe(write(MINIMAL), local)
    assert load_recipe(write(MINIMAL), [*local, HELD_OUT])


@pytest.mark.parametrize("override", ["eval_answers=1", "eval_steps=1", "per_device_eval_batch_size=1"])
def test_keys_of_held_out_rows_are_refused_without_any(write, override):
    [problem] = problems_of(write(MINIMAL), f"machine.{override}")
    assert f"machine.{override[:-2]}: has no effect without held-out rows, got 1" in problem
    load_recipe(write(MINIMAL), [f"machine.{override}", HELD_OUT])


def test_true_and_one_are_different_things(write):
    name = write(MINIMAL)
    for written, value in (("true", True), ("1", 1)):
        recipe = load_recipe(name, [f"machine.activation_checkpointing={written}"])
        assert recipe.machine.activation_checkpointing is value


def test_a_resolved_recipe_loads_again_as_an_equal_one(write):
    awkward = ["model.revision='12e4567'", "data.path='yes'", "data.split='001'", "neftune.noise_alpha=1e-7"]
    recipe = load_recipe(write(MINIMAL), awkward)
    assert load_recipe(write(recipe.to_yaml(), "again.yaml")) == recipe


def test_a_resolved_recipe_is_complete_and_json_ready(write):
    recipe = load_recipe(write(MINIMAL), ["neftune.noise_alpha=5"])
    values = json.loads(json.dumps(recipe.to_dict()))
    assert {f"{section}.{key}" for section in values for key in values[section]} == set(key_names())
    assert Recipe.model_validate(values) == recipe


def test_every_key_is_described():
    for key in key_table():
        assert key.about, key.name
        assert key.type, key.name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- a\n- b\n", "mine.yaml:1: a recipe is a mapping of sections"),
        ("just words\n", "mine.yaml:1: a recipe is a mapping of sections"),
        ("lora: {r: 8\ntrain: [\n", "not valid YAML"),
        ("a: 1\n\tb: 2\n", "mine.yaml:2: not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("a: !!python/name:os.system\n", "mine.yaml:1: not valid YAML"),
        (b"a: \xff\xfe\n", "not UTF-8"),
        (b"a: \x00\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_not_a_recipe_gives_one_clear_error(write, content, message):
    [problem] = problems_of(write(content))
    assert problem.startswith("mine.yaml")
    assert message in problem


def test_a_key_written_twice_is_refused_with_both_lines(write):
    [problem] = problems_of(write(MINIMAL + "  seed: 1\n"))
    assert problem == "mine.yaml:13: train.seed: already set in line 12. Keep one of the two."
    [problem] = problems_of(write(MINIMAL + "lora: {}\n"))
    assert problem == "mine.yaml:13: lora: already set in line 3. Keep one of the two."


def test_a_byte_order_mark_is_accepted(write):
    load_recipe(write(b"\xef\xbb\xbf" + MINIMAL.encode()))


def test_a_folder_and_a_missing_file_are_told_apart(tmp_path, write):
    assert "is a folder" in problems_of(tmp_path)[0]
    assert "no such file" in problems_of("missing.yaml")[0]
    assert "Did you mean the recipe demo?" in problems_of("folder/demo.yaml")[0]


def test_an_unknown_name_brings_a_suggestion_and_the_list(write):
    [problem] = problems_of("lama2-7b-alpaca")
    assert "Did you mean llama2-7b-alpaca?" in problem
    assert "demo, gemma3-12b" in problem


def test_a_recipe_name_wins_over_a_file_of_that_name(write):
    write("nonsense", name="demo")
    assert load_recipe("demo").model.name_or_path == "bundled:demo/base"
    assert load_recipe(write(MINIMAL, name="mine")).lora.r == 8


def test_loading_is_the_same_for_text_and_path(write, tmp_path):
    name = write(MINIMAL)
    assert load_recipe(name) == load_recipe(tmp_path / name)
    assert math.isclose(load_recipe(name).train.learning_rate, 2e-4)
