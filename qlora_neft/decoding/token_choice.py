"""Which token comes next: logits in, logits out. Nothing here depends on what else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..steps.philox import uniform_draws
from ..steps.randomness import stream_key


class RepetitionPenalty(LogitsProcessor):
    """Makes tokens that were there before less likely: positive logits divided, negative ones multiplied.

    Padding was not there before: transformers' own processor counts it, so that a shorter prompt of a batch loses
    its pad token, which often is the end token. Tokens that end an answer are never made less likely: they stand
    behind every earlier turn of a conversation, and are no repetition.

    Args:
        penalty: Above 1 against repetition (Keskar et al. 2019, CTRL, section 4.1, arXiv:1909.05858).
        is_padding: Of the prompts, bool (B, T), padded on the left.
        stop_token_ids: Tokens that end an answer.
    """

    def __init__(self, penalty: float, is_padding: Tensor, stop_token_ids: Sequence[int]) -> None:
        self.penalty, self.is_padding = penalty, is_padding
        self.stop_token_ids = torch.tensor(list(stop_token_ids), device=is_padding.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (B, V) after ``input_ids`` (B, T + new tokens)."""
        width, vocabulary = self.is_padding.shape[1], scores.shape[1]
        spared = torch.isin(input_ids, self.stop_token_ids)
        spared[:, :width] |= self.is_padding
        seen = torch.zeros(len(scores), vocabulary + 1, dtype=torch.bool, device=scores.device)
        seen.scatter_(1, input_ids.masked_fill(spared, vocabulary), True)  # the last column is none
        penalized = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(seen[:, :vocabulary], penalized, scores)


class KeyedDraw(LogitsProcessor):
    """Draws each next token with a random number that is a function of (seed, prompt, place) alone.

    Leaves the drawn token as the only one. Tokens lie along [0, 1) in the order of the vocabulary, so that rounding,
    which changes with the batch, rarely changes what is drawn.

    Args:
        seed: Of all draws.
        prompts: A number for each prompt of the batch, (B,).
        width: Tokens of the padded prompts.
    """

    def __init__(self, seed: int, prompts: Sequence[int], width: int) -> None:
        self.keys, self.width = [stream_key("sampling", seed, number) for number in prompts], width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (B, V), all but one minus infinity."""
        place = input_ids.shape[1] - self.width
        draws = uniform_draws([1] * len(self.keys), [(key, place) for key in self.keys], torch.device("cpu"))
        draw = torch.tensor([[number.item()] for number in draws], dtype=torch.float64).to(scores.device)  # (B, 1)
        reach = scores.double().softmax(dim=1).cumsum(dim=1)
        chosen = torch.searchsorted(reach, draw * reach[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)
