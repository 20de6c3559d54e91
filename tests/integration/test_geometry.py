"""Counts from config.json alone, against the really loaded NF4 model and its really added adapters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig
from tiny import ARCHITECTURES, save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_neft.base.lora import add_adapters, count_trainable
from qlora_neft.base.nf4 import load_nf4_base, nf4_config
from qlora_neft.errors import UserInputError
from qlora_neft.fit.estimate import Step, memory_terms
from qlora_neft.fit.geometry import FAMILIES, Geometry, geometry_of, shipped_config
from qlora_neft.fit.skeleton import counts_of
from qlora_neft.recipe.schema import Lora, Quantization

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
NO_BIAS_AT_ALL = {"enable_bias": False, "layer_norm_elementwise_affine": False}
# Hub id: total of the published checkpoint.
PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "huggyllama/llama-30b": 32_528_943_616,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "google/gemma-2-9b": 9_241_705_984,
    "facebook/opt-6.7b": 6_658_473_984,
    "EleutherAI/pythia-6.9b": 6_857_302_016,
    "microsoft/phi-2": 2_779_683_840,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "allenai/OLMoE-1B-7B-0924": 6_919_161_856,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-30B-A3B-Instruct-2507": 30_532_122_624,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "google/gemma-3-4b-it": 3_880_263_168,  # of the text part, as of the next
    "google/gemma-3-12b-it": 11_766_034_176,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Ministral-3-8B-Base-2512": 8_489_553_920,  # of the text part
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
}
# As their authors round or cut them: billions of weights, outside embedding and head, in use by a token.
ROUNDED = {
    "Qwen/Qwen3-0.6B": ("0.6", "0.44", None),
    "Qwen/Qwen3-1.7B": ("1.7", "1.4", None),
    "Qwen/Qwen3-4B-Instruct-2507": ("4.0", "3.6", None),
    "Qwen/Qwen3-8B": ("8.2", "6.95", None),
    "Qwen/Qwen3-14B": ("14.8", "13.2", None),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": ("30.5", "29.9", "3.3"),
    "meta-llama/Llama-3.2-1B-Instruct": ("1.24", None, None),
    "meta-llama/Llama-3.2-3B-Instruct": ("3.21", None, None),
    "meta-llama/Llama-3.1-8B": ("8.03", None, None),
    "google/gemma-3-4b-it": (None, "3.209", None),  # Gemma 3's report, Table 1, as the next
    "google/gemma-3-12b-it": (None, "10.759", None),
    "mistralai/Mistral-7B-v0.3": ("7.25", None, None),
    "mistralai/Ministral-3-8B-Base-2512": ("8.4", None, None),  # "8.4B Language Model"
    "microsoft/Phi-4-mini-instruct": ("3.8", None, None),
    "HuggingFaceTB/SmolLM3-3B": ("3.08", None, None),
}
CASES = [(architecture, {}) for architecture in ARCHITECTURES]
CASES += [(a, {"tie_word_embeddings": tied}) for a in ARCHITECTURES if a != "llama-tied" for tied in (True, False)]
CASES += [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_key_value_heads": None, "head_dim": None, "num_hidden_layers": 3}),
    ("llama", {"head_dim": 24, "num_key_value_heads": 1, "intermediate_size": 100}),
    # An odd number of weights: half a byte is left over, and the last block of 64 is short.
    ("llama", {"hidden_size": 65, "num_attention_heads": 5, "head_dim": 12, "intermediate_size": 101}),
    ("llama", {"intermediate_size": 257}),  # 257 blocks of 64: one more than a block of the second quantization
    ("llama", {"intermediate_size": 256}),  # exactly one
    ("mistral", {"head_dim": None, "intermediate_size": 100}),
    ("qwen2", {"head_dim": 8, "num_key_value_heads": 4}),
    ("qwen3", {"attention_bias": True, "head_dim": 32}),
    ("gemma2", {"attention_bias": True, "head_dim": 32}),
    ("gemma3", {"attention_bias": True, "head_dim": 32, "num_key_value_heads": 1}),
    ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    ("opt", {"word_embed_proj_dim": 100, "tie_word_embeddings": False, "_remove_final_layer_norm": True}),
    ("opt", {"enable_bias": False}),
    ("opt", {"layer_norm_elementwise_affine": False}),
    ("opt", NO_BIAS_AT_ALL),
    ("opt", {**NO_BIAS_AT_ALL, "tie_word_embeddings": False}),
    ("opt", {**NO_BIAS_AT_ALL, "num_hidden_layers": 1, "word_embed_proj_dim": 32}),
    ("gpt-neox", {"attention_bias": False, "intermediate_size": 100}),
    ("phi", {"qk_layernorm": True, "num_key_value_heads": 2, "head_dim": 32}),
]


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def stored_bytes(weight):
    """What bitsandbytes keeps for one weight, without its constant tables."""
    state = weight.quant_state
    tensors = [weight.data, state.absmax]
    if state.nested:
        tensors += [state.offset, state.state2.absmax]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def shapes(linears):
    return {n: (part.out_features, part.in_features, part.bias) for part in linears for n in part.module_names()}


# Single quantization in every run of the tests only for the odd shapes: blocks that are short, or one too many.
COUNTED = [
    pytest.param(
        architecture, overrides, double, marks=() if double or "intermediate_size" in overrides else pytest.mark.slow
    )
    for architecture, overrides in CASES
    for double in (True, False)
]


@pytest.mark.parametrize(("architecture", "overrides", "double_quant"), COUNTED)
def test_every_count_is_that_of_the_loaded_model(tmp_path, architecture, overrides, double_quant):
    folder = save_tiny_model(tmp_path / "model", architecture, **overrides)
    geometry = geometry_of(config_of(folder))
    quantization = nf4_config(Quantization(bnb_4bit_use_double_quant=double_quant), torch.float32)
    model = load_nf4_base(str(folder), device=CPU, compute_dtype=torch.float32, quantization_config=quantization)

    real = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert shapes(geometry.linears) == {
        name: (module.out_features, module.in_features, module.bias is not None) for name, module in real.items()
    }
    weights = [module.weight for module in real.values()]
    assert all(weight.quant_state.nested == double_quant for weight in weights)
    assert geometry.nf4_bytes(double_quant) == sum(map(stored_bytes, weights))
    assert geometry.quantized_parameters() == sum(weight.quant_state.shape.numel() for weight in weights)
    others = [param for param in model.parameters() if not isinstance(param, Params4bit)]
    assert geometry.unquantized_parameters() == sum(param.numel() for param in others)
    assert geometry.embedding_width == model.get_input_embeddings().weight.shape[1]
    assert geometry.vocab_size == model.get_input_embeddings().weight.shape[0]
    assert geometry.tied == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)

    adapted = add_adapters(model, LoraConfig(r=3, target_modules="all-linear"))
    assert geometry.lora_parameters(3) == count_trainable(adapted)


@pytest.mark.parametrize(("architecture", "overrides"), CASES)
def test_the_total_is_that_of_the_unquantized_model(tmp_path, architecture, overrides):
    folder = save_tiny_model(tmp_path / "model", architecture, **overrides)
    geometry = geometry_of(config_of(folder))
    config, model = AutoConfig.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert geometry.parameters() == sum(param.numel() for param in model.parameters())
    head = model.get_output_embeddings()
    assert geometry.head_parameters == (0 if geometry.tied else sum(p.numel() for p in head.parameters()))
    embeddings = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    assert geometry.embedding_parameters == sum(module.weight.numel() for module in embeddings)
    assert geometry.model_type == config.model_type
    assert geometry.max_position_embeddings == config.max_position_embeddings
    assert geometry.num_layers == config.num_hidden_layers
    heads = [m for m in model.modules() if hasattr(m, "head_dim") or hasattr(m, "head_size")]  # GPT-NeoX: head_size
    assert geometry.head_dim in {getattr(heads[0], name, None) for name in ("head_dim", "head_size")}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_key_left_out_has_the_default_of_its_model_type(model_type):
    config = AutoConfig.for_model(model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    geometry = geometry_of({"model_type": model_type})
    assert geometry.parameters() == sum(param.numel() for param in model.parameters())
    assert geometry.max_position_embeddings == config.max_position_embeddings
    assert geometry.tied == config.tie_word_embeddings


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [
        ("llama", ["q_proj", "v_proj"]),
        ("llama", ["q_proj", "self_attn.q_proj", "mlp.down_proj"]),
        ("llama", ["layers.1.self_attn.k_proj", "model.layers.0.mlp.up_proj"]),
        ("llama", ["o_proj", "lm_head"]),
        ("llama", r".*\.1\.mlp\.(up|down)_proj"),
        ("llama", "ALL-linear"),
        ("llama-tied", ["lm_head"]),
        ("opt", ["project_in", "fc2", "lm_head"]),
        ("gpt-neox", ["query_key_value", "dense"]),
        ("phi", ["dense", "fc1"]),
    ],
)
def test_named_targets_match_as_they_do_in_peft(tmp_path, architecture, targets):
    overrides = {"word_embed_proj_dim": 32} if architecture == "opt" else {}
    folder = save_tiny_model(tmp_path / "model", architecture, **overrides)
    config = LoraConfig(r=5, target_modules=targets, task_type="CAUSAL_LM")
    adapted = add_adapters(AutoModelForCausalLM.from_pretrained(folder), config)
    assert geometry_of(config_of(folder)).lora_parameters(5, targets) == count_trainable(adapted)


@pytest.mark.parametrize("targets", [["q_proj", "c_attn"], ["proj"], ["embed_tokens"], ["self_attn"], "q_proj"])
def test_a_target_that_is_no_linear_layer_is_refused(targets):
    with pytest.raises(UserInputError, match=r"lora.target_modules: the model has no linear layer .*down_proj"):
        geometry_of({"model_type": "llama"}).lora_parameters(8, targets)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_bases_have_their_published_totals(name):
    geometry = geometry_of(shipped_config(name))
    assert geometry.parameters() == PUBLISHED[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_shipped_bases_have_the_size_their_authors_give(name):
    geometry = geometry_of(shipped_config(name))
    inner = geometry.parameters() - geometry.embedding_parameters - geometry.head_parameters
    # Qwen counts embedding and head among the weights a token passes through.
    active = geometry.active_parameters() + geometry.unquantized_parameters()
    for published, ours in zip(ROUNDED[name], (geometry.parameters(), inner, active), strict=True):
        if published is not None:
            digits = len(published.partition(".")[2])
            assert published in (
                f"{ours / 1e9:.{digits}f}",
                f"{int(ours / 10 ** (9 - digits)) / 10**digits:.{digits}f}",
            )


def test_what_ships_is_what_is_checked_here():
    assert json.loads((ROOT / "qlora_neft" / "fit" / "base_configs.json").read_text()).keys() == PUBLISHED.keys()
    assert shipped_config("nobody/nothing") is None


def test_nf4_of_llama_7b_is_what_the_qlora_paper_says_per_weight():
    """0.5 bytes, an 8-bit absmax per 64 and a float per 64 * 256: 0.127 bits per weight instead of 0.5."""
    geometry = geometry_of(shipped_config("meta-llama/Llama-2-7b-hf"))
    weights = geometry.quantized_parameters()
    assert weights == 6_476_005_376
    assert geometry.nf4_bytes(False) == weights * (1 / 2 + 4 / 64)
    assert geometry.nf4_bytes() == weights * (1 / 2 + 1 / 64 + 4 / (64 * 256)) + 4 * 7 * 32
    assert geometry.lora_parameters(64) == 159_907_840


def test_a_checkpoint_stored_in_nf4_counts_the_same(llama, tmp_path):
    load_nf4_base(str(llama), device=CPU, compute_dtype=torch.float32).save_pretrained(tmp_path)
    stored = config_of(tmp_path)
    assert "quantization_config" in stored
    assert geometry_of(stored) == geometry_of(config_of(llama))


@pytest.mark.parametrize(("skipped", "counted"), [(None, True), (["lm_head", "merger"], True), (["q_proj"], False)])
def test_a_stored_choice_of_quantized_layers_is_refused_unless_it_is_the_usual_one(skipped, counted):
    config = {"model_type": "llama", "quantization_config": {"llm_int8_skip_modules": skipped}}
    if counted:
        assert geometry_of(config) == geometry_of({"model_type": "llama"})
    else:
        with pytest.raises(UserInputError, match=r"model.name_or_path: the checkpoint is stored with its own choice"):
            geometry_of(config)


def test_a_nested_text_configuration_counts_for_the_whole():
    text = {"model_type": "gemma3_text", "num_hidden_layers": 3}
    assert geometry_of({"model_type": "wrapper", "text_config": text}) == geometry_of(text)


def test_of_a_model_that_also_sees_the_text_part_is_counted():
    """It alone is loaded."""
    text = {"model_type": "gemma3_text", "num_hidden_layers": 2}
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 8}}
    geometry = geometry_of(config)
    assert geometry.left_out == ("vision_config",)
    assert geometry.parameters() == geometry_of(text).parameters()
    assert geometry.nf4_bytes() == geometry_of(text).nf4_bytes()


SHIPPED_FAMILIES = {shipped_config(name)["model_type"]: name for name in PUBLISHED}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_formula_and_the_skeleton_agree(model_type):
    """At a released size, or at transformers' defaults."""
    name = SHIPPED_FAMILIES.get(model_type)
    config = shipped_config(name) if name else {"model_type": model_type}
    formula, counted = geometry_of(config), Geometry(**counts_of(config))
    assert shapes(formula.linears) == shapes(counted.linears)
    for double_quant in (True, False):
        assert formula.nf4_bytes(double_quant) == counted.nf4_bytes(double_quant)
    assert formula.active_parameters() == counted.active_parameters()
    # Some formulas group what is shaped alike; the numbers and names are what the planner reads.
    same = (
        "hidden_size num_layers num_attention_heads head_dim vocab_size max_position_embeddings embedding_width tied "
        "embedding_parameters head_parameters other_parameters float32_in_bfloat16 float32_in_float16"
    )
    for field in same.split():
        assert getattr(formula, field) == getattr(counted, field), field
    assert formula.lora_parameters(7) == counted.lora_parameters(7)
    assert formula.lora_parameters(7, ["lm_head"]) == counted.lora_parameters(7, ["lm_head"])


