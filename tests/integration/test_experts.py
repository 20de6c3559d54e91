"""Mixtures of experts: the experts in NF4 and with LoRA, against transformers' and PEFT's own in float64."""

from __future__ import annotations

import math

import pytest
import torch
from moe import FAMILIES, reference, save_moe
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tiny import adapter_weights, byte_tokenizer, losses, max_difference, rows_of_lengths, tiny_lora, tiny_trainer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from qlora_neft.adapter.folder import find_adapter
from qlora_neft.adapter.load import with_adapter
from qlora_neft.base.census import census
from qlora_neft.base.checkpoint import skeleton
from qlora_neft.base.config import check_base_config
from qlora_neft.base.experts import expert_modules
from qlora_neft.base.lora import add_adapters, count_trainable
from qlora_neft.base.nf4 import frozen_fingerprints, load_nf4_base, nf4_config, to_nf4
from qlora_neft.base.quantizer import in_nf4
from qlora_neft.errors import UserInputError
from qlora_neft.export.abilities import facts_of
from qlora_neft.export.consumers import verdict_for
from qlora_neft.export.merge.merge import merge_adapter
from qlora_neft.export.merge.plan import plan_merge
from qlora_neft.fit.geometry import geometry_of
from qlora_neft.recipe.schema import Quantization
from qlora_neft.run_folder.checkpoints import save_adapter
from qlora_neft.trainer.router_loss import RouterLoss

CPU = torch.device("cpu")
ROWS = rows_of_lengths([30, 12, 40, 20], seed=6)
IDS = torch.arange(40).reshape(2, 20) * 5 % 256  # (B, T)
STEP = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 2}


