"""Models trained in full, and PEFT's other adapters, handed to `QLoRANeftTrainer` as to `SFTTrainer`."""

import shutil

import pytest
import torch
from peft import IA3Config, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from tiny import adapter_weights, byte_tokenizer, gradient_norms, losses, mixed_rows, tiny_config, tiny_trainer
from transformers import AutoModelForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from qlora_neft.errors import UserInputError

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
ADAPTERS = {
    "in full": lambda: None,
    "prompt tuning": lambda: PromptTuningConfig(**PROMPT),
    "prefix tuning": lambda: PrefixTuningConfig(**PROMPT),
    "a prompt encoder": lambda: PromptEncoderConfig(**PROMPT),
    "IA3": lambda: IA3Config(task_type="CAUSAL_LM"),
}


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def trainer_of(model, folder, kind, **overrides):
    own = {"processing_class": byte_tokenizer(), "eval_dataset": mixed_rows(6, 1), **SAVING, **overrides}
    return tiny_trainer(loaded(model), folder, peft_config=ADAPTERS[kind](), **own)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.filterwarnings("ignore:.*past_key_values:Warning")
def test_it_is_saved_resumed_bit_for_bit_and_loaded(kind, llama, tmp_path):
    whole = trainer_of(llama, tmp_path / "whole", kind)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    resumed = trainer_of(llama, tmp_path / "cut", kind)
    resumed.train(resume_from_checkpoint=True)
    trained = adapter_weights(whole)
    assert trained and all(torch.equal(trained[name], p) for name, p in adapter_weights(resumed).items())
    assert whole.evaluate()["eval_loss"] == resumed.evaluate()["eval_loss"]
    # The folder is one that transformers and PEFT load.
    whole.save_model(str(tmp_path / "saved"))
    if kind == "in full":
        again = loaded(tmp_path / "saved")
    else:
        again = PeftModel.from_pretrained(loaded(llama), str(tmp_path / "saved"))
    ids = {"input_ids": torch.arange(12)[None], "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    with torch.no_grad():
        assert torch.equal(whole.model.eval()(**ids).logits, again.eval()(**ids).logits)


def test_a_checkpoint_of_another_kind_is_told(llama, tmp_path):
    trainer_of(llama, tmp_path, "in full", max_steps=2).train()
    with pytest.raises(UserInputError, match="trained in full, and this one trains an adapter"):
        trainer_of(llama, tmp_path, "IA3").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("kind", ["in full", "prompt tuning", "prefix tuning"])
@pytest.mark.filterwarnings("ignore:.*past_key_values:Warning")
def test_without_noise_it_is_sfttrainer(kind, llama, tmp_path):
    """The same rows in the same order: a step in micro-batches of one row against a batch of eight."""
    ours = trainer_of(llama, tmp_path / "ours", kind, neftune_noise_alpha=None, micro_batch_size=1)
    ours.train()
    shared = tiny_config(tmp_path / "plain")
    names = (
        "use_cpu",
        "bf16",
        "learning_rate",
        "lr_scheduler_type",
        "logging_steps",
        "max_length",
        "report_to",
        "seed",
    )
    arguments = SFTConfig(
        output_dir=str(tmp_path / "plain"),
        max_steps=4,
        per_device_train_batch_size=8,
        save_strategy="no",
        gradient_checkpointing=False,
        **{name: getattr(shared, name) for name in names},
    )
    model, adapter = loaded(llama), ADAPTERS[kind]()
    set_seed(shared.seed)  # the adapter's initialization
    model = model if adapter is None else get_peft_model(model, adapter)
    plain = SFTTrainer(model, arguments, train_dataset=mixed_rows(24), processing_class=byte_tokenizer())
    plain.train()
    assert losses(ours) == pytest.approx(losses(plain), rel=1e-5)
    assert gradient_norms(ours) == pytest.approx(gradient_norms(plain), rel=1e-4)
