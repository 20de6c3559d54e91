"""A run that needs more positions or token ids than its base has is refused."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from qlora_neft.base.config import check_context, check_vocabulary
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
