"""QLoRA and NEFTune work alike on every architecture we name, tied embeddings and stored NF4 included."""

from __future__ import annotations

import math

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from noise_probe import NoiseProbe
from peft import PeftModel
from tiny import ARCHITECTURES, WIDTH, adapter_weights, losses, rows_of_lengths, save_tiny_model, tiny_trainer
from transformers import AutoConfig, BitsAndBytesConfig

from qlora_neft.base.nf4 import frozen_fingerprints, load_nf4_base
from qlora_neft.errors import UserInputError
from qlora_neft.trainer import QLoRANeftTrainer

ROWS = rows_of_lengths([30, 12, 40, 20], seed=6)
STEP = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_architecture_trains_with_published_noise_and_a_frozen_base(architecture_dir, tmp_path, architecture):
    trainer = tiny_trainer(architecture_dir(architecture), tmp_path, ROWS, **STEP)
    linears = [m for name, m in trainer.model.named_modules() if isinstance(m, Linear4bit)]
    assert len(linears) >= 2 * 4
    head, embedding = trainer.model.get_output_embeddings(), trainer.model.get_input_embeddings()
    assert not isinstance(head.weight, Params4bit) and not isinstance(embedding.weight, Params4bit)
    before, adapters = frozen_fingerprints(trainer.model), adapter_weights(trainer)
    assert adapters and all(weight.dtype == torch.float32 for weight in adapters.values())

    probe = NoiseProbe(trainer)
    trainer.train()
    for ids, (drawn, *_) in probe.by_sequence(ROWS).items():
        bound = 5.0 / math.sqrt(len(ids) * WIDTH)
        assert 0.97 * bound < drawn.abs().max() <= bound * (1 + 1e-3)
    assert all(math.isfinite(loss) for loss in losses(trainer)) and len(losses(trainer)) == 2
    assert frozen_fingerprints(trainer.model) == before
    moved = [name for name, weight in adapter_weights(trainer).items() if not torch.equal(weight, adapters[name])]
    assert len(moved) == len(adapters)


def test_the_trainer_loads_quantizes_and_adapts_by_itself(llama, tmp_path):
    """Only a directory and rows are given: NF4 with double quantization, LoRA r 64 with QLoRA's defaults."""
    from tiny import tiny_config

    trainer = QLoRANeftTrainer(str(llama), tiny_config(tmp_path), train_dataset=ROWS)
    assert isinstance(trainer.model, PeftModel)
    config = trainer.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (64, 16, 0.1)
    layer = next(m for m in trainer.model.modules() if isinstance(m, Linear4bit))
    state = layer.weight.quant_state
    assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)
    adapted = {name.split(".")[-1] for name, m in trainer.model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_checkpoint_stored_in_nf4_is_the_same_base(llama, tmp_path):
    stored = tmp_path / "nf4"
    cpu = torch.device("cpu")
    load_nf4_base(str(llama), device=cpu, compute_dtype=torch.float32).save_pretrained(stored)
    assert AutoConfig.from_pretrained(stored).quantization_config["bnb_4bit_quant_type"] == "nf4"
    from tiny import byte_tokenizer

    byte_tokenizer().save_pretrained(stored)
    runs = [tiny_trainer(path, tmp_path / "out", ROWS, **STEP) for path in (llama, stored)]
    for trainer in runs:
        trainer.train()
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-6)


def test_nf4_bytes_do_not_depend_on_the_compute_dtype(llama, tmp_path):
    """Weights are quantized from the dtype they are stored in, so that every machine trains on the same base."""
    cpu = torch.device("cpu")
    bases = [load_nf4_base(str(llama), device=cpu, compute_dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    prints = [{name: digest for name, digest in frozen_prints(base).items() if "_proj" in name} for base in bases]
    assert prints[0] == prints[1] and len(prints[0]) == 14
    assert bases[1].model.norm.weight.dtype == torch.bfloat16


def frozen_prints(model):
    for param in model.parameters():
        param.requires_grad_(False)
    return frozen_fingerprints(model)


def test_quantization_config_peft_config_and_a_ready_model_override_the_defaults(llama, tmp_path):
    from tiny import byte_tokenizer, tiny_lora

    single = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False, bnb_4bit_compute_dtype="float32"
    )
    trainer = tiny_trainer(llama, tmp_path, ROWS, quantization_config=single, peft_config=tiny_lora(r=3))
    assert not next(m for m in trainer.model.modules() if isinstance(m, Linear4bit)).weight.quant_state.nested
    assert trainer.model.peft_config["default"].r == 3

    base = load_nf4_base(str(llama), device=torch.device("cpu"), compute_dtype=torch.float32)
    ready = tiny_trainer(base, tmp_path, ROWS, peft_config=tiny_lora(r=5), processing_class=byte_tokenizer())
    assert ready.model.get_base_model() is base and ready.model.peft_config["default"].r == 5


def test_a_base_quantized_another_way_is_refused(llama, tmp_path):
    fp4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    config = AutoConfig.from_pretrained(llama)
    config.quantization_config = fp4.to_dict()
    config.save_pretrained(tmp_path / "fp4")
    with pytest.raises(UserInputError, match=r"model.name_or_path: the base must be unquantized or stored in .* NF4"):
        load_nf4_base(str(tmp_path / "fp4"), device=torch.device("cpu"), compute_dtype=torch.float32)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    from tiny import byte_tokenizer

    folder = save_tiny_model(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserInputError, match="has no end token"):
        tiny_trainer(folder, tmp_path, ROWS)


def test_a_width_that_is_no_multiple_of_32_survives_evaluation(tmp_path):
    """On CPUs with AVX512-BF16 bitsandbytes would repack the base at the first evaluation, and fail on this width."""
    folder = save_tiny_model(tmp_path / "model", intermediate_size=172)
    trainer = tiny_trainer(folder, tmp_path / "out", ROWS, eval_dataset=ROWS, eval_strategy="steps", eval_steps=1)
    before = frozen_fingerprints(trainer.model)
    trainer.train()
    assert frozen_fingerprints(trainer.model) == before
