"""The loss trained on is that of the model's own logits, compared before step 1; else the plain head is taken."""

from __future__ import annotations

import pytest
import torch
from tiny import SIZES, adapter_weights, byte_tokenizer, losses, max_difference, rows_of_lengths, tiny_trainer
from transformers import AutoModelForCausalLM, BertConfig, RecurrentGemmaConfig, set_seed

from qlora_neft.errors import UserInputError
from qlora_neft.trainer.loss_head import use_plain_head

ROWS = rows_of_lengths([30, 12, 40, 20], seed=6)
STEP = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}


def model_loss(trainer, rows) -> float:
    """Mean loss of rows by plain cross-entropy of the model's own logits, in float64."""
    total, count = 0.0, 0
    trainer.model.eval()
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = trainer.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count


@pytest.fixture(scope="module")
def capped(tmp_path_factory):
    """A recurrent_gemma whose soft cap has a name that TRL does not know."""
    folder = tmp_path_factory.mktemp("recurrent_gemma")
    sizes = {key: SIZES[key] for key in SIZES if key not in ("head_dim", "max_position_embeddings")}
    config = RecurrentGemmaConfig(**sizes, lru_width=64, attention_window_size=64, logits_soft_cap=5.0)
    set_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_soft_cap_that_the_fused_head_does_not_know_is_trained_on(capped, tmp_path):
    said = []
    trainer = tiny_trainer(capped, tmp_path, ROWS, **STEP, neftune_noise_alpha=None, min_nf4_share=0.8)
    trainer.say = said.append
    assert trainer.loss_check.head == "plain"
    assert trainer.clean_train_loss() == pytest.approx(model_loss(trainer, ROWS), rel=1e-6)
    expected = model_loss(trainer, ROWS)
    trainer.train()
    # Both rows of the first step are all rows, and without noise and dropout its loss is theirs.
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-5)
    assert [line for line in said if "the model's own" in line] == [str(trainer.loss_check)]


def test_the_fused_head_stays_where_it_is_the_models_loss_also_with_its_own_cap(architecture_dir, tmp_path):
    for name in ("llama", "gemma2"):  # gemma2: a soft cap whose name TRL knows
        trainer = tiny_trainer(architecture_dir(name), tmp_path, ROWS, **STEP)
        assert trainer.loss_check.head == "fused"
        assert trainer.loss_check.fused_loss == pytest.approx(trainer.loss_check.model_loss, rel=1e-5)


def test_plain_and_fused_head_train_alike(llama, tmp_path):
    runs = [tiny_trainer(llama, tmp_path, ROWS, **STEP, lora_dropout=0.1) for _ in range(2)]
    use_plain_head(runs[1].model.get_base_model())
    for trainer in runs:
        trainer.train()
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-6)
    assert max_difference(*map(adapter_weights, runs)) < 2e-5
    keys = ("mean_token_accuracy", "entropy")
    logged = [[entry[key] for entry in run.state.log_history[:2] for key in keys] for run in runs]
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)


def test_the_comparison_moves_no_random_stream(llama, tmp_path, monkeypatch):
    compared = tiny_trainer(llama, tmp_path, ROWS, **STEP, lora_dropout=0.1)
    stream = torch.random.get_rng_state()
    monkeypatch.setattr("qlora_neft.trainer.trainer.settle_loss_head", lambda *args, **kwargs: compared.loss_check)
    not_compared = tiny_trainer(llama, tmp_path, ROWS, **STEP, lora_dropout=0.1)
    assert torch.equal(torch.random.get_rng_state(), stream)
    for trainer in (compared, not_compared):
        trainer.train()
    assert losses(compared) == losses(not_compared)
    assert max_difference(adapter_weights(compared), adapter_weights(not_compared)) == 0


def test_a_model_that_sees_later_tokens_is_refused(tmp_path):
    sizes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    # As whoever converts an encoder would write it; two flags are needed, and `is_decoder` alone is looked at first.
    config = BertConfig(**sizes, num_attention_heads=4, is_decoder=False, hidden_dropout_prob=0.0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with pytest.raises(UserInputError, match="depends on later tokens"):
        tiny_trainer(model, tmp_path, ROWS, **STEP, processing_class=byte_tokenizer())
