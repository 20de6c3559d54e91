"""Nothing is advised that a verb refuses: what is said of an adapter is what merge and gguf then do."""

import json

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny import SIZES, VOCABULARY, byte_tokenizer, save_tiny_model
from transformers import AutoModelForCausalLM, set_seed

from qlora_neft.adapter.folder import find_adapter
from qlora_neft.errors import UserInputError
from qlora_neft.export.consumers import facts_of, verdict_for
from qlora_neft.export.gguf.lora import write_lora_gguf
from qlora_neft.export.gguf.model import write_model_gguf
from qlora_neft.export.hub.public import PublicBase
from qlora_neft.export.hub.usage import snippets
from qlora_neft.export.merge.merge import merge_adapter
from qlora_neft.export.merge.plan import plan_merge
from qlora_neft.recipe.schema import Quantization

GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
BASES = {
    "llama": lambda folder: save_tiny_model(folder, "llama"),
    "llama-tied": lambda folder: save_tiny_model(folder, "llama-tied"),
    "gelu": lambda folder: save_tiny_model(folder, "llama", hidden_act="gelu"),
    "gemma2": lambda folder: save_tiny_model(folder, "gemma2"),
    "gpt2": lambda folder: saved(folder, "GPT2Config", GPT2),
    "olmo": lambda folder: saved(folder, "OlmoConfig", SIZES),
}
ADAPTERS = {
    "plain": {},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "whole head": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "rslora": {"use_rslora": True},
}
CASES = [(base, "plain") for base in BASES] + [
    (b, a) for b in ("llama", "llama-tied") for a in ADAPTERS if a != "plain"
]


def saved(folder, name, sizes):
    set_seed(0)
    config = getattr(transformers, name)(**sizes)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def refusal(verb):
    try:
        verb()
    except UserInputError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("base", "kind"), CASES)
def test_what_is_said_is_what_the_verbs_do(base, kind, tmp_path):
    BASES[base](tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    settings = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **ADAPTERS[kind]}
    trained = get_peft_model(model, LoraConfig(**settings))
    trained.save_pretrained(tmp_path / "run", save_embedding_layers=False)
    byte_tokenizer().save_pretrained(tmp_path / "run")
    folder = find_adapter(tmp_path / "run")
    facts = facts_of(folder)
    can = facts.abilities

    options = {"max_shard_bytes": 10**9, "device": "cpu", "say": lambda line: None}
    merged = refusal(lambda: merge_adapter(plan_merge(folder), tmp_path / "out", byte_tokenizer(), None, **options))
    assert (merged is None) == (can.merge is None), (merged, can.merge)
    alone = refusal(lambda: write_lora_gguf(folder, tmp_path / "adapter.gguf"))
    assert (alone is None) == (can.adapter_gguf is None), (alone, can.adapter_gguf)
    if merged is None:
        gguf = refusal(lambda: write_model_gguf(tmp_path / "out", tmp_path / "model.gguf"))
        assert (gguf is None) == (can.merged_gguf is None), (gguf, can.merged_gguf)
    # Card and check advise nothing else.
    found = snippets("a/b", PublicBase("a/c", None), json.loads((tmp_path / "run/adapter_config.json").read_text()),
                     Quantization(), None, None, facts)  # fmt: skip
    card = "\n".join(f"{snippet.note} {snippet.code}" for snippet in found)
    checked = {name: verdict_for(name, facts) for name in ("vllm", "llama.cpp", "ollama")}
    said = json.dumps([verdict.as_dict() for verdict in checked.values()])
    assert ("qlora-neft merge a/b" in card) == (merged is None)
    assert merged is None or "qlora-neft merge" not in said
    assert ("vllm serve" in card) == checked["vllm"].is_usable
    assert alone is None or "gguf a/b adapter.gguf" not in card
