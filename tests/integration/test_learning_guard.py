"""A run that learns nothing says so, with the cause; one that learns, however little, is left alone."""

from __future__ import annotations

import pytest
import torch
from tiny import adapter_weights, mixed_rows, tiny_lora, tiny_trainer

from qlora_neft.errors import RunFailed, UserInputError
from qlora_neft.run_folder.checkpoints import find_checkpoints
from qlora_neft.trainer.learning_guard import FIRST, SOME

ROWS = mixed_rows(24, seed=5)
STEP = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": SOME + 2}


def made(model, folder, rows=ROWS, **overrides):
    """A trainer and the lines it says."""
    lines = []
    trainer = tiny_trainer(model, folder, rows, **{**STEP, **overrides})
    trainer.say = lines.append
    return trainer, lines


def warnings(lines):
    return [line for line in lines if line.startswith("warning: ")]


def weights_of(trainer, end):
    return [param for name, param in trainer.model.named_parameters() if name.endswith(end)]


def cut_off(trainer, layers):
    """Let the loss not depend on the outputs of the attention of some layers, as if they were never called."""
    for layer in layers:
        trainer.model.base_model.model.model.layers[layer].self_attn.register_forward_hook(
            lambda module, given, out: (torch.zeros_like(out[0]).requires_grad_(), *out[1:])
        )


ATTENTION = {"peft_config": tiny_lora(target_modules=["q_proj", "v_proj"])}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"max_steps": 1},
        {"max_steps": 3, "lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"learning_rate": 1e-7, "neftune_noise_alpha": None, "clean_loss_steps": 1},
        {"loraplus_lr_ratio": 16, "max_grad_norm": 0.0},
    ],
    ids=["usual", "one step", "warm-up and cosine", "a small rate", "LoRA+"],
)
def test_a_run_that_learns_is_left_alone(llama, tmp_path, overrides):
    trainer, lines = made(llama, tmp_path, **overrides)
    trainer.train()
    assert warnings(lines) == []


def test_adapters_that_the_loss_does_not_depend_on_end_the_run(llama, tmp_path):
    trainer, lines = made(llama, tmp_path, **ATTENTION, weight_decay=0.1)
    cut_off(trainer, (0, 1))
    with pytest.raises(RunFailed, match=r"gradient was exactly 0 in 5 steps, at a loss of [1-9].*layers\.0\.self_attn"):
        trainer.train()
    assert trainer.state.global_step == FIRST and warnings(lines) == []


def test_a_shorter_run_says_so_at_its_end(llama, tmp_path):
    trainer, lines = made(llama, tmp_path, **ATTENTION, max_steps=2)
    cut_off(trainer, (0, 1))
    trainer.train()
    [line] = warnings(lines)
    assert "gradient was exactly 0 in every step" in line and "lora.target_modules" in line


def test_some_adapters_that_learn_nothing_are_named(llama, tmp_path):
    trainer, lines = made(llama, tmp_path, **ATTENTION)
    cut_off(trainer, (1,))
    trainer.train()
    [line] = warnings(lines)
    assert line.startswith(f"warning: 2 adapters have learned nothing in {SOME} steps (model.layers.1.self_attn.q_proj")
    assert "layers.0" not in line and "has not called these layers" in line


def test_matrices_frozen_by_mistake_are_named(llama, tmp_path):
    trainer, lines = made(llama, tmp_path, **ATTENTION)
    [first, *_] = weights_of(trainer, "q_proj.lora_B.default.weight")
    first.requires_grad_(False)
    trainer.train()
    [line] = warnings(lines)
    assert line.startswith("warning: 1 adapters") and "frozen (requires_grad)" in line and "layers.0" in line


