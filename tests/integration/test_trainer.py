"""What a user of the trainer sees: logs, saved files, arguments left alone, precision."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from tiny import byte_tokenizer, losses, mixed_rows, rows_of_lengths, tiny_config, tiny_lora, tiny_trainer
from transformers import DataCollatorForLanguageModeling
from trl import SFTConfig

from qlora_neft import QLoRANeftConfig, QLoRANeftTrainer
from qlora_neft.errors import UserInputError

ROWS = mixed_rows(24, seed=31)


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_measured_norm_is_the_published_one_and_the_ratio_is_logged(llama, tmp_path):
    trainer = tiny_trainer(llama, tmp_path, ROWS, neftune_noise_alpha=6.0)
    trainer.train()
    expected = 6.0 / math.sqrt(3)
    assert logged(trainer, "neftune_expected_norm") == pytest.approx([expected] * 3)
    assert logged(trainer, "neftune_norm") == pytest.approx([expected] * 3, rel=0.02)
    embedding = trainer.model.get_input_embeddings().weight
    # Rows have 22 tokens on average: the norm of their embeddings is about sqrt(22) times that of one token's.
    ratio = expected / (math.sqrt(22) * embedding.norm(dim=1).mean().item())
    assert logged(trainer, "neftune_noise_to_embedding") == pytest.approx([ratio] * 3, rel=0.4)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_moves_alpha_to_its_final_value(llama, tmp_path, schedule):
    trainer = tiny_trainer(llama, tmp_path, ROWS, neftune_schedule=schedule, neftune_final_alpha=1.0, max_steps=5)
    trainer.train()
    alphas = logged(trainer, "neftune_alpha")
    assert alphas[0] == 5.0 and alphas[-1] == pytest.approx(1.0) and alphas[2] == pytest.approx(3.0)
    assert alphas == sorted(alphas, reverse=True)
    norms = logged(trainer, "neftune_norm")
    assert norms == pytest.approx([alpha / math.sqrt(3) for alpha in alphas], rel=0.02)


def test_a_schedule_that_ends_at_zero_logs_no_noise_at_its_end(llama, tmp_path):
    trainer = tiny_trainer(llama, tmp_path, ROWS, neftune_schedule="linear", neftune_final_alpha=0.0)
    trainer.train()
    assert len(logged(trainer, "neftune_norm")) == 2 and len(losses(trainer)) == 3


def test_clean_loss_is_the_loss_without_noise_and_dropout_on_the_first_rows(llama, tmp_path):
    trainer = tiny_trainer(llama, tmp_path, ROWS, clean_loss_steps=1, clean_loss_rows=5, lora_dropout=0.3)
    trainer.train()
    model = trainer.model.eval()
    total = count = 0.0
    for row in ROWS.select(range(5)):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)  # (L - 1, V)
        trained = labels[1:] != -100
        total -= log_probs[torch.arange(len(labels) - 1), ids[0, 1:]][trained].sum().item()
        count += trained.sum().item()
    assert logged(trainer, "clean_loss")[-1] == pytest.approx(total / count, rel=1e-5)
    assert len(logged(trainer, "clean_loss")) == 3


def test_clean_loss_keeps_its_cadence(llama, tmp_path):
    trainer = tiny_trainer(llama, tmp_path, ROWS, clean_loss_steps=3, max_steps=7)
    trainer.train()
    steps = [entry["step"] for entry in trainer.state.log_history if "clean_loss" in entry]
    assert steps == [1, 3, 6]


def test_a_second_training_logs_its_clean_loss_again(llama, tmp_path):
    trainer = tiny_trainer(llama, tmp_path, ROWS, clean_loss_steps=2)
    for _ in range(2):
        trainer.train()
        assert [entry["step"] for entry in trainer.state.log_history if "clean_loss" in entry] == [1, 2]


def test_prompt_completion_rows_work_as_in_sft_trainer(llama, tmp_path):
    rows = Dataset.from_list([{"prompt": f"{i} + {i} =", "completion": f" {2 * i}"} for i in range(12)])
    trainer = tiny_trainer(llama, tmp_path, rows, max_length=64)
    trainer.train()
    first = trainer.train_dataset[0]
    assert first["labels"][-1] == 258 and first["labels"][:4] == [-100] * 4
    assert len(losses(trainer)) == 3


def test_saving_writes_the_adapter_without_any_pickle(llama, tmp_path):
    trainer = tiny_trainer(llama, tmp_path / "out", ROWS, hub_token="hf_secret")
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    for path in (tmp_path / "adapter").iterdir():
        assert b"hf_secret" not in path.read_bytes()
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    reloaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", device_map="cpu", dtype=torch.float32)
    for name, param in reloaded.named_parameters():
        if "lora_" in name:
            assert torch.equal(param, trainer.model.get_parameter(name))


def test_the_callers_arguments_are_left_alone(llama, tmp_path):
    args = tiny_config(tmp_path, model_init_kwargs={"attn_implementation": "eager"})
    before = copy.deepcopy(dataclasses.asdict(args))
    trainer = QLoRANeftTrainer(str(llama), args, train_dataset=ROWS, peft_config=tiny_lora())
    trainer.train()
    assert dataclasses.asdict(args) == before
    assert trainer.model.config._attn_implementation == "eager"


def test_a_plain_sft_config_is_refused_with_the_reason(llama, tmp_path):
    with pytest.raises(TypeError, match="must be a QLoRANeftConfig, got SFTConfig"):
        QLoRANeftTrainer(str(llama), SFTConfig(str(tmp_path), bf16=False), train_dataset=ROWS)


def test_on_this_cpu_everything_is_float32_without_being_asked(llama, tmp_path):
    args = QLoRANeftConfig(str(tmp_path), use_cpu=True, report_to="none")
    assert (args.bf16, args.fp16, args.compute_dtype) == (False, False, torch.float32)
    trainer = QLoRANeftTrainer(str(llama), args, train_dataset=ROWS, processing_class=byte_tokenizer())
    floating = {param.dtype for param in trainer.model.parameters() if param.is_floating_point()}
    assert floating == {torch.float32}
    assert not trainer.model.is_gradient_checkpointing


def test_adapters_start_from_unrounded_values(llama, tmp_path):
    """TRL rounds them to bf16; casting back would leave 8 significant bits."""
    trainer = tiny_trainer(llama, tmp_path, ROWS)
    weights = [param for name, param in trainer.model.named_parameters() if "lora_A" in name]
    assert weights and all(not torch.equal(w, w.to(torch.bfloat16).float()) for w in weights)


def test_tokens_seen_are_real_tokens(llama, tmp_path):
    rows = rows_of_lengths([10, 20, 30, 40, 15, 25], seed=1)
    trainer = tiny_trainer(llama, tmp_path, rows, max_steps=-1, num_train_epochs=2, pad_to_multiple_of=32)
    trainer.train()
    assert trainer.tokens_seen == 2 * sum(len(ids) for ids in rows["input_ids"])
    assert trainer.trained_tokens_seen == 2 * sum(label != -100 for row in rows["labels"] for label in row)


def test_the_last_step_of_an_epoch_may_be_smaller(llama, tmp_path):
    """20 rows in steps of 8: the third step has 4, and its loss is divided by the tokens of those 4."""
    rows = mixed_rows(20, seed=8)
    runs = [
        tiny_trainer(llama, tmp_path, rows, max_steps=-1, num_train_epochs=1, neftune_noise_alpha=5.0, **split)
        for split in ({}, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1})
    ]
    for trainer in runs:
        trainer.train()
    assert runs[0].state.global_step == runs[1].state.global_step == 3
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)


def test_precision_cannot_be_asked_of_a_device_that_lacks_it(tmp_path):
    with pytest.raises(ValueError, match="fp16 training needs a CUDA device"):
        QLoRANeftConfig(str(tmp_path), use_cpu=True, fp16=True)


def test_a_collator_that_masks_the_end_token_as_padding_is_refused(llama, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    mask_pads = DataCollatorForLanguageModeling(tokenizer, mlm=False)

    def masking(rows):
        return mask_pads([{"input_ids": row["input_ids"]} for row in rows])

    trainer = tiny_trainer(llama, tmp_path, ROWS, processing_class=tokenizer, data_collator=masking)
    with pytest.raises(UserInputError, match="pad token and end token are one, and the collator masks both"):
        trainer.train()
    trainer = tiny_trainer(llama, tmp_path, ROWS, processing_class=tokenizer, max_steps=1)
    trainer.train()  # the trainer's own collator pads by place, not by token


def test_rows_without_a_label_are_refused(llama, tmp_path):
    rows = Dataset.from_list([{"input_ids": [65] * 9, "labels": [-100] * 9}] * 8)
    trainer = tiny_trainer(llama, tmp_path, rows)
    with pytest.raises(UserInputError, match="the first optimizer step has no label"):
        trainer.train()
