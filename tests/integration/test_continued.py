"""Training goes on from an adapter: its base, its settings, its weights bit for bit."""

import json
import shutil
from typing import ClassVar

import pytest
import torch
import yaml
from command_line import invoke
from safetensors.torch import load_file, save_file

from qlora_neft import load_recipe
from qlora_neft.adapter.continued import resolved
from qlora_neft.errors import RecipeError, UserInputError
from qlora_neft.runner.run import run
from qlora_neft.trainer import QLoRANeftTrainer

ROWS = [{"instruction": f"Repeat {n}", "input": "", "output": f"{n} " * (1 + n % 3)} for n in range(10)]
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"}


def recipe_file(folder, **sections):
    """A recipe of two steps with some sections replaced, or left out (None)."""
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    values = {
        "quantization": {},
        "lora": LORA,
        "neftune": {"noise_alpha": 5.0},
        "data": {
            "path": str(folder / "train.jsonl"),
            "max_length": 250,
            "eval_fraction": 0.2,
            "max_duplicate_fraction": 1.0,
        },
        "train": {
            "effective_batch_size": 4,
            "num_train_epochs": 3,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch",
            "max_grad_norm": 0.3,
            "seed": 0,
        },
        "machine": {"device": "cpu", "precision": "fp32", "eval_answers": 0},
        **sections,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not None}))
    return path


@pytest.fixture(scope="module")
def first(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    recipe = load_recipe(recipe_file(folder, model={"name_or_path": str(llama)}))
    return folder / "out", run(recipe, folder / "out", quiet=True)


class Kept(QLoRANeftTrainer):
    """A trainer that keeps the weights it begins with."""

    begins_with: ClassVar[dict[str, torch.Tensor]] = {}

    def train(self, *args, **kwargs):
        """Keep a copy."""
        Kept.begins_with = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        return super().train(*args, **kwargs)


def test_it_begins_with_the_adapters_weights_and_settings(first, llama, tmp_path):
    earlier, summary = first
    recipe = load_recipe(recipe_file(tmp_path, model={"adapter": str(earlier)}, lora=None))
    assert recipe.lora is None
    again = run(recipe, tmp_path / "out", quiet=True, trainer_class=Kept)
    stored = load_file(earlier / "adapter_model.safetensors")
    begun = {name.replace(".default.", "."): tensor for name, tensor in Kept.begins_with.items()}
    assert begun.keys() == stored.keys() and all(torch.equal(begun[name], stored[name]) for name in stored)
    assert again["before"]["held_out_loss"] == summary["after"]["held_out_loss"]
    assert again["after"]["held_out_loss"] != again["before"]["held_out_loss"]
    assert again["recipe"]["lora"] == {**LORA, "use_rslora": False} and again["recipe"]["model"]["name_or_path"] == str(
        llama
    )
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["adapter_sha256"] == again["adapter_sha256"] and len(record["adapter_sha256"]) == 64
    # The folder's own recipe repeats it, whatever it began from being stated in full.
    assert resolved(load_recipe(tmp_path / "out/recipe.yaml")) == load_recipe(tmp_path / "out/recipe.yaml")


def test_it_resumes_only_from_the_same_weights(first, tmp_path):
    earlier = shutil.copytree(first[0], tmp_path / "adapter")
    recipe = load_recipe(recipe_file(tmp_path, model={"adapter": str(earlier)}, lora=None))
    run(recipe, tmp_path / "out", quiet=True)
    (tmp_path / "out/summary.json").unlink()
    weights = load_file(earlier / "adapter_model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, earlier / "adapter_model.safetensors")
    with pytest.raises(UserInputError, match=r"model.adapter: the weights are not those this run began with"):
        run(recipe, tmp_path / "out", quiet=True)


def test_what_the_recipe_states_otherwise_is_named_with_both_values(first, tmp_path):
    stated = {"lora": {**LORA, "r": 16}, "model": {"adapter": str(first[0]), "name_or_path": "another/base"}}
    with pytest.raises(UserInputError) as caught:
        resolved(load_recipe(recipe_file(tmp_path, **stated)))
    message = str(caught.value)
    assert "lora.r: 4 in the adapter, 16 in the recipe" in message and "'another/base' in the recipe" in message
    assert resolved(load_recipe(recipe_file(tmp_path, model={"adapter": str(first[0])}))).lora.r == 4


def test_the_scale_is_the_adapters(first, tmp_path):
    adapter = shutil.copytree(first[0], tmp_path / "adapter", ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    taken = resolved(load_recipe(recipe_file(tmp_path, model={"adapter": str(adapter)}, lora=None)))
    assert taken.lora.use_rslora and taken.lora.scale == 8 / 4**0.5
    with pytest.raises(UserInputError, match=r"lora\.use_rslora: True in the adapter, False in the recipe"):
        resolved(load_recipe(recipe_file(tmp_path, model={"adapter": str(adapter)})))


def test_without_an_adapter_no_lora_is_a_full_model(llama, tmp_path):
    with pytest.raises(RecipeError, match=r"lora: null trains every weight"):
        load_recipe(recipe_file(tmp_path, model={"name_or_path": str(llama)}), ["lora=null"])
    with pytest.raises(RecipeError, match=r"no effect without model.adapter"):
        load_recipe(recipe_file(tmp_path, model={"name_or_path": str(llama), "adapter_revision": "v1"}))
    with pytest.raises(UserInputError, match=r"model.adapter: .*no such folder"):
        resolved(load_recipe(recipe_file(tmp_path, model={"adapter": str(tmp_path / "gone")}, lora=None)))


@pytest.mark.parametrize("verb", ["train", "fit"])
def test_an_adapter_given_as_the_base_says_how(verb, first, tmp_path):
    path = recipe_file(tmp_path, model={"name_or_path": str(first[0])})
    rest = ["--output-dir", str(tmp_path / "out"), "--dry-run"] if verb == "train" else []
    code, _, err = invoke(verb, str(path), *rest)
    assert code == 2 and "is an adapter of" in err and f"model.adapter: {first[0]}" in err


@pytest.mark.parametrize("verb", ["fit", "preview", "noise"])
def test_looking_at_it_needs_no_base_in_the_recipe(verb, first, tmp_path):
    path = recipe_file(tmp_path, model={"adapter": str(first[0])}, lora=None)
    code, out, err = invoke(verb, str(path))
    assert code == 0 and out, err
