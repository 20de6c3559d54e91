"""The fast path on a CUDA device: operations, masks, gradients, trajectories. Run with: pytest -m gpu"""

from __future__ import annotations

import gc

import pytest
import torch
from gpu_device import DEVICE, ON_DEVICE, needs_bf16, needs_cuda, needs_device
from peft import LoraConfig, get_peft_model
from tiny import adapter_weights, gradient_norms, losses, max_difference, mixed_rows, tiny_trainer
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.bases import adapters, make_tokenizer, nf4_base, set_adapters
from benchmarks.gpu.meters import Gradients, gradient_error, kept_gradients
from qlora_neft.base.nf4 import from_nf4, frozen_fingerprints, to_nf4
from qlora_neft.fused import kernel_check, ops, triton_ops
from qlora_neft.fused.linear import weight_gradient
from qlora_neft.fused.masks import Mask, Places, forget_last_mask, kept_by_tensors, threshold_of
from qlora_neft.steps.sequences import SequenceSpan

pytestmark = [pytest.mark.gpu, needs_device]

# Wide enough for several blocks of every kernel, and an inner width that fills none of them.
SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
ROWS = mixed_rows(16, seed=5)
STEP = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "max_steps": 1, "max_grad_norm": 1e9}
BLOCKS = {0, 1, 2}


# ---- Operations ----


@needs_cuda
def test_every_triton_kernel_computes_here_what_its_plain_version_does():
    assert kernel_check.failures(torch.device("cuda", torch.cuda.current_device()), torch.float32) == {}


