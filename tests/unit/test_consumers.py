"""Each tool's verdict on adapters of every kind, from their files alone."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from qlora_neft.adapter.folder import find_adapter
from qlora_neft.errors import UserInputError
from qlora_neft.export.consumers import facts_of, named_consumers, verdict_for

PLAIN = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "bias": "none", "target_modules": ["q_proj"]}


@pytest.fixture
def adapter(tmp_path):
    """Makes an adapter's folder: its configuration, LoRA on modules, other weights, and a base of an architecture."""

    def make(config=None, modules=("model.layers.0.self_attn.q_proj",), others=(), rank=16, vocab=None, **base):
        base_dir = tmp_path / "base"
        base_dir.mkdir(exist_ok=True)
        (base_dir / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 10, **base}))
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        stated = {**PLAIN, "base_model_name_or_path": str(base_dir), **(config or {})}
        (folder / "adapter_config.json").write_text(json.dumps(stated))
        weights = {f"base_model.model.{m}.lora_A.weight": np.zeros((rank, 4), "f") for m in modules}
        weights |= {f"base_model.model.{m}.lora_B.weight": np.zeros((10, rank), "f") for m in modules}
        save_file(weights | {name: np.zeros(4, "f") for name in others}, folder / "adapter_model.safetensors")
        if vocab is not None:
            stored = {"model": {"vocab": {str(n): n for n in range(vocab)}}, "added_tokens": []}
            (folder / "tokenizer.json").write_text(json.dumps(stored))
        return folder

    return make


def verdict(folder, consumer):
    return verdict_for(consumer, facts_of(find_adapter(folder)))


@pytest.mark.parametrize("consumer", ["vllm", "llama.cpp", "ollama", "transformers", "peft"])
def test_a_plain_adapter_works_everywhere(adapter, consumer):
    found = verdict(adapter(), consumer)
    assert found.verdict == "works" and found.reasons == [] and found.command
    assert any("NF4" in note for note in found.notes)  # on the 16-bit base it is another model


@pytest.mark.parametrize(("rank", "flag"), [(8, None), (16, None), (17, 32), (64, 64), (320, 320), (321, 512)])
def test_vllm_is_told_the_rank(adapter, rank, flag):
    found = verdict(adapter({"r": rank}, rank=rank), "vllm")
    assert found.flag == (f"--max-lora-rank {flag}" if flag else None)
    assert found.verdict == ("works with a flag" if flag else "works")
    assert flag is None or f"--max-lora-rank {flag} " in found.command


def test_the_rank_is_that_of_the_weights(adapter):
    assert verdict(adapter({"r": 8}, rank=24), "vllm").flag == "--max-lora-rank 32"
    too_large = verdict(adapter({"r": 1024}, rank=1024), "vllm")
    assert too_large.verdict == "breaks" and "512" in too_large.reasons[0] and "merge" in too_large.remedy


@pytest.mark.parametrize(
    ("config", "vllm", "gguf"),
    [
        ({"use_rslora": True}, "works", "works with a flag"),
        ({"alpha_pattern": {"q_proj": 8}}, "breaks", "works with a flag"),
        ({"rank_pattern": {"q_proj": 8}}, "breaks", "works with a flag"),
        ({"use_dora": True}, "breaks", "breaks"),
        ({"modules_to_save": ["lm_head"]}, "breaks", "breaks"),
        ({"bias": "lora_only"}, "breaks", "breaks"),
        ({"trainable_token_indices": [3]}, "breaks", "breaks"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_what_servers_make_of_more_than_plain_lora(adapter, config, vllm, gguf):
    folder = adapter(config)
    assert verdict(folder, "vllm").verdict == vllm
    for consumer in ("llama.cpp", "ollama"):
        found = verdict(folder, consumer)
        assert found.verdict == gguf and next(iter(config)) in found.reasons[0]
        assert gguf == "breaks" or f"qlora-neft gguf {folder}" in found.flag
        is_mergeable = next(iter(config)) == "modules_to_save"  # qlora-neft merge refuses the others: no advice then
        remedy = f"qlora-neft merge {folder} OUT" if is_mergeable else "PEFT's merge_and_unload"
        assert gguf != "breaks" or remedy in found.remedy
    assert verdict(folder, "peft").verdict == "works"


def test_weights_that_no_setting_explains_are_seen(adapter):
    found = verdict(adapter(others=["base_model.model.lm_head.weight"]), "llama.cpp")
    assert found.verdict == "breaks" and "lm_head.weight" in found.reasons[0]


def test_a_head_that_is_the_embedding_cannot_change_alone(adapter):
    modules = ["model.layers.0.self_attn.q_proj", "lm_head"]
    assert verdict(adapter(modules=modules), "llama.cpp").verdict == "works"
    tied = verdict(adapter(modules=modules, tie_word_embeddings=True), "llama.cpp")
    assert tied.verdict == "breaks" and tied.remedy == "train without lm_head in lora.target_modules"


@pytest.mark.parametrize(
    ("model_type", "llama_cpp", "ollama"),
    [
        ("mistral", "works", "works"),
        ("qwen3", "works", "works with a flag"),
        ("gemma2", "works with a flag", "works"),
        ("phi3", "works with a flag", "breaks"),
    ],
)
def test_the_base_must_be_known(adapter, model_type, llama_cpp, ollama):
    folder = adapter(model_type=model_type)
    assert verdict(folder, "llama.cpp").verdict == llama_cpp and verdict(folder, "ollama").verdict == ollama


def test_rslora_on_a_base_that_is_not_written_here_breaks(adapter):
    folder = adapter({"use_rslora": True}, model_type="gemma2")
    assert verdict(folder, "llama.cpp").verdict == verdict(folder, "ollama").verdict == "breaks"


def test_a_base_that_is_gone_breaks_what_loads_it_by_name(adapter, tmp_path):
    gone = {"base_model_name_or_path": str(tmp_path / "gone")}
    folder = adapter(gone)
    for consumer in ("peft", "transformers"):
        found = verdict(folder, consumer)
        assert found.verdict == "breaks" and "gone" in found.reasons[0] and "export" in found.remedy
    unchecked = verdict(folder, "vllm")
    assert unchecked.verdict == "works" and any("not checked" in note for note in unchecked.notes)
    assert any("this machine" in note for note in verdict(adapter(), "peft").notes)


@pytest.mark.parametrize("consumer", ["vllm", "peft"])
def test_tokens_the_base_has_no_row_for_break(adapter, consumer):
    assert verdict(adapter(vocab=10), consumer).is_usable
    found = verdict(adapter(vocab=12), consumer)
    assert found.verdict == "breaks" and "2 tokens" in found.reasons[0] and found.command is None


def test_names_of_tools_are_checked():
    assert named_consumers("peft, vLLM,peft") == ["peft", "vllm"]
    for names, hint in (("vlm", "Did you mean vllm"), ("x", "Known: vllm"), (" , ", "names no tool")):
        with pytest.raises(UserInputError, match=hint):
            named_consumers(names)


def test_damaged_weights_are_named(adapter):
    folder = adapter()
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 9)
    with pytest.raises(UserInputError, match="cannot be read"):
        facts_of(find_adapter(folder))