def test_a_model_in_which_all_is_frozen_is_refused_before_a_step(llama, tmp_path):
    trainer, _ = made(llama, tmp_path)
    trainer.model.requires_grad_(False)
    with pytest.raises(UserInputError, match="model: no weight is trainable"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_rate_too_small_for_float32_ends_the_run(llama, tmp_path):
    # B begins at random: from zero any rate would move it.
    config = tiny_lora(init_lora_weights=False)
    trainer, _ = made(llama, tmp_path, peft_config=config, learning_rate=1e-14)
    before = adapter_weights(trainer)
    with pytest.raises(
        RunFailed, match=r"no weight of the adapters has moved in 5 steps. train.learning_rate is likely"
    ):
        trainer.train()
    assert all(torch.equal(before[name], now) for name, now in adapter_weights(trainer).items())


def test_an_optimizer_of_other_weights_ends_the_run(llama, tmp_path):
    other, _ = made(llama, tmp_path)
    trainer, _ = made(llama, tmp_path)
    trainer.optimizer = torch.optim.AdamW(other.model.parameters(), lr=1e-3)
    with pytest.raises(RunFailed, match="The optimizer does not hold them"):
        trainer.train()


def test_a_rate_that_moves_weights_but_not_the_loss_is_said(llama, tmp_path):
    trainer, lines = made(llama, tmp_path, learning_rate=1e-14, clean_loss_steps=4, neftune_noise_alpha=None)
    trainer.train()
    [line] = warnings(lines)
    assert "the clean loss is" in line and "train.learning_rate is likely too small, 1e-14 at its peak" in line
    assert all(param.abs().max() > 0 for param in weights_of(trainer, "lora_B.default.weight"))


def test_a_held_out_loss_that_does_not_move_is_said(llama, tmp_path):
    held_out = {"eval_dataset": ROWS.select(range(4)), "eval_strategy": "steps", "eval_steps": 6}
    options = {"learning_rate": 1e-14, "max_steps": 32, "lr_scheduler_type": "linear", "neftune_noise_alpha": None}
    trainer, lines = made(llama, tmp_path, **options, **held_out)
    trainer.train()  # from step 18 on at less than half the rate
    [line] = warnings(lines)
    assert "the held-out loss is" in line and "too small, 1e-14 at its peak" in line


def test_the_same_loss_in_every_step_is_said(llama, tmp_path):
    rows = ROWS.select([0] * 24)
    trainer, lines = made(llama, tmp_path, rows, learning_rate=1e-14, neftune_noise_alpha=None)
    trainer.train()
    [line] = warnings(lines)
    assert "to the last bit in each of 10 steps" in line


def test_a_schedule_of_zeros_ends_a_run_and_is_said_of_one_step(llama, tmp_path):
    with pytest.raises(UserInputError, match=r"train\.learning_rate: the learning rate is 0 in every step"):
        made(llama, tmp_path, learning_rate=0.0)[0].train()
    trainer, lines = made(llama, tmp_path, max_steps=1, lr_scheduler_type="linear", warmup_steps=1)
    trainer.train()
    [line] = warnings(lines)
    assert "a warm-up begins at 0, and needs a second step" in line and trainer.state.global_step == 1


def test_a_loss_of_zero_is_no_failure(llama, tmp_path):
    """As where every label but that of the first step is masked, or where all is learned."""
    labels = [row["labels"] if index == 0 else [-100] * len(row["labels"]) for index, row in enumerate(ROWS)]
    rows = ROWS.remove_columns("labels").add_column("labels", labels)
    trainer, lines = made(llama, tmp_path, rows, max_steps=SOME, train_sampling_strategy="sequential")
    trainer.train()
    assert trainer.state.global_step == SOME and warnings(lines) == []


def test_steps_that_are_skipped_say_nothing(llama, tmp_path):
    trainer, lines = made(llama, tmp_path, max_bad_steps=20)
    read = trainer.read_metrics
    trainer.read_metrics = lambda loss: read(loss) * float("nan")
    trainer.train()
    assert trainer.bad_steps == SOME + 2 and warnings(lines) == []


def test_a_resumed_session_is_watched_anew_and_costs_no_saved_work(llama, tmp_path):
    saved = {**ATTENTION, "save_strategy": "steps", "save_steps": 3, "max_steps": 12}
    made(llama, tmp_path, **saved, max_bad_steps=5)[0].train()
    trainer, _ = made(llama, tmp_path, **{**saved, "max_steps": 20})
    cut_off(trainer, (0, 1))
    with pytest.raises(RunFailed, match="gradient was exactly 0 in 5 steps"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 12 + FIRST and find_checkpoints(tmp_path).newest.step == 15
