"""Of a checkpoint that also sees, the language model alone is loaded, trained and merged; the rest is copied."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import byte_tokenizer, rows_of_lengths, tiny_trainer
from transformers import AutoConfig, AutoModelForImageTextToText, set_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from qlora_neft.adapter.folder import find_adapter
from qlora_neft.base.config import check_base_config
from qlora_neft.base.nf4 import load_nf4_base
from qlora_neft.base.text_part import causal_model
from qlora_neft.errors import UserInputError
from qlora_neft.export.abilities import facts_of
from qlora_neft.export.consumers import verdict_for
from qlora_neft.export.hub.public import PublicBase
from qlora_neft.export.hub.usage import snippets
from qlora_neft.export.merge.merge import merge_adapter
from qlora_neft.export.merge.plan import plan_merge
from qlora_neft.recipe.schema import Quantization
from scripts.families.tiny import tiny_whole

CPU = torch.device("cpu")
ROWS = rows_of_lengths([30, 12], seed=6)
IDS = torch.arange(5, 25)[None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Tiny checkpoints as transformers saves them, by model type, each made once: (folder, whole model)."""
    made = {}

    def get(model_type):
        if model_type not in made:
            folder = tmp_path_factory.mktemp(model_type)
            config = tiny_whole(model_type)
            set_seed(0)
            model = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]._from_config(config, dtype=torch.float32).eval()
            model.save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
            made[model_type] = folder, model
        return made[model_type]

    return get


# Ministral 3 is a mistral3 checkpoint with another text part; llama4's whole model cannot run on text alone.
@pytest.mark.parametrize("model_type", ["gemma3", "gemma4", "qwen3_5", "mistral3", "internvl"])
def test_the_text_part_is_the_whole_model_on_text(whole, model_type):
    folder, model = whole(model_type)
    found = causal_model(check_base_config(str(folder)))
    assert found.is_text_part and "vision_config" in found.without
    part = found.model_class.from_pretrained(folder, **found.load_kwargs()).eval()
    with torch.no_grad():
        torch.testing.assert_close(part(input_ids=IDS).logits, model(input_ids=IDS).logits)
    base = load_nf4_base(str(folder), device=CPU, compute_dtype=torch.float32)
    assert type(base) is type(part)
    assert not [name for name, _ in base.named_parameters() if "vision" in name or "visual" in name]


def test_the_model_type_decides_not_the_name_of_the_architecture(whole, tmp_path):
    folder, _ = whole("qwen3_5")
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen3_5ForConditionalGeneration"]
    check_base_config(str(folder))
    copy = tmp_path / "classifier"
    shutil.copytree(folder, copy)
    edit(copy, architectures=["Qwen3_5ForSequenceClassification"])
    with pytest.raises(UserInputError, match="is Qwen3_5ForSequenceClassification"):
        check_base_config(str(copy))


def test_missing_weights_of_the_text_part_are_refused(whole, tmp_path):
    from safetensors.torch import save_file

    folder, _ = whole("mistral3")
    copy = tmp_path / "incomplete"
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    del tensors["language_model.model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserInputError, match=r"lacks 1 weights .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_nf4_base(str(copy), device=CPU, compute_dtype=torch.float32)


@pytest.mark.parametrize("where", ["whole", "text_config"])
def test_another_quantization_is_seen_wherever_it_is_written(whole, tmp_path, where):
    folder, _ = whole("gemma3")
    copy = tmp_path / "gptq"
    shutil.copytree(folder, copy)
    stored = {"quant_method": "gptq", "bits": 4}
    text = json.loads((copy / "config.json").read_text())["text_config"]
    edit(
        copy,
        **(
            {"quantization_config": stored}
            if where == "whole"
            else {"text_config": {**text, "quantization_config": stored}}
        ),
    )
    with pytest.raises(UserInputError, match=r"quantized with gptq. Start from the original"):
        check_base_config(str(copy))


def test_trained_and_merged_it_is_the_checkpoint_in_its_own_layout(whole, tmp_path):
    folder, _ = whole("mistral3")
    trainer = tiny_trainer(folder, tmp_path / "run", ROWS, max_steps=1, per_device_train_batch_size=2)
    trainer.train()
    assert all("vision" not in name for name, p in trainer.model.named_parameters() if p.requires_grad)
    trainer.save_model(tmp_path / "adapter")
    facts = facts_of(find_adapter(tmp_path / "adapter"))
    assert facts.is_of_text_part and facts.is_lost_to_peft  # AutoModelForCausalLM has no mistral3
    for tool in ("vllm", "peft", "transformers"):
        verdict = verdict_for(tool, facts)
        assert not verdict.is_usable and "text part" in verdict.reasons[0] and "qlora-neft merge" in verdict.remedy
    card = snippets("a/b", PublicBase("a/c", None), facts.config, Quantization(), None, None, facts)
    assert [s.title for s in card] == ["qlora_neft", "Merged into a plain 16-bit model"]
    assert "text part of a/c" in card[0].note
    plan = plan_merge(find_adapter(tmp_path / "adapter"), dtype="float32")
    merge_adapter(plan, tmp_path / "merged", byte_tokenizer(), None, max_shard_bytes=2**30, say=lambda line: None)

    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "merged"))
    assert before.keys() == after.keys()
    towers = [name for name in before if not name.startswith("language_model.")]
    assert len(towers) > 5 and all(torch.equal(before[name], after[name]) for name in towers)
    assert AutoConfig.from_pretrained(tmp_path / "merged").model_type == "mistral3"
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    trainer.model.eval()
    with torch.no_grad():
        ours = trainer.model(input_ids=IDS).logits
        torch.testing.assert_close(merged(input_ids=IDS).logits, ours, atol=1e-4, rtol=1e-4)


def edit(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
