"""Invariants 3, 5 and 6 where tokens have weights, or a step's loss is the mean over its sequences' means."""

from __future__ import annotations

import random

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from test_trajectories import SPLITS, assert_one_trajectory
from tiny import adapter_weights, gradient_norms, losses, max_difference, mixed_rows, tiny_trainer
from torch.nn.functional import cross_entropy

from qlora_neft.errors import UserInputError
from qlora_neft.steps import IGNORE_INDEX, LOSS_WEIGHTS
from qlora_neft.steps.losses import row_losses
from qlora_neft.steps.weights import WeightedCollator

STEP_OF_16 = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}


def weighted(rows: Dataset, weights=(0.25, 1.0), seed: int = 0) -> Dataset:
    """The rows with a label everywhere, and a weight drawn for each token."""
    draw = random.Random(seed)
    found = [[draw.choice(weights) for _ in row["input_ids"]] for row in rows]
    return rows.remove_columns("labels").add_column("labels", rows["input_ids"]).add_column(LOSS_WEIGHTS, found)


PLAIN = mixed_rows(32, seed=11)
ROWS = {"weights": weighted(PLAIN), "sequences": PLAIN, "both": weighted(PLAIN)}
MEANS = {"weights": "tokens", "sequences": "sequences", "both": "sequences"}


def trained(model, folder, case, **overrides):
    trainer = tiny_trainer(model, folder, ROWS[case], loss_mean=MEANS[case], **{**STEP_OF_16, **overrides})
    trainer.train()
    return trainer


