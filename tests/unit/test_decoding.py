"""How the next token is chosen: the penalty does not see padding, draws do not see the batch, text comes in pieces."""

import math
from collections import Counter

import pytest
import torch
from tiny import byte_tokenizer
from transformers import AutoModelForCausalLM, RepetitionPenaltyLogitsProcessor

from qlora_neft.errors import UserInputError
from qlora_neft.generation.decode import Decoding, KeyedDraw, RepetitionPenalty, continuations
from qlora_neft.generation.generate import TextStream, answer_text

PAD, STOP = 9, 8


def padded(rows, width):
    """Return ids (B, T) padded on the left, and a mask of the padding."""
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    is_padding = torch.tensor([[True] * (width - len(row)) + [False] * len(row) for row in rows])
    return ids, is_padding


def test_without_padding_the_penalty_is_that_of_transformers():
    ids, is_padding = padded([[1, 2, 2, 5], [3, 4, 9, 0]], 4)
    scores = torch.randn(2, 10, generator=torch.Generator().manual_seed(0))
    expected = RepetitionPenaltyLogitsProcessor(1.2)(ids, scores.clone())
    assert torch.equal(RepetitionPenalty(1.2, is_padding, [STOP])(ids, scores), expected)
    assert not torch.equal(expected, scores)


def test_padding_does_not_count_unlike_in_transformers():
    scores = torch.ones(1, 10)
    alone, together = padded([[1, 2]], 2), padded([[1, 2]], 5)
    upstream = RepetitionPenaltyLogitsProcessor(1.2)
    # If this fails, transformers no longer counts padding, and our own processor need not either.
    assert upstream(together[0], scores.clone())[0, PAD] < upstream(alone[0], scores.clone())[0, PAD]
    ours = [RepetitionPenalty(1.2, is_padding, [STOP])(ids, scores) for ids, is_padding in (alone, together)]
    assert torch.equal(*ours) and ours[0][0, PAD] == 1


def test_a_pad_token_inside_the_prompt_counts():
    ids, is_padding = padded([[PAD, 2]], 4)
    assert RepetitionPenalty(2.0, is_padding, [STOP])(ids, torch.ones(1, 10))[0].tolist() == [
        0.5 if token in (PAD, 2) else 1 for token in range(10)
    ]


def test_new_tokens_count_and_end_tokens_never_do():
    ids, is_padding = padded([[1, STOP, 2]], 4)
    later = torch.cat([ids, torch.tensor([[5, STOP]])], dim=1)
    after = RepetitionPenalty(2.0, is_padding, [STOP])(later, -torch.ones(1, 10))
    assert [token for token in range(10) if after[0, token] != -1] == [1, 2, 5]


def draw(seed, numbers, scores, place=0):
    ids = torch.zeros(len(numbers), 3 + place, dtype=torch.long)
    chosen = KeyedDraw(seed, numbers, 3)(ids, scores)
    assert (chosen > -torch.inf).sum(dim=1).tolist() == [1] * len(numbers)
    return chosen.argmax(dim=1).tolist()


def test_draws_have_the_models_probabilities():
    probabilities, count = torch.tensor([0.5, 0.0, 0.2, 0.3]), 4000
    found = Counter(draw(1, range(count), probabilities.log().expand(count, -1)))
    assert found[1] == 0
    for token, p in enumerate(probabilities.tolist()):
        assert abs(found[token] - count * p) <= 4 * math.sqrt(count * p * (1 - p))  # 4 standard deviations


def test_a_draw_depends_on_seed_prompt_and_place_and_not_on_the_batch():
    scores = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    together = draw(3, range(40), scores)
    assert [draw(3, [n], scores[n : n + 1])[0] for n in range(40)] == together
    assert draw(4, range(40), scores) != together
    assert draw(3, range(40, 80), scores) != together
    assert draw(3, range(40), scores, place=1) != together


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("min_new_tokens", -1),
        ("min_new_tokens", 513),
        ("temperature", 0.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 1.5),
        ("top_p", 0.0),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(UserInputError, match=f"{name}: must be .*{value}"):
        Decoding(**{name: value})


@pytest.mark.parametrize("as_it_is", [False, True])
def test_streamed_pieces_are_the_text(as_it_is):
    tokenizer, pieces = byte_tokenizer(), []
    ids = tokenizer(" Grüße, 東京! \n \n ende \n")["input_ids"]
    stream = TextStream(tokenizer, pieces.append, stop_token_ids=[258], as_it_is=as_it_is)
    for _ in range(2):  # a stream serves again
        pieces.clear()
        stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
        for token in [*ids, 258]:
            stream.put(torch.tensor([token]))
        stream.end()
        assert "".join(pieces) == answer_text(tokenizer, ids, as_it_is=as_it_is)
        assert len(pieces) > 10 and "�" not in "".join(pieces)
    assert "".join(pieces).startswith("G") == (not as_it_is)


def test_a_model_that_transformers_cannot_generate_with_is_one_message(llama, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(llama)

    def broken(*args, **kwargs):
        raise ValueError("the cache has\nanother shape")

    monkeypatch.setattr(model.model, "forward", broken)
    with pytest.raises(UserInputError, match=r"^model.name_or_path: LlamaForCausalLM cannot answer .*cache") as caught:
        list(continuations(model, byte_tokenizer(), [[5, 6]], Decoding(max_new_tokens=2), batch_size=1))
    assert "\n" not in str(caught.value)
