"""Invariants 1, 3, 4 and 9: what the machine decides leaves the trajectory and the base alone."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from tiny import (
    adapter_weights,
    gradient_norms,
    losses,
    max_difference,
    mixed_rows,
    tiny_config,
    tiny_lora,
    tiny_trainer,
)
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from qlora_neft.base.nf4 import base_fingerprint, frozen_fingerprints, keep_nf4_layout, load_nf4_base, nf4_config
from qlora_neft.recipe.schema import Quantization

ROWS = mixed_rows(32, seed=11)
STEP_OF_16 = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}


def trained(model, tmp_path, **overrides):
    trainer = tiny_trainer(model, tmp_path, ROWS, **overrides)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory):
    """Steps of 16 in one piece."""
    return trained(llama, tmp_path_factory.mktemp("whole"), **STEP_OF_16)


def assert_one_trajectory(a, b, atol=1e-5):
    assert losses(a) == pytest.approx(losses(b), rel=1e-5)
    assert gradient_norms(a) == pytest.approx(gradient_norms(b), rel=1e-4)
    assert max_difference(adapter_weights(a), adapter_weights(b)) < atol


def test_alpha_zero_is_no_noise_bit_for_bit(llama, tmp_path):
    off = trained(llama, tmp_path, neftune_noise_alpha=None, lora_dropout=0.1)
    zero = trained(llama, tmp_path, neftune_noise_alpha=0.0, lora_dropout=0.1)
    assert losses(off) == losses(zero)
    assert max_difference(adapter_weights(off), adapter_weights(zero)) == 0


def test_without_noise_and_dropout_it_is_plain_sft_trainer(llama, tmp_path):
    ours = trained(llama, tmp_path, neftune_noise_alpha=0.0)
    args = tiny_config(tmp_path)
    plain_args = SFTConfig(
        **{
            name: getattr(args, name)
            for name in (
                "output_dir use_cpu max_steps per_device_train_batch_size gradient_accumulation_steps learning_rate "
                "lr_scheduler_type logging_steps max_length save_strategy report_to disable_tqdm seed "
                "dataloader_pin_memory"
            ).split()
        },
        bf16=False,
    )
    base = load_nf4_base(str(llama), device=torch.device("cpu"), compute_dtype=torch.float32)
    keep_nf4_layout(base)
    set_seed(plain_args.seed)
    model = get_peft_model(base, tiny_lora())
    before_cast = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    from tiny import byte_tokenizer

    plain = SFTTrainer(model, plain_args, train_dataset=ROWS, processing_class=byte_tokenizer())
    for name, param in plain.model.named_parameters():
        if name in before_cast:
            assert param.dtype == torch.bfloat16  # the day this fails, our workaround can go
            param.data = before_cast[name]
    plain.train()
    assert_one_trajectory(ours, plain)


SPLITS = {
    "1x16": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16},
    "4x4": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "by tokens": {**STEP_OF_16, "max_tokens_per_micro_batch": 100},
    "flattened by tokens": {**STEP_OF_16, "max_tokens_per_micro_batch": 100, "padding_free": True},
    "flattened": {**STEP_OF_16, "padding_free": True},
    "flattened under masks": {**STEP_OF_16, "padding_free": True, "attn_implementation": "sdpa"},
    "flattened and recomputed": {**STEP_OF_16, "padding_free": True, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
def test_effective_batch_of_16_is_one_trajectory_however_it_is_split(llama, tmp_path, whole, split):
    assert_one_trajectory(whole, trained(llama, tmp_path, **split))


def test_noise_changes_the_trajectory(llama, tmp_path):
    """The tests above would pass if noise did nothing."""
    off = trained(llama, tmp_path, neftune_noise_alpha=None)
    on = trained(llama, tmp_path)
    assert max_difference(adapter_weights(off), adapter_weights(on)) > 1e-4


def test_checkpointing_none_some_or_all_blocks_is_one_trajectory(llama, tmp_path):
    blocks = {count: trained(llama, tmp_path, checkpointed_blocks=count, lora_dropout=0.1) for count in (0, 1, 2)}
    recomputing = {
        count: sum(getattr(m, "gradient_checkpointing", False) for m in t.model.get_base_model().model.layers)
        for count, t in blocks.items()
    }
    assert recomputing == {0: 0, 1: 1, 2: 2}
    for other in (1, 2):
        assert_one_trajectory(blocks[0], blocks[other], atol=1e-6)


PIECES = {
    "upstream's norms": {"fused_norms": False},
    "upstream's rotary embeddings": {"fused_rotary": False},
    "compiled blocks": {"compile_blocks": True, "lora_dropout": 0.1, "max_steps": 1},
}


@pytest.mark.parametrize(
    "piece",
    [
        pytest.param(piece, id=name, marks=pytest.mark.slow if "compile_blocks" in piece else ())
        for name, piece in PIECES.items()
    ],
)
def test_the_pieces_of_the_fast_path_leave_the_trajectory_alone(llama, tmp_path, monkeypatch, piece):
    # TorchDynamo's part of compiling is what could go wrong: graphs, guards, breaks. The code behind it is torch's.
    monkeypatch.setattr("qlora_neft.fused.pieces.COMPILER", "eager")
    same = {"lora_dropout": 0.0, "max_steps": 3, "clean_loss_steps": 0, **STEP_OF_16, **piece}
    without = trained(llama, tmp_path, **{**same, "fused_norms": True, "fused_rotary": True, "compile_blocks": False})
    assert_one_trajectory(without, trained(llama, tmp_path, **same))


def test_the_base_is_identical_before_and_after_training_with_evaluation(llama, tmp_path):
    trainer = tiny_trainer(llama, tmp_path, ROWS, eval_dataset=mixed_rows(4), eval_strategy="steps", eval_steps=1)
    before = frozen_fingerprints(trainer.model)
    trainer.train()
    trainer.model.generate(input_ids=torch.tensor([[257, 40, 41]]), max_new_tokens=3)
    assert len(before) == sum(not p.requires_grad for p in trainer.model.parameters())
    assert base_fingerprint(before) == base_fingerprint(frozen_fingerprints(trainer.model))


def test_the_fingerprint_sees_a_single_bit(llama, tmp_path):
    trainer = tiny_trainer(llama, tmp_path, ROWS)
    before = base_fingerprint(frozen_fingerprints(trainer.model))
    weight = next(p for n, p in trainer.model.named_parameters() if "q_proj.base_layer" in n)
    weight.data[0] ^= 1
    assert base_fingerprint(frozen_fingerprints(trainer.model)) != before


@pytest.fixture(scope="module")
def quiet(llama, tmp_path_factory):
    """Two epochs with next to nothing beside the training."""
    folder = tmp_path_factory.mktemp("quiet")
    return trained(llama, folder, lora_dropout=0.2, num_train_epochs=2, max_steps=-1, logging_steps=100)


@pytest.mark.parametrize("cadence", [1, 2])
def test_evaluation_logging_and_sampling_leave_the_weights_alone(llama, tmp_path, quiet, cadence):
    from transformers import TrainerCallback

    class Sample(TrainerCallback):
        """A user's callback that samples text, on the global random stream."""

        def on_step_end(self, args, state, control, model, **kwargs):
            model.generate(input_ids=torch.tensor([[257, 40]]), max_new_tokens=3, do_sample=True)
            torch.rand(5)

    busy = trained(
        llama,
        tmp_path,
        lora_dropout=0.2,
        num_train_epochs=2,
        max_steps=-1,
        logging_steps=cadence,
        clean_loss_steps=cadence,
        eval_dataset=mixed_rows(4),
        eval_strategy="steps",
        eval_steps=cadence,
        callbacks=[Sample()],
    )
    assert max_difference(adapter_weights(quiet), adapter_weights(busy)) == 0


def stored_as(dtype, model, folder):
    """The base's fingerprint, the losses and the adapter of a run whose NF4 bytes are held in a dtype."""
    config = nf4_config(Quantization(), torch.float32, quant_storage=dtype)
    trainer = tiny_trainer(model, folder, quantization_config=config)
    trainer.train()
    return base_fingerprint(frozen_fingerprints(trainer.model)), losses(trainer), adapter_weights(trainer)


@pytest.fixture(scope="module")
def stored_as_bytes(llama, tmp_path_factory):
    return stored_as(torch.uint8, llama, tmp_path_factory.mktemp("uint8"))


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
def test_the_dtype_that_nf4_bytes_are_stored_as_changes_no_bit(llama, tmp_path, stored_as_bytes, storage):
    """FSDP needs a float dtype; the bytes, the losses and the adapter are those of uint8."""
    found = [stored_as_bytes, stored_as(getattr(torch, storage), llama, tmp_path)]
    assert found[0][:2] == found[1][:2]
    assert max_difference(found[0][2], found[1][2]) == 0