def token_losses(model, row):
    """The losses of a row's trained tokens by the model's own logits, and their weights."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
    found = cross_entropy(model(input_ids=ids).logits[0, :-1].float(), labels, reduction="none", ignore_index=-100)
    weights = torch.tensor(row.get(LOSS_WEIGHTS) or [1.0] * len(row["labels"]))[1:]
    return found, weights * labels.ne(IGNORE_INDEX)


@pytest.mark.parametrize("case", ROWS)
def test_a_step_is_the_plain_computation(llama, tmp_path, case):
    quiet = {"neftune_noise_alpha": None, "max_steps": 1, "max_grad_norm": 0.0}
    trainer = trained(llama, tmp_path / "a", case, **quiet)
    reference = tiny_trainer(llama, tmp_path / "b", ROWS[case], **STEP_OF_16, **quiet)
    pairs = [token_losses(reference.model, ROWS[case][i]) for i in trainer.rows_of_step(0)]
    if MEANS[case] == "tokens":
        loss = sum((found * w).sum() for found, w in pairs) / sum(w.sum() for _, w in pairs)
    else:
        loss = sum((found * w).sum() / w.sum() for found, w in pairs) / len(pairs)
    loss.backward()
    parameters = [p.grad for p in reference.model.parameters() if p.requires_grad]
    assert losses(trainer)[0] == pytest.approx(loss.item(), rel=1e-5)
    assert gradient_norms(trainer)[0] == pytest.approx(torch.stack([g.norm() for g in parameters]).norm().item(), 1e-4)
    assert isinstance(trainer.model, PeftModel)


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory):
    made = {}

    def get(case):
        if case not in made:
            made[case] = trained(llama, tmp_path_factory.mktemp(case), case)
        return made[case]

    return get


# Every way of weighing one row at a time, and the richest one in every way of dividing a step.
@pytest.mark.parametrize(
    ("case", "split"), [*((case, "1x16") for case in ROWS), ("both", "by tokens"), ("both", "flattened by tokens")]
)
def test_one_trajectory_however_the_step_is_split(llama, tmp_path, whole, case, split):
    assert_one_trajectory(whole(case), trained(llama, tmp_path, case, **SPLITS[split]))


def test_each_way_of_weighing_learns_something_else(whole):
    """The tests above would pass if weights did nothing."""
    for one, other in (("weights", "both"), ("sequences", "both")):
        assert max_difference(adapter_weights(whole(one)), adapter_weights(whole(other))) > 1e-4


def test_weights_of_one_and_zero_are_labels(llama, tmp_path):
    ones = PLAIN.add_column(LOSS_WEIGHTS, [[1.0] * len(ids) for ids in PLAIN["input_ids"]])
    # A label everywhere, and the weight says what is trained.
    by_weight = [[float(label != IGNORE_INDEX) for label in labels] for labels in PLAIN["labels"]]
    zeros = PLAIN.remove_columns("labels").add_column("labels", PLAIN["input_ids"]).add_column(LOSS_WEIGHTS, by_weight)
    runs = [tiny_trainer(llama, tmp_path, rows, **STEP_OF_16) for rows in (PLAIN, ones, zeros)]
    for trainer in runs:
        trainer.train()
    assert losses(runs[0]) == losses(runs[1])
    assert_one_trajectory(runs[0], runs[1], atol=1e-7)
    assert_one_trajectory(runs[0], runs[2], atol=1e-6)


def test_a_stopped_run_goes_on_as_if_it_had_not(llama, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "lora_dropout": 0.2}
    never = trained(llama, tmp_path / "never", "both", max_steps=4, **saving)
    trained(llama, tmp_path / "stopped", "both", max_steps=2, **saving)
    resumed = tiny_trainer(
        llama, tmp_path / "stopped", ROWS["both"], loss_mean="sequences", max_steps=4, **STEP_OF_16, **saving
    )
    resumed.train(resume_from_checkpoint=True)
    assert max_difference(adapter_weights(never), adapter_weights(resumed)) == 0


def test_evaluation_weighs_tokens_whatever_its_batches(llama, tmp_path):
    held_out = weighted(mixed_rows(6, seed=3))
    measured = []
    for size in (1, 4):
        options = {"per_device_eval_batch_size": size, "eval_dataset": held_out, "loss_mean": "sequences"}
        trainer = tiny_trainer(llama, tmp_path, ROWS["weights"], **options)
        measured += [trainer.evaluate()["eval_loss"], trainer.held_out_loss()]
    with torch.no_grad():
        pairs = [token_losses(trainer.model.eval(), row) for row in held_out]
    expected = sum((found * w).sum() for found, w in pairs) / sum(w.sum() for _, w in pairs)
    assert measured == pytest.approx([expected.item()] * 4, rel=1e-5)
    by_row = row_losses(trainer.model, list(held_out), batch_size=4, device=torch.device("cpu"))
    assert by_row.mean() == pytest.approx(expected.item(), rel=1e-5)


def padded_left(rows):
    """A collator of the user's own."""
    width = max(len(row["input_ids"]) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, -len(row["input_ids"]) :] = torch.tensor(row["input_ids"])
        mask[i, -len(row["input_ids"]) :] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def test_weights_lie_beside_their_tokens():
    rows = [{"input_ids": [5, 6], LOSS_WEIGHTS: [0.1, 0.2]}, {"input_ids": [7, 8, 9]}]
    found = WeightedCollator(padded_left)(rows)[LOSS_WEIGHTS]
    torch.testing.assert_close(found, torch.tensor([[0, 0.1, 0.2], [1, 1, 1]]))
    with pytest.raises(UserInputError, match="loss_weights: 5 weights, and the data_collator's batch has 4 tokens"):
        WeightedCollator(lambda given: padded_left([{"input_ids": row["input_ids"][:2]} for row in given]))(rows)


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated")
def test_a_loss_of_the_users_own_is_refused_beside_weights(llama, tmp_path):
    with pytest.raises(ValueError, match=r"loss_weights: cannot be combined with .*label_smoothing_factor"):
        tiny_trainer(llama, tmp_path, ROWS["weights"], label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="loss_mean: must be one of tokens, sequences, got 'rows'"):
        tiny_trainer(llama, tmp_path, PLAIN, loss_mean="rows")
