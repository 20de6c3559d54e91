"""Overrides take precedence over the file, and problems with one name the override, not the file."""

import pytest

from qlora_neft import RecipeError, load_recipe
from qlora_neft.compare.plan import plan_sweep
from qlora_neft.recipe.load import apply_overrides, recipe_dir
from qlora_neft.recipe.override_files import list_override_files


def problems_of(*overrides):
    with pytest.raises(RecipeError) as caught:
        load_recipe("demo", overrides)
    return caught.value.problems


def test_an_override_beats_the_file_and_a_later_one_the_earlier():
    assert load_recipe("demo", ["lora.r=4", "lora.r=8"]).lora.r == 8


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("null", None),
        ("", None),
        ("true", True),
        ("train[:128]", "train[:128]"),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("a=b", "a=b"),
        ("'2e-4'", "2e-4"),
    ],
)
def test_a_value_is_read_as_yaml(text, value):
    merged, origins, problems = apply_overrides({}, [f"data.path={text}"])
    assert merged == {"data": {"path": value}}
    assert origins == {("data", "path"): f"data.path={text}"}
    assert problems == []


def test_values_given_are_left_alone():
    values = {"lora": {"r": 8}}
    apply_overrides(values, ["lora.r=4", "neftune.noise_alpha=5"])
    assert values == {"lora": {"r": 8}}


def test_taking_the_noise_out():
    assert load_recipe("demo", ["neftune=null"]).neftune is None
    assert load_recipe("demo", ["neftune.noise_alpha=0"]).neftune.noise_alpha == 0


def test_an_override_makes_an_absent_section():
    recipe = load_recipe("demo", ["neftune=null", "neftune.noise_alpha=3"])
    assert recipe.neftune.noise_alpha == 3
    assert recipe.neftune.distribution == "uniform"


def test_a_broken_rule_is_named_as_the_override():
    assert problems_of("lora.r=0") == ["override lora.r=0: lora.r: expected whole number >= 1, got 0."]


def test_an_override_that_breaks_the_rule_of_another_key_is_named():
    [problem] = problems_of("train.warmup_steps=10", "train.lr_scheduler_type=constant")
    assert problem.startswith("override train.warmup_steps=10: train.warmup_steps: has no effect")
    [problem] = problems_of("train.lr_scheduler_type=constant_with_warmup")
    assert problem.startswith("override train.lr_scheduler_type=constant_with_warmup: train.warmup_steps: ")
    problems = problems_of("data.eval_path=null", "machine.eval_steps=5")
    assert problems[0].startswith("override machine.eval_steps=5: machine.eval_steps: has no effect")


def test_removing_a_section_that_is_needed_is_named_as_the_override():
    problems = problems_of("lora={}")
    assert len(problems) == 4
    assert all(problem.startswith("override lora={}: lora.") for problem in problems)
    [problem] = problems_of("lora=null")  # which means something: every weight is trained
    assert problem.startswith("override lora=null: lora: null trains every weight")


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("lora.rank=8", "Did you mean lora.r?"),
        ("lora_r=8", "Did you mean lora.r?"),
        ("learning_rate=1", "Did you mean train.learning_rate?"),
        ("nefttune=null", "Did you mean neftune?"),
        ("lora.=8", "names no key. Keys of lora: r, lora_alpha"),
        ("lora.r.x=8", "unknown key"),
        ("=8", "unknown section"),
        ("neftune={1: 2, noise_alpha: 5}", "neftune.1: unknown key"),
        ("lora.r", "not of the form section.key=value"),
        ("data.path=@x", "not valid YAML"),
        ("data.path=[", "not valid YAML"),
    ],
)
def test_what_cannot_be_understood_is_said_of_the_override(override, fragment):
    [problem] = problems_of(override)
    assert problem.startswith(f"override {override}: ")
    assert fragment in problem


def test_all_overrides_are_checked_at_once():
    assert len(problems_of("lora.rank=8", "train.lr=1", "lora.r=-1")) == 3


# ---- Files of overrides ----


def test_a_file_stands_for_its_lines(tmp_path):
    (tmp_path / "mine.txt").write_text("# why\n\nlora.r=4   # rank\n  data.split=train[:8]\ndata.path=a#b.jsonl\n")
    file = f"@{tmp_path / 'mine.txt'}"
    recipe = load_recipe("demo", ["lora.r=2", file, "data.split=train[:4]"])
    assert (recipe.lora.r, recipe.data.split, recipe.data.path) == (4, "train[:4]", "a#b.jsonl")


def test_shipped_files_are_known_by_name():
    names = list_override_files(recipe_dir())
    assert names == ["full", "full-70b", "qlora"]
    for name in names:
        assert load_recipe("llama2-7b-alpaca", [f"@{name}"]) != load_recipe("llama2-7b-alpaca")
        assert f"@{name} " in (recipe_dir() / "overrides" / f"{name}.txt").read_text()  # begins with its own command


def test_what_is_wrong_with_a_file_is_told_with_the_rest(tmp_path):
    (tmp_path / "other.txt").write_text("lora.rank=3\n")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    files = [f"@{tmp_path / name}" for name in ("other.txt", "bad.txt", "none.txt")]
    problems = problems_of("@qlroa", *files)
    assert "override @qlroa: No such file or directory. Did you mean @qlora?" in problems[0]
    assert "it is not UTF-8 text" in problems[1] and "No such file" in problems[2]
    assert problems[3].startswith("override lora.rank=3: unknown key. Did you mean lora.r?")


def test_a_sweep_takes_a_file():
    plan = plan_sweep("llama2-7b-alpaca", ["@qlora", "neftune.noise_alpha=0,5"], seeds=1)
    assert [run.recipe.data.max_prompt_length for run in plan.runs] == [384, 384]