@pytest.fixture(scope="session")
def moe_dir(tmp_path_factory):
    made = {}

    def get(family):
        if family not in made:
            made[family] = save_moe(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get


def loaded(folder, double_quant=True):
    config = nf4_config(Quantization(bnb_4bit_use_double_quant=double_quant), torch.float32)
    return load_nf4_base(str(folder), device=CPU, compute_dtype=torch.float32, quantization_config=config).eval()


def stir(model):
    """Give B, which begins at zero, values, so that A has a gradient."""
    torch.manual_seed(1)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.05)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_peft_in_float64(moe_dir, family):
    """Forward and LoRA gradients on packed experts, beside PEFT's own adapter on the values they stand for."""
    base = loaded(moe_dir(family))
    exact = reference(moe_dir(family), base)
    stable = family in ("mixtral", "gpt_oss")  # lora_alpha over the root of r
    model = stir(add_adapters(base, tiny_lora(r=3, use_rslora=stable)))
    config = model.peft_config["default"]
    plain = LoraConfig(
        r=3, lora_alpha=16, use_rslora=stable, target_modules=config.target_modules, task_type="CAUSAL_LM"
    )
    plain.target_parameters = config.target_parameters
    twin = add_adapters(exact, plain).double()
    twin.load_state_dict({name: value for name, value in model.state_dict().items() if "lora_" in name}, strict=False)

    for one in (model, twin):
        one(input_ids=IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        assert (model(IDS).logits - twin(IDS).logits).abs().max() < 1e-5
    grads = [{n: p.grad for n, p in one.named_parameters() if p.requires_grad} for one in (model, twin)]
    assert grads[0].keys() == grads[1].keys() and any("experts" in name for name in grads[0])
    for name, grad in grads[0].items():
        assert (grad - grads[1][name]).abs().max() < 1e-5 * max(1.0, grads[1][name].abs().max().item()), name


@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_every_expert_has_the_bytes_of_a_layer_of_its_own(moe_dir, family, double_quant):
    base = loaded(moe_dir(family), double_quant)
    stored = dict(expert_modules(AutoModelForCausalLM.from_pretrained(moe_dir(family))))
    for name, experts in expert_modules(base):
        for stack in experts.weight_names():
            for expert, matrix in enumerate(getattr(stored[name], stack)):
                alone, state = to_nf4(matrix.detach().clone(), double_quant), experts.state(stack, expert)
                assert torch.equal(getattr(experts, stack)[expert], alone.data.reshape(-1))
                assert torch.equal(state.absmax, alone.quant_state.absmax)
                if double_quant:
                    assert torch.equal(state.offset, alone.quant_state.offset)
                    assert torch.equal(state.state2.absmax, alone.quant_state.state2.absmax)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_is_counted_before_and_after_it_is_loaded(moe_dir, family):
    """The skeleton on the meta device, the planner and the loaded model agree on every count."""
    base = loaded(moe_dir(family))
    empty = in_nf4(skeleton(check_base_config(str(moe_dir(family)))), nf4_config(Quantization(), torch.float32))
    geometry = geometry_of(check_base_config(str(moe_dir(family))).to_dict())
    assert geometry.quantized_parameters() == census(base).nf4_weights == census(empty).nf4_weights
    assert census(base).kept == census(empty).kept
    models = [add_adapters(model, tiny_lora(r=4, lora_dropout=0.1)) for model in (base, empty)]
    found = census(models[0])
    assert found == census(models[1])
    assert found.nf4_share > 0.95 and found.adapted_layers == found.linear_layers and not found.without_lora
    assert found.routers and not any("gate." in n for n, p in models[0].named_parameters() if p.requires_grad)
    assert geometry.lora_parameters(4) == count_trainable(models[0]) == found.trained


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_mixture_trains_with_dropout_and_held_out_rows_and_is_loaded_elsewhere(moe_dir, tmp_path, family):
    folder = moe_dir(family)
    trainer = tiny_trainer(
        folder, tmp_path, ROWS, **STEP, lora_dropout=0.1, eval_dataset=ROWS, eval_strategy="steps", eval_steps=1
    )
    before, start = frozen_fingerprints(trainer.model), adapter_weights(trainer)
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer))
    assert frozen_fingerprints(trainer.model) == before
    moved = adapter_weights(trainer)
    assert all(not torch.equal(moved[name], start[name]) for name in start)
    assert trainer.census.nf4_share > 0.95 and trainer.census.reached_share == 1.0

    trainer.save_model(str(tmp_path / "adapter"))
    model = trainer.model.eval()
    with torch.no_grad():
        answer = model(IDS).logits
        assert model.generate(IDS[:1], max_new_tokens=3).shape[1] > IDS.shape[1]  # with a cache
        ours = with_adapter(loaded(folder), find_adapter(tmp_path / "adapter", base=str(folder)))
        assert (ours(IDS).logits - answer).abs().max() < 1e-5  # the trainer's model has norms in fewer passes
        elsewhere = PeftModel.from_pretrained(reference(folder, loaded(folder), torch.float32), tmp_path / "adapter")
        assert (elsewhere.eval()(IDS).logits - answer).abs().max() < 1e-5


@pytest.mark.parametrize("coefficient", [None, 0.5])
def test_micro_batches_change_nothing_with_and_without_a_router_loss(moe_dir, tmp_path, coefficient):
    def run(rows, **others):
        count = {
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": 4 // rows,
            "max_steps": 2,
            "optim": "sgd",  # Adam makes as much of a gradient that is nothing but rounding as of any other
            "learning_rate": 1.0,
        }
        options = {**count, "router_aux_loss_coef": coefficient, **others}
        trainer = tiny_trainer(moe_dir("mixtral"), tmp_path, ROWS, lora_dropout=0.1, **options)
        trainer.train()
        return trainer

    whole = run(4)
    for other in (run(1), run(2, gradient_checkpointing=True)):
        assert max_difference(adapter_weights(whole), adapter_weights(other)) < 2e-5
        assert losses(other) == pytest.approx(losses(whole), rel=1e-6)
    assert whole.model.config.output_router_logits is False
    assert all(("router_loss" in entry) == (coefficient is not None) for entry in whole.state.log_history[:2])


def test_the_router_loss_of_one_micro_batch_is_transformers_own(moe_dir):
    base = loaded(moe_dir("mixtral"))
    mask = torch.ones_like(IDS)
    mask[0, 15:] = 0
    loss = RouterLoss(base, 0.5)
    with loss.captured() as logits:
        base(input_ids=IDS, attention_mask=mask)
    loss.begin()
    loss.count(logits, mask)
    expected = load_balancing_loss_func(tuple(logits), 6, 2, mask)
    assert float(loss.of(logits, mask)) == pytest.approx(0.5 * float(expected), rel=1e-6)


