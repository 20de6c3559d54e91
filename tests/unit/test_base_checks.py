"""A run that needs more positions or token ids than its base has is refused; what is recorded of a base."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig, Mamba2Config

from qlora_neft.base.config import check_context, check_vocabulary, stored_config
from qlora_neft.errors import UserInputError

CONFIG = LlamaConfig(vocab_size=100, max_position_embeddings=64, hidden_size=32, num_attention_heads=2)


def test_rows_as_long_as_the_context_pass_and_longer_ones_are_refused():
    check_context(CONFIG, 64)
    with pytest.raises(UserInputError, match=r"data.max_length: the model's context is 64 tokens, got 65"):
        check_context(CONFIG, 65)


def test_the_last_token_id_passes_and_the_next_is_refused():
    check_vocabulary(CONFIG, 99)
    with pytest.raises(UserInputError, match="makes token id 100, the model's vocabulary has 100"):
        check_vocabulary(CONFIG, 100)


def test_a_configuration_with_infinity_is_recorded_as_it_is_stored(tmp_path):
    Mamba2Config(time_step_limit=(0.0, float("inf"))).save_pretrained(tmp_path)
    found = stored_config(str(tmp_path), Mamba2Config.from_pretrained(tmp_path))
    assert found["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert json.loads(json.dumps(found, allow_nan=False)) == json.loads((tmp_path / "config.json").read_text())
