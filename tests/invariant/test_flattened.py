"""Flattened rows compute what padded rows compute, on every architecture we name: machine.padding_free is no choice
of what is learned."""

from __future__ import annotations

import pytest
import torch
from tiny import (
    ARCHITECTURES,
    adapter_weights,
    gradient_norms,
    losses,
    max_difference,
    rows_of_lengths,
    save_tiny_model,
    tiny_trainer,
)
from transformers import AutoModelForCausalLM

from benchmarks.step_counter.arms import Arm, count
from qlora_neft.base.flattening import PER_SEQUENCE, probed
from qlora_neft.errors import UserInputError

ROWS = rows_of_lengths([30, 12, 2, 12, 41, 20, 7, 30], seed=6)
HELD_OUT = rows_of_lengths([25, 9, 2, 14], seed=7)
STEP = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}


def trained(model, folder, **overrides):
    trainer = tiny_trainer(model, folder, ROWS, **{**STEP, **overrides})
    trainer.train()
    return trainer


def assert_alike(a, b, atol=1e-5):
    assert losses(a) == pytest.approx(losses(b), rel=1e-5)
    assert gradient_norms(a) == pytest.approx(gradient_norms(b), rel=1e-4)
    assert max_difference(adapter_weights(a), adapter_weights(b)) < atol


# In every run of the tests: tied, its own attention, learned positions, normed heads, fused projections.
QUICK = ("llama-tied", "gemma2", "opt", "qwen3", "phi3")


@pytest.mark.parametrize(
    "architecture", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
)
def test_noise_dropout_and_evaluation_are_those_of_padded_rows(architecture_dir, tmp_path, architecture):
    shared = {"lora_dropout": 0.2, "eval_dataset": HELD_OUT, "clean_loss_steps": 1}
    padded = trained(architecture_dir(architecture), tmp_path, padding_free=False, **shared)
    flattened = trained(architecture_dir(architecture), tmp_path, padding_free=True, **shared)
    ours = flattened.attention_choice.flattened == PER_SEQUENCE
    assert flattened.attention_choice.padding_free and not padded.attention_choice.padding_free
    assert ours is (architecture != "gemma2")  # its soft caps need its own attention
    assert_alike(padded, flattened)
    assert flattened.evaluate()["eval_loss"] == pytest.approx(padded.evaluate()["eval_loss"], rel=1e-5)
    assert flattened.clean_train_loss() == pytest.approx(padded.clean_train_loss(), rel=1e-5)
    # What transformers reads at its next call, and saves, is its own again.
    assert flattened.model.config._attn_implementation == padded.model.config._attn_implementation


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """A window far shorter than the rows."""
    return save_tiny_model(tmp_path_factory.mktemp("windowed"), "mistral", sliding_window=6)


def test_a_window_shorter_than_the_rows_is_heeded(windowed, tmp_path):
    padded, flattened = (trained(windowed, tmp_path, padding_free=flat) for flat in (False, True))
    assert_alike(padded, flattened)
    whole = trained(save_tiny_model(tmp_path / "whole", "mistral", sliding_window=None), tmp_path, padding_free=True)
    assert losses(whole) != pytest.approx(losses(flattened), rel=1e-4)


def test_packed_rows_attend_by_sequence_too(llama, tmp_path):
    """Against transformers' own block masks."""
    shared = {"packing": True, "max_length": 64, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    by_sequence = trained(llama, tmp_path, **shared)
    by_mask = trained(llama, tmp_path, **shared, attn_implementation="sdpa")
    assert (by_sequence.attention_implementation, by_mask.attention_implementation) == (PER_SEQUENCE, "sdpa")
    assert_alike(by_sequence, by_mask, atol=1e-4)  # AdamW makes much of the smallest gradients' rounding


def test_max_length_holds_without_packing(llama, tmp_path):
    """TRL's own padding-free collator refuses it."""
    trainer = trained(llama, tmp_path, padding_free=True, max_length=10)
    assert max(map(len, trainer.train_dataset["input_ids"])) == 10
    assert_alike(trainer, trained(llama, tmp_path, padding_free=False, max_length=10))


def test_generation_from_a_flattened_run_pads_on_the_left_as_ever(llama, tmp_path):
    """With a cache and a mask: our attention knows neither, and is not in place there."""
    trainer = trained(llama, tmp_path, padding_free=True)
    prompts = torch.tensor([[256, 256, 40, 41], [40, 41, 42, 43]])
    shared = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 256}
    together = trainer.model.generate(input_ids=prompts, attention_mask=prompts.ne(256).long(), **shared)
    alone = trainer.model.generate(input_ids=prompts[:1, 2:], **shared)
    assert together[0, 4:].tolist() == alone[0, 2:].tolist()


def test_resumed_is_never_stopped(llama, tmp_path):
    saving = {"padding_free": True, "save_strategy": "steps", "save_steps": 1}
    whole = trained(llama, tmp_path / "a", **saving)
    trained(llama, tmp_path / "b", **{**saving, "max_steps": 1})
    resumed = tiny_trainer(llama, tmp_path / "b", ROWS, **{**STEP, **saving})
    resumed.train(resume_from_checkpoint=True)
    assert max_difference(adapter_weights(whole), adapter_weights(resumed)) == 0


def test_a_family_that_mixes_sequences_is_padded_with_one_line(tmp_path):
    bloom = save_tiny_model(tmp_path / "bloom", "bloom")
    trainer = tiny_trainer(bloom, tmp_path, ROWS, **STEP, padding_free=True)
    said = []
    trainer.say = said.append
    trainer.train()
    assert not trainer.attention_choice.padding_free and not trainer.args.padding_free
    assert [line for line in said if "padded" in line] == [f"rows are padded: bloom: {probed()['padded']['bloom']}"]
    with pytest.raises(UserInputError, match=r"packing: not possible with 'bloom': .* would see each other"):
        tiny_trainer(bloom, tmp_path, ROWS, **STEP, packing=True, max_length=64)


def test_the_host_waits_once_a_step_and_never_in_a_micro_batch():
    """On a CPU, where TRL's head scores every position; on a GPU it picks out the trained ones, and waits twice."""
    counts = count(Arm(family="llama", precision="fp32", padding_free=True, checkpointing=True), lengths=(16, 32))
    assert counts.waits == {"tolist": 1} and counts.waits_a_layer == 0
    assert "step_metrics.py" in next(iter(counts.waits_at))


def test_the_logged_metrics_are_trls(llama, tmp_path):
    """Entropy, accuracy and tokens by TRL's own code, which reads them in every micro-batch."""
    ours = trained(llama, tmp_path)
    upstreams = tiny_trainer(llama, tmp_path, ROWS, **STEP)
    upstreams._loss_is_custom = lambda: True
    upstreams.train()
    names = ("entropy", "mean_token_accuracy", "num_tokens", "loss")
    for a, b in zip(ours.state.log_history, upstreams.state.log_history, strict=True):
        assert [a.get(name) for name in names] == [b.get(name) for name in names]
    assert ours.state.log_history[0]["num_tokens"] == sum(map(len, ROWS["input_ids"]))


def test_a_saved_model_loads_with_transformers_own_attention(llama, tmp_path):
    trainer = trained(llama, tmp_path, padding_free=True)
    trainer.model.get_base_model().config.save_pretrained(tmp_path / "config")
    assert PER_SEQUENCE not in (tmp_path / "config" / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(llama).config._attn_implementation == "sdpa"
