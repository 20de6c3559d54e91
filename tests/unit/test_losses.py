"""The loss of a row is the mean negative log-likelihood its logits give, whatever it is batched with."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import SIZES, mixed_rows
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, set_seed
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from qlora_neft.steps.losses import mean_token_loss, pad_right, row_losses

CPU = torch.device("cpu")
ROWS = [*mixed_rows(9, seed=3), {"input_ids": [1, 2, 3], "labels": [-100] * 3}]


@pytest.fixture(scope="module")
def model():
    set_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**SIZES))
    add_fused_lm_head(made)
    return made


@torch.no_grad()
def loss_of_logits(model, row):
    logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].double()
    return cross_entropy(logits, torch.tensor(row["labels"][1:]), ignore_index=-100, reduction="sum").item()


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_sums_and_counts_come_in_the_order_of_the_rows(model, batch_size):
    found = row_losses(model, ROWS, batch_size=batch_size, device=CPU)
    assert found.sums.tolist() == pytest.approx([loss_of_logits(model, row) for row in ROWS], rel=1e-5)
    assert found.counts.tolist() == [sum(label != -100 for label in row["labels"][1:]) for row in ROWS]
    assert found.counts[-1] == 0 and found.sums[-1] == 0


@pytest.mark.parametrize("padding_free", [False, True])
def test_the_mean_is_over_tokens_and_not_over_batches(model, padding_free):
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free)
    expected = row_losses(model, ROWS, batch_size=3, device=CPU).mean()
    # Flattened rows attend to each other without flash attention's boundaries, so there is one a batch here.
    batch_size = 1 if padding_free else 4
    assert mean_token_loss(model, ROWS, collator, batch_size, CPU) == pytest.approx(expected, rel=1e-6)


def test_without_a_trained_token_the_mean_is_no_number(model):
    assert math.isnan(row_losses(model, ROWS[-1:], batch_size=2, device=CPU).mean())


def test_the_model_is_left_in_its_mode_and_without_gradients(model):
    model.train()
    found = row_losses(model, ROWS, batch_size=4, device=CPU)
    assert model.training and not found.sums.requires_grad
    model.eval()
    row_losses(model, ROWS, batch_size=4, device=CPU)
    assert not model.training


def test_rows_are_padded_on_the_right():
    batch = pad_right([{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7], "labels": [7]}], 9)
    assert batch["input_ids"].tolist() == [[5, 6], [7, 9]]
    assert batch["labels"].tolist() == [[-100, 6], [7, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
