"""Bases that are not quantized: every weight trained (``lora: null``), or plain LoRA."""

import json
import shutil

import pytest
import torch
from command_line import invoke
from test_continued import recipe_file
from tiny import adapter_weights, byte_tokenizer, gradient_norms, losses, max_difference, mixed_rows, tiny_trainer
from transformers import AutoModelForCausalLM

from qlora_neft import load_recipe
from qlora_neft.base.nf4 import load_nf4_base
from qlora_neft.errors import UserInputError
from qlora_neft.fit import card_of, fit_report
from qlora_neft.fit.geometry import geometry_of, shipped_config
from qlora_neft.runner.run import run

IN_FULL = ("quantization=null", "lora=null")
ADAM_BYTES = 8  # per weight


def recipe_for(model, folder, *overrides):
    return load_recipe(recipe_file(folder, model={"name_or_path": str(model)}), overrides)


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@pytest.fixture(scope="module")
def full(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    recipe = recipe_for(llama, folder, *IN_FULL, "machine.save_steps=1", "train.learning_rate=1e-3")
    return recipe, folder / "out", run(recipe, folder / "out", quiet=True)


def test_every_weight_is_trained_and_the_folder_is_a_model(full, llama):
    _, folder, summary = full
    before, after = loaded(llama).state_dict(), loaded(folder).state_dict()
    assert before.keys() == after.keys()
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
    assert not any(torch.equal(before[name].float(), after[name]) for name in before)
    assert not (folder / "adapter_config.json").exists() and loaded(folder).config.use_cache is True
    # What is said of it.
    assert summary["lora_parameters"] == 0 and summary["base_unchanged"] is None
    assert summary["parameters"] == summary["census"]["trained"] == loaded(folder).num_parameters()
    assert "float32 weights" in summary["precision"]
    assert summary["after"]["held_out_loss"] < summary["before"]["held_out_loss"]
    assert load_recipe(folder / "recipe.yaml") == full[0]


def test_a_run_is_resumed_bit_for_bit(full, tmp_path):
    recipe, folder, _ = full
    for name in ("run.json", "recipe.yaml", "metrics.jsonl", "checkpoint-1"):
        copy = shutil.copytree if (folder / name).is_dir() else shutil.copyfile
        copy(folder / name, tmp_path / name)
    assert run(recipe, tmp_path, quiet=True)["resumed_from_step"] == 1
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_micro_batches_and_alpha_zero_leave_the_trajectory_alone(llama, tmp_path):
    def trained(**overrides):
        model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
        trainer = tiny_trainer(
            model,
            tmp_path,
            mixed_rows(8),
            processing_class=byte_tokenizer(),
            peft_config=None,
            max_steps=2,
            **overrides,
        )
        trainer.train()
        return trainer

    whole, split = trained(), trained(micro_batch_size=1)
    assert losses(whole) == pytest.approx(losses(split), rel=1e-5)
    assert gradient_norms(whole) == pytest.approx(gradient_norms(split), rel=1e-4)
    # Adam divides by the size of a gradient: where that is rounding, so is a share of the step (learning rate 1e-3).
    assert max_difference(adapter_weights(whole), adapter_weights(split)) < 5e-5
    zero, none = (adapter_weights(trained(neftune_noise_alpha=alpha)) for alpha in (0.0, None))
    assert max_difference(zero, none) == 0
    assert max_difference(adapter_weights(whole), none) > 5e-4


@pytest.mark.parametrize(
    "words", [("generate", "hello"), ("check",), ("merge", "merged"), ("export", "--repo-id", "me/it", "--dry-run")]
)
def test_the_verbs_for_adapters_say_what_it_is(full, words, tmp_path):
    folder, (verb, *rest) = full[1], words
    rest = [str(tmp_path / "merged") if word == "merged" else word for word in rest]
    code, _, err = invoke(verb, str(folder), *rest)
    assert code == 2 and "holds a full model, trained without an adapter" in err and "Traceback" not in err


def test_plain_lora_is_trained_merged_and_told(llama, tmp_path):
    summary = run(recipe_for(llama, tmp_path, "quantization=null"), tmp_path / "out", quiet=True)
    assert summary["base_unchanged"] is True and summary["census"]["nf4_weights"] == 0
    assert 0 < summary["lora_parameters"] < summary["parameters"]
    code, out, err = invoke("generate", str(tmp_path / "out"), "hello", "--max-new-tokens", "2")
    assert code == 0, err
    code, out, err = invoke("merge", str(tmp_path / "out"), str(tmp_path / "merged"), "--dtype", "float32")
    assert code == 0 and "NF4" not in out + err, err
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report["status"] == "done" and report["strategies"]["dequantized"]["kl"] < 1e-6
    code, out, _ = invoke("check", str(tmp_path / "out"))
    assert "NF4" not in out and "not quantized" in out


def test_a_base_in_nf4_is_refused_in_the_dry_run(llama, tmp_path):
    base = load_nf4_base(str(llama), device=torch.device("cpu"), compute_dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(UserInputError, match=r"quantization: null asks for .* is stored in NF4"):
        run(recipe_for(tmp_path / "base", tmp_path, *IN_FULL), tmp_path / "out", dry_run=True, quiet=True)


def test_fit_says_what_it_costs():
    recipe = load_recipe("llama2-7b-alpaca", IN_FULL)
    geometry = geometry_of(shipped_config("meta-llama/Llama-2-7b-hf"))
    weights = 6_738_415_616
    report = fit_report(recipe, geometry, card_of("24GiB"))
    terms = report["terms"]
    assert (terms["weights"], terms["gradients"], terms["optimizer"]) == (
        4 * weights,
        4 * weights,
        ADAM_BYTES * weights,
    )
    assert report["lora_parameters"] == report["quantized_parameters"] == report["nf4_bytes"] == 0
    assert not report["fits"] and any("quantization={} lora.r=64" in remedy for remedy in report["remedies"])
    lora = fit_report(load_recipe("llama2-7b-alpaca", ["quantization=null"]), geometry, card_of("24GiB"))
    assert lora["terms"]["weights"] == 2 * weights and "dequantization" not in lora["terms"]
    assert lora["fits"]