def test_a_model_without_attention_heads_is_planned():
    geometry = geometry_of({"model_type": "mamba2", "num_hidden_layers": 2})
    assert geometry.num_attention_heads == geometry.head_dim == 0
    lora = Lora(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
    terms = memory_terms(geometry, lora, Step(512, 512, 2), double_quant=True)
    assert all(size > 0 for name, size in terms.items() if name not in ("evaluation", "loss_tile")), terms
    # Its kernels read the weight of out_proj themselves.
    with pytest.raises(UserInputError, match=r"out_proj cannot have LoRA \(a Mamba kernel"):
        geometry.lora_parameters(8, ["out_proj"])
    assert geometry.lora_parameters(8) == geometry.lora_parameters(8, ["in_proj"])


def test_a_layer_of_experts_that_no_machine_would_allocate_is_counted():
    """DeepSeek-V3 at its released size: 671,026,419,200 numbers, of which the routers' corrections are buffers."""
    geometry = geometry_of({"model_type": "deepseek_v3"})
    assert geometry.parameters() == 671_026_419_200 - 58 * 256
    assert 0.05 < geometry.active_parameters() / geometry.quantized_parameters() < 0.06
    # Its routers stay in float32: 58 layers of 256 experts.
    assert geometry.float32_in_bfloat16 == 58 * 256 * 7168
    lora = Lora(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
    terms = memory_terms(geometry, lora, Step(512, 0, 61), double_quant=True)
    assert terms["weights_not_quantized"] == 2 * geometry.unquantized_parameters() + 2 * geometry.float32_in_bfloat16


SMALL = {"vocab_size": 260, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MAMBA = {"vocab_size": 260, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16}


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt2", "vocab_size": 260, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 0},
        {"model_type": "olmo2", **SMALL, "intermediate_size": 100, "pad_token_id": 0},
        {"model_type": "granite", **SMALL, "intermediate_size": 100, "tie_word_embeddings": True},
        {"model_type": "mamba2", **MAMBA, "num_heads": 8, "head_dim": 16, "n_groups": 2},
        {"model_type": "mamba", **MAMBA, "time_step_rank": 4},
    ],
    ids=lambda config: config["model_type"],
)
def test_a_family_without_a_formula_is_counted_on_the_meta_device(config, tmp_path):
    """As it is loaded: GPT-2 has linear layers of a class of its own, and some are tied."""
    assert config["model_type"] not in FAMILIES
    geometry = geometry_of(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert geometry.parameters() == model.num_parameters()
    model.save_pretrained(tmp_path)
    loaded = load_nf4_base(str(tmp_path), device=CPU, compute_dtype=torch.float32)
    weights = [module.weight for module in loaded.modules() if isinstance(module, Linear4bit)]
    assert geometry.nf4_bytes() == sum(map(stored_bytes, weights))
    others = {id(p): p.numel() for p in loaded.parameters() if not isinstance(p, Params4bit)}
    assert geometry.unquantized_parameters() == sum(others.values())
    adapted = add_adapters(loaded, LoraConfig(r=4, target_modules="all-linear"))
    assert geometry.lora_parameters(4) == count_trainable(adapted)


@pytest.mark.parametrize("config", [{"model_type": "t5"}, {"model_type": "nobodys"}, {}])
def test_other_model_types_are_refused(config):
    with pytest.raises(UserInputError) as caught:
        geometry_of(config)
    message = str(caught.value)
    assert message.startswith("model.name_or_path: ") and repr(config.get("model_type")) in message


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", "4096"), ("num_hidden_layers", 0), ("vocab_size", None), ("hidden_size", True), ("mlp_bias", 1)],
)
def test_a_key_without_a_usable_value_is_refused(key, value):
    with pytest.raises(
        UserInputError, match=rf"model.name_or_path: {key} in its config.json must be .*, got {value!r}"
    ):
        geometry_of({"model_type": "llama", key: value})


def test_counting_needs_no_torch():
    code = (
        "import sys; from qlora_neft.fit.geometry import geometry_of, shipped_config;"
        "geometry_of(shipped_config('microsoft/phi-2')).lora_parameters(8);"
        "print([name for name in ('torch', 'transformers', 'numpy', 'peft') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
