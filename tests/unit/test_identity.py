"""What a resume compares: each thing that has changed is named, with the remedy; a path alone changes nothing."""

import pytest

from qlora_neft.errors import UserInputError
from qlora_neft.recipe import Recipe
from qlora_neft.run_folder.identity import check_base, check_same, check_tokens, is_another_base
from qlora_neft.run_folder.record import RunFile, RunIdentity

BEGAN = RunIdentity(
    tokens="t",
    rows="r",
    templates={"chat": "c"},
    tokenizer={"vocabulary": "v", "normalizer": "n"},
    special_tokens={"eos_token": "</s>"},
    now="2026-03-01T23:59:58",
    versions={"tokenizers": "1", "transformers": "5", "jinja2": "3", "preparation": "5"},
    base_config={"rope_scaling": {"factor": 2}, "hidden_act": "silu", "transformers_version": "5.1"},
)


def recipe_of(**sections):
    values = {
        "model": {"name_or_path": "./base"},
        "quantization": {},
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"},
        "data": {"path": "rows.jsonl", "max_length": 64},
        "train": {
            "effective_batch_size": 4,
            "num_train_epochs": 1,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch",
            "max_grad_norm": 0.3,
            "seed": 0,
        },
    }
    return Recipe.model_validate({name: {**value, **sections.get(name, {})} for name, value in values.items()})


def run_of(identity=BEGAN, **sections):
    return RunFile(recipe=recipe_of(**sections).to_dict(), data_sha256="d", identity=identity)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"templates": {"chat": "x"}}, "data.prompt_template: the tokenizer's chat template is not the one"),
        ({"templates": {}}, "data.prompt_template: the tokenizer's chat template is not the one"),
        (
            {"special_tokens": {"eos_token": "<end>"}},
            'not those this run began with (eos_token: "</s>"',
        ),
        ({"tokenizer": {"vocabulary": "v"}}, "the tokenizer is not the one this run began with (another normalizer)"),
        ({"base_config": {**BEGAN.base_config, "rope_scaling": {"factor": 4}}}, "rope_scaling.factor: 2 before, 4 now"),
    ],
)
def test_what_has_changed_of_the_base_is_named_before_rows_are_prepared(changes, said):
    with pytest.raises(UserInputError) as caught:
        check_base(run_of(), BEGAN.model_copy(update=changes))
    assert said in str(caught.value) and "Put " in str(caught.value)


def test_everything_that_has_changed_is_named_at_once():
    now = BEGAN.model_copy(update={"templates": {}, "tokenizer": {}, "base_config": {}})
    with pytest.raises(UserInputError, match="3 things are not as this run began") as caught:
        check_base(run_of(), now)
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"base_config": {**BEGAN.base_config, "transformers_version": "5.9", "use_cache": False}},
        {"templates": {"chat": "c", "file": "never used"}},
        # A new version of the library may write the same tokenizer in other words: then the tokens decide.
        {"versions": {**BEGAN.versions, "tokenizers": "2"}, "tokenizer": {"vocabulary": "w"}},
    ],
)
def test_what_decides_nothing_is_no_change(changes):
    check_base(run_of(), BEGAN.model_copy(update=changes))
    check_tokens(run_of(), BEGAN.model_copy(update={**changes, "rows": "other ids"}), "other")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": "x"}, "data.path: the rows are not those this run began with. Put them back (a revision pins them)."),
        ({"now": "2026-03-02T00:00:00"}, "the template wrote the date 2026-03-01T23:59:58 when this run began"),
        (
            {"versions": {**BEGAN.versions, "tokenizers": "2"}, "tokenizer": {"vocabulary": "w", "normalizer": "n"}},
            'tokenizers: "1" before, "2" now',
        ),
        ({}, "the template writes something that changes from one rendering to the next"),
    ],
)
def test_other_tokens_are_refused_by_what_made_them(changes, said):
    with pytest.raises(UserInputError) as caught:
        check_tokens(run_of(), BEGAN.model_copy(update={"tokens": "x", **changes}), "d")
    assert said in str(caught.value)


def test_a_record_of_an_earlier_version_is_compared_by_what_it_has():
    earlier = run_of(None)
    check_base(earlier, BEGAN)
    check_tokens(earlier, BEGAN, "d")
    with pytest.raises(UserInputError, match="the rows are not those"):
        check_tokens(earlier, BEGAN, "other")
    with pytest.raises(UserInputError, match=r'model.name_or_path: "./base" before, "./moved" now'):
        check_same(earlier, recipe_of(model={"name_or_path": "./moved"}), "out")


def test_a_place_is_no_difference_and_is_said():
    moved = recipe_of(model={"name_or_path": "/elsewhere/base"}, data={"path": "/drive/rows.jsonl"})
    assert check_same(run_of(), moved, "out") == [
        'data.path: "rows.jsonl" before, "/drive/rows.jsonl" now',
        'model.name_or_path: "./base" before, "/elsewhere/base" now',
    ]
    assert check_same(run_of(), recipe_of(), "out") == []
    with pytest.raises(UserInputError, match=r"train\.learning_rate"):
        check_same(run_of(), recipe_of(train={"learning_rate": 2e-3}, data={"path": "x.jsonl"}), "out")
    # The template of a file may lie elsewhere; that another kind of template is used is a difference.
    files = [{"prompt_template": f"{name}.jinja"} for name in "ab"]
    assert len(check_same(run_of(data=files[0]), recipe_of(data=files[1]), "out")) == 1
    with pytest.raises(UserInputError, match=r"data\.prompt_template"):
        check_same(run_of(data=files[0]), recipe_of(data={"prompt_template": "vicuna"}), "out")


def test_another_model_of_the_hub_is_another_base():
    there = run_of(model={"name_or_path": "owner/one"})
    assert is_another_base(there, recipe_of(model={"name_or_path": "owner/two"}))
    assert not is_another_base(there, recipe_of(model={"name_or_path": "./downloaded"}))


def test_another_scale_or_another_rate_of_b_is_another_run():
    with pytest.raises(UserInputError, match=r"lora\.use_rslora: null before, true now"):
        check_same(run_of(), recipe_of(lora={"use_rslora": True}), "out")
    with pytest.raises(UserInputError, match=r"train\.loraplus_lr_ratio: 4\.0 before, 16\.0 now"):
        check_same(run_of(train={"loraplus_lr_ratio": 4}), recipe_of(train={"loraplus_lr_ratio": 16}), "out")
    # At 1 there is one rate, as there is without the key, and as there was in versions that did not know it.
    assert check_same(run_of(train={"loraplus_lr_ratio": 1}), recipe_of(), "out") == []
    earlier = run_of()
    earlier.recipe["train"].pop("loraplus_lr_ratio"), earlier.recipe["lora"].pop("use_rslora")
    assert check_same(earlier, recipe_of(), "out") == []