def test_a_router_loss_is_refused_where_there_is_none(moe_dir, llama, tmp_path):
    for folder in (llama, moe_dir("deepseek_v3")):
        with pytest.raises(UserInputError, match=r"router_aux_loss_coef: .* has no load-balancing loss"):
            tiny_trainer(folder, tmp_path, ROWS, router_aux_loss_coef=0.1)


def test_named_targets_reach_experts_by_the_names_of_their_projections(moe_dir):
    base = loaded(moe_dir("mixtral"))
    model = add_adapters(base, tiny_lora(target_modules=["q_proj", "w1", "w3"]))
    names = {name for name, param in model.named_parameters() if param.requires_grad}
    assert {name.split("layers.0.")[1].split(".lora")[0] for name in names if "layers.0." in name} == {
        "self_attn.q_proj",
        "mlp.experts",
    }
    with pytest.raises(UserInputError, match=r"lora.target_modules: names gate_proj without up_proj"):
        add_adapters(loaded(moe_dir("mixtral")), tiny_lora(target_modules=["gate_proj"]))


def test_a_base_that_is_called_nf4_and_is_not_is_refused(moe_dir, tmp_path):
    """bitsandbytes itself leaves experts in 16 bits: a model that somebody else loaded is counted as well."""
    half = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    options = {"device_map": {"": "cpu"}, "quantization_config": half}
    base = AutoModelForCausalLM.from_pretrained(moe_dir("mixtral"), **options)
    with pytest.raises(UserInputError, match=r"min_nf4_share: at least 90% .* are\. In 16 bits: .*MixtralExperts"):
        tiny_trainer(base, tmp_path, ROWS)
    base = AutoModelForCausalLM.from_pretrained(moe_dir("mixtral"), **options)
    trainer = tiny_trainer(base, tmp_path, ROWS, min_nf4_share=0.05)
    assert 0.05 < trainer.census.nf4_share < 0.9


def test_linear_layers_of_another_class_are_quantized_too(tmp_path):
    import transformers
    from tiny import SIZES

    sizes = {key: value for key, value in SIZES.items() if key not in ("head_dim", "num_key_value_heads")}
    config = transformers.FalconConfig(**sizes, num_kv_heads=2, new_decoder_architecture=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "falcon")
    byte_tokenizer().save_pretrained(tmp_path / "falcon")
    trainer = tiny_trainer(tmp_path / "falcon", tmp_path, ROWS, **STEP)
    assert trainer.census.nf4_share > 0.95 and trainer.census.adapted_layers == 8
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "deepseek_v3", "llama4_text"])
def test_a_merged_mixture_is_base_and_adapter_in_the_layout_of_its_checkpoint(moe_dir, tmp_path, family):
    folder = moe_dir(family)
    model = stir(add_adapters(loaded(folder), tiny_lora(r=3)))
    save_adapter(model, byte_tokenizer(), tmp_path / "adapter")
    adapter = find_adapter(tmp_path / "adapter", base=str(folder))
    plan = plan_merge(adapter, dtype="float32")
    merge_adapter(plan, tmp_path / "merged", byte_tokenizer(), None, max_shard_bytes=10**9, say=lambda line: None)

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert (merged(IDS).logits - model.eval()(IDS).logits).abs().max() < 1e-5
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    facts = facts_of(adapter)
    assert facts.rank == 3
    # One answer: it merges, and nothing else is advised that was not tried with experts.
    assert facts.abilities.merge is None
    assert facts.abilities.adapter_gguf and "gguf does not write" in facts.abilities.merged_gguf
    vllm, peft = verdict_for("vllm", facts), verdict_for("peft", facts)
    assert not vllm.is_usable and vllm.remedy.startswith("qlora-neft merge ") and peft.is_usable
    assert ["not verified with LoRA on experts" in reason for reason in vllm.reasons] == [True]
    assert not verdict_for("llama.cpp", facts).is_usable and not verdict_for("ollama", facts).is_usable
    with pytest.raises(UserInputError, match="has experts, for which no format in NF4 exists"):
        plan_merge(adapter, "nf4")
