"""What stands in a GGUF is the adapter, or the model: read back with the library's reader, put together, compared."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from command_line import invoke, never_stopped
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, tiny_lora
from transformers import AutoModelForCausalLM

from qlora_neft.adapter.folder import find_adapter
from qlora_neft.errors import UserInputError
from qlora_neft.export.gguf.lora import write_lora_gguf
from qlora_neft.export.gguf.model import write_model_gguf
from qlora_neft.export.gguf.modelfile import modelfile_of_model

gguf = pytest.importorskip("gguf", reason="the gguf library is not installed: pip install 'qlora-neft[gguf]'")

SCALES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 40}},
    "rank_pattern": {"rank_pattern": {"k_proj": 2, "down_proj": 12}},
    "all": {"use_rslora": True, "alpha_pattern": {"v_proj": 3}, "rank_pattern": {"q_proj": 2}},
}


def adapted(base, folder, **config):
    """An adapter on a base, with a B that is not zero; the model with it."""
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), tiny_lora(**config))
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.normal_(std=0.05)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model.eval()


def contents(path):
    """Metadata and tensors of a GGUF, tensors as torch has them."""
    reader = gguf.GGUFReader(path)
    values = {field.name: field.contents() for field in reader.fields.values()}
    return values, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def as_transformers_has_it(rows, num_heads):
    """Rows of q or k with neighbours rotated against each other, as halves rotated against each other."""
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])  # llama.cpp: (half, 2)
    return np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(rows.shape)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_the_delta_is_pefts(architecture_dir, tmp_path, architecture, scale):
    model = adapted(architecture_dir(architecture), tmp_path / "adapter", **SCALES[scale])
    write_lora_gguf(find_adapter(tmp_path / "adapter"), tmp_path / "a.gguf")
    values, tensors = contents(tmp_path / "a.gguf")
    assert values["general.type"] == "adapter" and values["adapter.type"] == "lora"
    assert values["general.architecture"] == architecture
    modules = {name: m for name, m in model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    assert len(tensors) == 2 * len(modules) == 28
    short = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip
    for name, module in modules.items():
        _, _, layer, _, last = name.split(".")
        a, b = (tensors[f"blk.{layer}.{short[last]}.weight.lora_{x}"] for x in "ab")
        delta = values["adapter.lora.alpha"] / b.shape[1] * (b @ a)
        if architecture == "llama" and last in ("q_proj", "k_proj"):
            delta = as_transformers_has_it(delta, 4 if last == "q_proj" else 2)
        expected = module.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(delta, expected, atol=1e-7, rtol=1e-5)


def test_a_plain_adapter_is_written_as_it_is(llama, tmp_path):
    folder = find_adapter(never_stopped(llama))
    write_lora_gguf(folder, tmp_path / "a.gguf")
    values, tensors = contents(tmp_path / "a.gguf")
    stored = load_file(folder.path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.self_attn.v_proj"
    assert values["adapter.lora.alpha"] == 8
    for x in "AB":
        written = tensors[f"blk.1.attn_v.weight.lora_{x.lower()}"]
        assert written.dtype == np.float32 and np.array_equal(written, stored[f"{prefix}.lora_{x}.weight"].numpy())


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "mistral", "qwen2", "qwen3"])
def test_a_model_is_whole(architecture_dir, tmp_path, architecture):
    base = architecture_dir(architecture)
    write_model_gguf(base, tmp_path / "m.gguf")
    values, tensors = contents(tmp_path / "m.gguf")
    stored = load_file(base / "model.safetensors")
    stored = {name: tensor for name, tensor in stored.items() if architecture != "llama-tied" or "lm_head" not in name}
    assert len(tensors) == len(stored)
    arch = values["general.architecture"]
    assert arch == architecture.replace("-tied", "").replace("mistral", "llama")
    assert values[f"{arch}.block_count"] == 2 and values[f"{arch}.attention.head_count_kv"] == 2
    assert values[f"{arch}.context_length"] == 256 and values[f"{arch}.rope.dimension_count"] == 16
    assert values["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    down = stored["model.layers.1.mlp.down_proj.weight"].numpy()
    assert np.array_equal(tensors["blk.1.ffn_down.weight"], down.astype(np.float16))
    k = tensors["blk.0.attn_k.weight"]
    k = as_transformers_has_it(k, 2) if arch == "llama" else k
    assert np.array_equal(k, stored["model.layers.0.self_attn.k_proj.weight"].numpy().astype(np.float16))
    for name, tensor in tensors.items():
        assert tensor.dtype == (np.float32 if tensor.ndim == 1 else np.float16), name
    assert len(values["tokenizer.ggml.tokens"]) == 260 and values["tokenizer.ggml.model"] == "gpt2"
    assert values["tokenizer.ggml.eos_token_id"] == 258 and values["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize(("dtype", "kind"), [("f32", "F32"), ("bf16", "BF16")])
def test_other_dtypes(llama, tmp_path, dtype, kind):
    write_model_gguf(llama, tmp_path / "m.gguf", dtype)
    [tensor] = [t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "blk.0.ffn_up.weight"]
    assert tensor.tensor_type.name == kind
    values = gguf.dequantize(tensor.data, tensor.tensor_type) if kind == "BF16" else tensor.data
    stored = load_file(llama / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    expected = stored.to(torch.bfloat16).float() if kind == "BF16" else stored
    assert np.array_equal(values, expected.numpy())


# ---- Refusals: nothing is written ----


def refused(what, *arguments, match):
    with pytest.raises(UserInputError, match=match):
        what(*arguments)


def test_what_is_there_stays(llama, tmp_path):
    (tmp_path / "m.gguf").write_text("mine")
    refused(write_model_gguf, llama, tmp_path / "m.gguf", match="exists already")
    assert (tmp_path / "m.gguf").read_text() == "mine"
    refused(write_model_gguf, llama, tmp_path / "none" / "m.gguf", match="no folder")
    refused(write_model_gguf, llama, tmp_path / "n.gguf", "f8", match="--dtype")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_value_beyond_f16_is_refused_and_leaves_nothing(llama, tmp_path):
    model = shutil.copytree(llama, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    refused(write_model_gguf, model, tmp_path / "out" / "m.gguf", match="bf16")
    assert list((tmp_path / "out").iterdir()) == []
    write_model_gguf(model, tmp_path / "out" / "m.gguf", "bf16")


@pytest.mark.parametrize("architecture", ["gemma2", "gpt-neox"])
def test_other_architectures_are_refused_by_name(architecture_dir, tmp_path, architecture):
    refused(write_model_gguf, architecture_dir(architecture), tmp_path / "m.gguf", match="Supported: LlamaForCausalLM")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "qlora-neft merge"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type yarn"),
    ],
)
def test_what_the_name_of_the_architecture_does_not_say_is_refused(llama, tmp_path, change, match):
    model = shutil.copytree(llama, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    refused(write_model_gguf, model, tmp_path / "m.gguf", match=match)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"use_dora": True}, "use_dora.*PEFT's merge_and_unload"),
        ({"bias": "all", "target_modules": ["q_proj"]}, "weights"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "lm_head"),
    ],
)
def test_more_than_matrices_is_refused(architecture_dir, tmp_path, config, match):
    adapted(architecture_dir("qwen2"), tmp_path / "adapter", **config)
    refused(write_lora_gguf, find_adapter(tmp_path / "adapter"), tmp_path / "a.gguf", match=f"(?s){match}")


def test_without_the_library_the_extra_is_named(llama, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    code, _, stderr = invoke("gguf", str(llama), str(tmp_path / "m.gguf"))
    assert code == 2 and "pip install 'qlora-neft[gguf]'" in stderr and "Traceback" not in stderr


# ---- The verbs ----


def test_an_adapter_with_its_modelfile(llama, tmp_path):
    run = never_stopped(llama)
    code, stdout, _ = invoke("gguf", str(run), str(tmp_path), "--modelfile", "--from", "llama2")
    assert code == 0 and (tmp_path / "adapter.gguf").is_file() and "llama-server" in stdout
    text = (tmp_path / "Modelfile").read_text()
    assert text.startswith("FROM llama2\nADAPTER ./adapter.gguf\nTEMPLATE ")
    assert "### Instruction:\n{{ .Prompt }}\n\n### Response:{{ .Response }}" in text
    for line in ('PARAMETER stop "</s>"', "PARAMETER repeat_penalty 1.2", "PARAMETER temperature 0"):
        assert line in text.splitlines()
    (tmp_path / "adapter.gguf").unlink()
    code, _, stderr = invoke("gguf", str(run), str(tmp_path), "--modelfile")
    assert code == 2 and "--modelfile" in stderr and not (tmp_path / "adapter.gguf").exists()


def test_a_model_must_say_how_it_was_prompted(llama, tmp_path):
    code, _, stderr = invoke("gguf", str(llama), str(tmp_path / "m"), "--modelfile")
    assert code == 2 and "--prompt-template" in stderr and not list(tmp_path.iterdir())
    refused(modelfile_of_model, llama, tmp_path / "m.gguf", "alpaka", match="must be one of alpaca")
    code, stdout, _ = invoke("gguf", str(llama), str(tmp_path / "m"), "--modelfile", "--prompt-template", "vicuna")
    assert code == 0 and "m.gguf" in stdout
    assert "USER: {{ .Content }} ASSISTANT:" in (tmp_path / "Modelfile").read_text()


def test_check_answers_by_exit_code(llama):
    run = str(never_stopped(llama))
    code, stdout, _ = invoke("check", run, "--json")
    found = json.loads(stdout)
    assert code == 0 and [v["verdict"] for v in found["verdicts"]] == ["works"] * 5
    code, stdout, _ = invoke("check", run, "--for", "llama.cpp")
    assert code == 0 and "qlora-neft gguf" in stdout
    code, _, stderr = invoke("check", run, "--for", "llamacpp")
    assert code == 2 and "Did you mean llama.cpp" in stderr


def test_check_fails_where_one_tool_breaks(architecture_dir, tmp_path):
    adapted(architecture_dir("qwen2"), tmp_path / "adapter", use_dora=True)
    code, stdout, _ = invoke("check", str(tmp_path / "adapter"), "--for", "vllm,peft")
    assert code == 1 and "breaks" in stdout and "use_dora" in stdout
    assert invoke("check", str(tmp_path / "adapter"), "--for", "peft")[0] == 0


@pytest.mark.parametrize("config", [*SCALES.values(), {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_peft_and_transformers_load_what_check_says_they_load(llama, tmp_path, config):
    from peft import AutoPeftModelForCausalLM

    config = {"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj", "up_proj"], **config}
    model, ids = adapted(llama, tmp_path / "adapter", **config), torch.tensor([[257, 72, 105, 32]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        for loader in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
            loaded = loader.from_pretrained(tmp_path / "adapter").eval()
            torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-6, rtol=1e-5)