@needs_cuda
@pytest.mark.parametrize("features", [2048, 11008])
def test_a_gpu_keeps_what_a_cpu_keeps_bit_for_bit(features):
    # Two sequences with padding between, the second far into a step; sizes of Llama-2-7B.
    spans = [SequenceSpan(0, slice(0, 300), 300, 0), SequenceSpan(0, slice(310, 512), 202, 2**17)]
    mask = Mask(Places.of(spans, (1, 512), seed=2**40 + 3, step=11), module=223, threshold=threshold_of(0.1))
    expected = mask.kept(features, torch.float32, torch.device("cpu")).bool()
    assert expected[300:310].sum() == 0
    assert torch.equal(kept_by_tensors(mask, features, DEVICE).cpu(), expected)
    ones = torch.ones(512, features, device=DEVICE, dtype=torch.bfloat16)
    assert torch.equal(triton_ops.dropped(ones, mask).bool().cpu(), expected)
    total = torch.zeros_like(ones)
    assert torch.equal(triton_ops.add_dropped_(total, ones, mask).bool().cpu(), expected)
    forget_last_mask()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_weight_is_unpacked_as_bitsandbytes_does_it_bit_for_bit(dtype, double_quant):
    import bitsandbytes as bnb

    # No multiple of 64, which bitsandbytes unpacks wrongly on a CPU: see `qlora_neft.base.unpack`.
    width = 688 if DEVICE.type == "cuda" else 704
    layer = bnb.nn.Linear4bit(width, 250, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.weight = to_nf4(torch.randn(250, width, generator=torch.Generator().manual_seed(0)), double_quant)
    layer = layer.to(DEVICE)
    layer.weight.quant_state.dtype = dtype
    expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(ops.ONE_KERNEL["dequantized"](layer, dtype), expected)
    if DEVICE.type == "cuda":
        assert torch.equal(triton_ops.dequantized(layer, dtype), expected)
        # Larger, then this one again: it lies in the memory of the larger one.
        ops.WEIGHTS.of(torch.Size((1000, 1000)), dtype, layer.weight.device).fill_(float("nan"))
        assert torch.equal(triton_ops.dequantized(layer, dtype), expected)
    ops.WEIGHTS.clear()


@needs_bf16
@pytest.mark.parametrize("tokens", [1, 37, 512])
def test_a_weight_gradient_of_16_bit_numbers_is_summed_and_returned_in_float32(tokens):
    generator = torch.Generator().manual_seed(1)
    grad, x = (torch.randn(tokens, width, generator=generator).to(DEVICE, torch.bfloat16) for width in (8, 250))
    found = weight_gradient(grad, x)
    expected = grad.double().t() @ x.double()
    limit = 1e-5 if DEVICE.type == "cuda" else 1e-2  # a CPU rounds the result
    assert DEVICE.type == "cpu" or found.dtype == torch.float32
    assert (found.double() - expected).norm() / expected.norm() < limit


# ---- Gradients, weight by weight, against float64 ----


@pytest.fixture(scope="module")
def reference():
    """Loss and LoRA gradients of one step in float64: plain modules on dequantized weights, one sequence at a time."""
    base = nf4_base(SIZES, DEVICE, torch.float32)
    plain = LlamaForCausalLM(LlamaConfig(**SIZES)).to(DEVICE, torch.float64)
    with torch.no_grad():
        for to, of in zip(plain.parameters(), base.parameters(), strict=True):
            to.copy_(from_nf4(of) if hasattr(of, "quant_state") else of)
    model = get_peft_model(plain, LoraConfig(**LORA), autocast_adapter_dtype=False).double().train()
    set_adapters_of(model)
    labelled = sum(label != -100 for row in ROWS for label in row["labels"][1:])
    total = 0.0
    for row in ROWS:
        ids, labels = (torch.tensor([row[key]], device=DEVICE) for key in ("input_ids", "labels"))  # (1, L)
        logits = model(input_ids=ids).logits[0, :-1]  # (L - 1, V)
        loss = cross_entropy(logits, labels[0, 1:], reduction="sum") / labelled
        loss.backward()
        total += loss.item()
    return total, kept_gradients(model, BLOCKS)


def set_adapters_of(model):
    """The float32 values that `set_adapters` draws, in the model's own dtype."""
    kept = {name: parameter.dtype for name, parameter in adapters(model)}
    for _, parameter in adapters(model):
        parameter.data = parameter.data.float()
    set_adapters(model)
    for name, parameter in adapters(model):
        parameter.data = parameter.data.to(kept[name])


def one_step(tmp_path, dtype=torch.float32, **overrides):
    """Loss and gradients of one step without noise and dropout; gradients before the optimizer has moved anything."""
    formats = {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
    base = nf4_base(SIZES, DEVICE, dtype)
    trainer = tiny_trainer(
        base,
        tmp_path,
        ROWS,
        **{**ON_DEVICE, **formats, **STEP, "neftune_noise_alpha": None, **overrides},
        peft_config=LoraConfig(**LORA),
        processing_class=make_tokenizer(),
    )
    set_adapters(trainer.model)
    gradients = Gradients(BLOCKS)
    trainer.add_callback(gradients)
    trainer.train()
    return losses(trainer)[0], gradients.kept


LAYOUTS = {
    "padded": {"padding_free": False},
    "flattened": {"padding_free": True, "attn_implementation": "per_sequence"},
    "small micro-batches": {"padding_free": True, "attn_implementation": "per_sequence", "micro_batch_size": 3},
    "all checkpointed": {"padding_free": True, "attn_implementation": "per_sequence", "checkpointed_blocks": 3},
    "one checkpointed": {"padding_free": False, "checkpointed_blocks": 1},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_float32_are_those_of_float64(reference, layout, tmp_path):
    loss, gradients = one_step(tmp_path, **LAYOUTS[layout])
    error = gradient_error(gradients, reference[1])
    assert loss == pytest.approx(reference[0], rel=1e-6)
    assert error["worst_gradient_error"] < 1e-5, error["worst_weight"]


@needs_bf16
@pytest.mark.parametrize("layout", ["padded", "flattened", "all checkpointed"])
def test_gradients_in_bf16_are_no_worse_than_without_the_fast_path(reference, layout, tmp_path):
    _, fused = one_step(tmp_path, torch.bfloat16, **LAYOUTS[layout])
    _, plain = one_step(tmp_path, torch.bfloat16, **{**LAYOUTS[layout], "fused_lora": False})
    found, usual = (gradient_error(gradients, reference[1]) for gradients in (fused, plain))
    assert found["gradient_error"] < 1.1 * usual["gradient_error"] + 1e-3
    assert found["worst_gradient_error"] < 1.5 * usual["worst_gradient_error"] + 1e-3, found["worst_weight"]
    assert found["gradient_error"] < 0.05


@needs_cuda
@needs_bf16
def test_varlen_attention_trains_as_padded_rows_do(reference, tmp_path):
    loss, flat = one_step(tmp_path, torch.bfloat16, padding_free=True, attn_implementation="varlen")
    _, padded = one_step(tmp_path, torch.bfloat16, padding_free=False)
    found, usual = (gradient_error(gradients, reference[1]) for gradients in (flat, padded))
    assert loss == pytest.approx(reference[0], rel=2e-3)
    assert found["gradient_error"] < 1.2 * usual["gradient_error"] + 1e-3


@needs_cuda
def test_gradients_in_fp16_with_the_scaler_are_close_as_well(reference, tmp_path):
    # The scaler's first steps may overflow and be skipped: their gradients are scaled, and not compared.
    base = nf4_base(SIZES, DEVICE, torch.float16)
    settings = {**ON_DEVICE, **STEP, "fp16": True, "max_steps": 8, "learning_rate": 1e-3}
    trainer = tiny_trainer(
        base,
        tmp_path,
        mixed_rows(128, seed=5),
        **settings,
        peft_config=LoraConfig(**LORA),
        processing_class=make_tokenizer(),
    )
    before = frozen_fingerprints(trainer.model)
    trainer.train()
    assert all(torch.isfinite(torch.tensor(losses(trainer))))
    assert any(norm > 0 for norm in gradient_norms(trainer) if norm == norm)
    assert {weight.dtype for weight in adapter_weights(trainer).values()} == {torch.float32}
    assert frozen_fingerprints(trainer.model) == before


# ---- Trajectories, with noise and dropout ----


def trained(llama, tmp_path, **overrides):
    settings = {**ON_DEVICE, "lora_dropout": 0.1, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    trainer = tiny_trainer(llama, tmp_path, mixed_rows(48, seed=11), **{**settings, **overrides})
    trainer.train()
    return trainer


def test_a_gpu_and_a_cpu_train_alike_with_noise_and_dropout(llama, tmp_path):
    here = trained(llama, tmp_path)
    there = trained(llama, tmp_path, use_cpu=True)
    assert losses(here) == pytest.approx(losses(there), rel=1e-4)


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("rows", [1, 5])
def test_dropout_belongs_to_the_sequence_however_a_step_is_split(llama, tmp_path, rows, padding_free):
    whole = trained(llama, tmp_path, padding_free=False)
    split = trained(llama, tmp_path, micro_batch_size=rows, padding_free=padding_free)
    assert losses(whole) == pytest.approx(losses(split), rel=1e-4)
    assert gradient_norms(whole) == pytest.approx(gradient_norms(split), rel=1e-3)


def test_the_fast_path_and_the_modules_own_train_alike_with_dropout(llama, tmp_path):
    fused, own = (trained(llama, tmp_path, fused_lora=on) for on in (True, False))
    assert fused.fast_path.num_fused > 0
    assert losses(fused) == pytest.approx(losses(own), rel=1e-4)
    assert max_difference(adapter_weights(fused), adapter_weights(own)) < 1e-3


def test_nothing_is_left_on_the_device_when_a_trainer_is_gone(llama, tmp_path):
    if DEVICE.type != "cuda":
        pytest.skip("a CPU's memory is not counted")

    def held() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    trained(llama, tmp_path, max_steps=1)  # whatever is made once is made here
    before = held()
    trained(llama, tmp_path, max_steps=2)
    assert held() - before < 1_000_000
