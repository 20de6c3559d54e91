"""Families whose weights are stored, or read, in another way than Llama's merge like any other, and are proven."""

import pytest
import torch
import transformers
from tiny import byte_tokenizer, mixed_rows, tiny_trainer
from torch import nn
from transformers import AutoModelForCausalLM, set_seed

from qlora_neft.adapter.folder import find_adapter
from qlora_neft.base.checkpoint import skeleton
from qlora_neft.errors import RunFailed
from qlora_neft.export.merge import proof
from qlora_neft.export.merge.merge import merge_adapter
from qlora_neft.export.merge.plan import plan_merge

COMMON = {
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
}
DELTA_NET = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 1,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
GEMMA4 = {
    "num_global_key_value_heads": 1,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 260,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 64,
}
GPT2 = {
    "vocab_size": 260,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 256,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 257,
    "eos_token_id": 258,
}
FAMILIES = {
    "Conv1D": ("GPT2Config", GPT2),  # stored (in, out)
    "Gated DeltaNet": ("Qwen3_5TextConfig", {**COMMON, **DELTA_NET}),  # a convolution that is read and never called
    "short convolutions": (
        "Lfm2Config",
        {**COMMON, "block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]},
    ),
    "stored buffers": ("Gemma4TextConfig", {**COMMON, **GEMMA4}),
}


@pytest.fixture(scope="module")
def adapter_of(tmp_path_factory):
    made = {}

    def make(family):
        if family not in made:
            name, sizes = FAMILIES[family]
            folder = tmp_path_factory.mktemp("merge")
            set_seed(0)
            model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**sizes), dtype=torch.float32)
            with torch.no_grad():
                for buffer in dict(model.named_buffers()).values():
                    if buffer.numel() == 1 and buffer.is_floating_point():
                        buffer.fill_(0.5)  # Gemma 4's scalars, which are 1 in a model that was never trained
            model.save_pretrained(folder / "base")
            byte_tokenizer().save_pretrained(folder / "base")
            trainer = tiny_trainer(folder / "base", folder / "run", learning_rate=1e-2, max_steps=2)
            trainer.train()
            trainer.save_model()
            made[family] = folder / "run"
        return made[family]

    return make


@pytest.mark.parametrize("memory", ["whole", "block by block"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_merges_and_is_proven(family, memory, adapter_of, tmp_path, monkeypatch):
    if memory != "whole":
        monkeypatch.setattr(proof, "_available_bytes", lambda device: 0)
    plan = plan_merge(find_adapter(adapter_of(family)), dtype="float32")
    rows = proof.ProofRows([dict(row) for row in mixed_rows(4, 3)], "rows")
    options = {"max_shard_bytes": 10**9, "device": "cpu", "say": lambda line: None}
    report = merge_adapter(plan, tmp_path / "out", byte_tokenizer(), rows, **options)
    found = report["strategies"]
    assert report["proof"]["streamed"] == (memory != "whole")
    assert abs(found["dequantized"]["kl"]) < 1e-8 < found["original"]["kl"] and found["nf4"]["kl"] > 1e-8
    assert report["proof"]["no_adapter"]["kl"] > 1e-6
    # What was written, loaded as anyone loads it, has the loss that the proof says.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    reference = proof.reference_of(lambda **x: model(**x).logits, rows.rows, 260, torch.device("cpu"))
    assert reference.loss == pytest.approx(found["dequantized"]["loss"], abs=1e-5)


def test_a_weight_that_was_not_fetched_ends_the_proof(adapter_of):
    """With one module's hook less, as if a weight were read in a way that nobody foresaw."""
    plan = plan_merge(find_adapter(adapter_of("Gated DeltaNet")), dtype="float32")
    weights = lambda name: plan.merge.loaded(name, "original", plan.dtype)  # noqa: E731
    model = proof.Streamed(skeleton(plan.config), weights, torch.device("cpu"), keep=True)
    name, module = next((n, m) for n, m in model.model.named_modules() if isinstance(m, nn.Conv1d))
    module.weight = nn.Parameter(module.weight.to("meta"), requires_grad=False)
    with pytest.raises(RunFailed, match=f"not loaded .such as {name}"):
        model(input_ids=torch.arange(8)[None])
