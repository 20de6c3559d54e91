"""A dry run that passes means that the run starts: what cannot be built is one message before a weight is read."""

from __future__ import annotations

import json
import time

import pytest
import torch
from test_run import recipe_for, without_held_out
from tiny import byte_tokenizer
from transformers import LlamaConfig

from qlora_neft.base.nf4 import float32_islands, load_nf4_base
from qlora_neft.errors import RecipeError, UserInputError
from qlora_neft.runner import rehearsal
from qlora_neft.runner.run import run
from scripts.families.__main__ import RESULTS
from scripts.families.audit import audit, clear, save_tiny
from scripts.families.tiny import tiny_config


def dry(model, tmp_path, *overrides):
    recipe = recipe_for(model, tmp_path, *without_held_out("quantization.min_nf4_share=0", *overrides))
    return run(recipe, tmp_path / "out", dry_run=True)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    made = {}

    def get(model_type):
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp(model_type)
            save_tiny(model_type, made[model_type])
        return made[model_type]

    return get


def test_the_head_as_a_target_is_refused_before_weights(llama, tmp_path):
    with pytest.raises(UserInputError, match=r"lora.target_modules: lm_head is the output layer"):
        dry(llama, tmp_path, "lora.target_modules=[q_proj, lm_head]")


def test_all_problems_are_said_at_once(family, tmp_path):
    falcon = family("falcon_h1")
    with pytest.raises(RecipeError) as caught:
        dry(falcon, tmp_path, "lora.target_modules=[q_proj, out_proj]", "quantization.min_nf4_share=0.999")
    assert "min_nf4_share" in caught.value.problems[0]
    assert "out_proj of FalconH1ForCausalLM cannot have LoRA (a Mamba kernel reads" in caught.value.problems[1]


def test_what_cannot_have_lora_is_left_out_of_all_linear_and_said(family, tmp_path):
    notes = dry(family("falcon_h1"), tmp_path)["plan"]["notes"]
    assert "without LoRA: out_proj (a Mamba kernel reads its weight itself)" in " ".join(notes)


def test_upstreams_refusal_is_one_line_with_its_words(llama, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise KeyError("no such rope type\nand more")

    monkeypatch.setattr(rehearsal, "in_nf4", refuse)
    with pytest.raises(
        UserInputError, match=r"^model.name_or_path: a model of type llama .*KeyError: .*rope type"
    ) as caught:
        dry(llama, tmp_path)
    assert "\n" not in str(caught.value)


def test_checkpointing_that_a_model_lacks_is_off_by_itself_and_refused_if_asked_for(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.LlamaForCausalLM.supports_gradient_checkpointing", False)
    with pytest.raises(UserInputError, match=r"machine.activation_checkpointing: LlamaForCausalLM cannot recompute"):
        dry(llama, tmp_path, "machine.activation_checkpointing=true")
    monkeypatch.setattr(
        "qlora_neft.runner.plan._checkpointing", lambda *_: (True, None, "activation checkpointing: on")
    )
    plan = dry(llama, tmp_path)["plan"]
    assert plan["activation_checkpointing"] is False
    assert [note for note in plan["notes"] if "checkpointing" in note] == [
        "activation checkpointing: off, LlamaForCausalLM has none"
    ]


def test_thirty_billion_parameters_take_seconds(tmp_path):
    sizes = {"hidden_size": 6656, "intermediate_size": 17920, "num_hidden_layers": 60, "num_attention_heads": 52}
    LlamaConfig(**sizes, vocab_size=32000).save_pretrained(tmp_path / "base")  # a configuration, and no weight
    byte_tokenizer().save_pretrained(tmp_path / "base")
    started = time.monotonic()
    dry(tmp_path / "base", tmp_path)
    assert time.monotonic() - started < 30


def test_islands_of_float32_are_matched_as_transformers_matches_them(family):
    folder = family("deepseek_v3")
    base = load_nf4_base(str(folder), device=torch.device("cpu"), compute_dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in base.named_parameters() if p.is_floating_point()}
    gates = [name for name in dtypes if name.endswith("mlp.gate.weight")]
    assert gates and all(dtypes[name] == torch.float32 for name in gates)
    assert {d for name, d in dtypes.items() if name not in gates} == {torch.bfloat16}
    assert float32_islands(base, torch.float32) == frozenset()


def test_the_committed_table_of_families_is_true(tmp_path):
    # Experts, a shared expert, and names that PEFT spoils when it reads them back (`adapter.spelling`).
    model_type = "laguna"
    committed = json.loads(RESULTS.read_text())["families"][model_type]
    found = audit(model_type, clear(tmp_path / "work"))
    assert found["bugs"] == []
    assert {s: end == "yes" for s, end in found["stages"].items()} == {
        s: end == "yes" for s, end in committed["stages"].items()
    }
    assert found["census"] == committed["census"]


def test_every_family_has_a_configuration_of_a_few_dozen():
    assert tiny_config("llama").hidden_size == 64
