"""How answers are chosen, token by token: greedily or drawn, with a repetition penalty, in batches or as they come."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .randomness import preserved_rng


@dataclass(frozen=True)
class Decoding:
    """How an answer is chosen.

    Attributes:
        max_new_tokens: Tokens of an answer at most.
        do_sample: Draw tokens; else take the likeliest.
        temperature: Divides the logits before drawing.
        top_p: Draw among the likeliest tokens that together have this probability.
        top_k: Draw among this many at most; 0: all.
        repetition_penalty: Divides the logits of tokens that were there before, prompt included (1: none). NEFTune's
            authors decode greedily with 1.2 (arXiv:2310.05914, appendix).
        seed: Of the draws.
    """

    max_new_tokens: int = 512
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """For ``model.generate``; of the sampling ones only those in use, since transformers warns of others."""
        found: dict[str, Any] = {"do_sample": self.do_sample, "repetition_penalty": self.repetition_penalty}
        if self.do_sample:
            found |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return found


def generate_ids(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    batch_size: int,
    stop_token_ids: Sequence[int] = (),
    streamer: Any = None,
) -> Iterator[tuple[int, list[int]]]:
    """Answer prompts, padded on the left; greedy answers do not depend on the batch, but for rounding.

    Args:
        model: A causal LM, with or without adapter; left in the mode it was in.
        tokenizer: Its tokenizer.
        prompts: Token ids.
        decoding: How tokens are chosen.
        batch_size: Prompts at a time.
        stop_token_ids: Tokens that end an answer; the tokenizer's end token without any.
        streamer: Sees the tokens as they come; for one prompt at a time.

    Yields:
        Index of a prompt and its answer's token ids, the stop token left away; batch by batch, prompts near the end of
        the model's context last. A prompt that fills the context gets no answer and is not yielded.
    """
    stops = list(stop_token_ids) or [tokenizer.eos_token_id]
    lengths = [len(prompt) for prompt in prompts]
    for part, num_tokens in _batches(lengths, _context(model), decoding.max_new_tokens, batch_size):
        rows = [list(prompts[i]) for i in part]
        with _answering(model, decoding):
            found = _answer_batch(model, tokenizer, rows, num_tokens, decoding, stops, streamer)
        yield from zip(part, found, strict=True)


@contextmanager
def _answering(model: Any, decoding: Decoding) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), preserved_rng():
            if decoding.do_sample:
                torch.manual_seed(decoding.seed)
            yield
    finally:
        model.train(was_training)


def _batches(lengths: list[int], context: int, wanted: int, batch_size: int) -> Iterator[tuple[list[int], int]]:
    """Which prompts to answer together, and in how many tokens at most.

    A prompt near the end of the context is answered alone, in what room it has, so that it shortens no other answer;
    one that fills the context gets none.
    """
    roomy = [i for i, length in enumerate(lengths) if length + wanted <= context]
    for start in range(0, len(roomy), batch_size):
        yield roomy[start : start + batch_size], wanted
    for i, length in enumerate(lengths):
        if length < context < length + wanted:
            yield [i], context - length


def _context(model: Any) -> int:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def _answer_batch(
    model: Any,
    tokenizer: Any,
    rows: list[list[int]],
    max_new_tokens: int,
    decoding: Decoding,
    stop_token_ids: list[int],
    streamer: Any,
) -> list[list[int]]:
    width = max(len(row) for row in rows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)  # (B, T)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=stop_token_ids,
        streamer=streamer,
        **decoding.arguments(),
    )
    return [_up_to_stop(answer, stop_token_ids) for answer in output[:, width:].tolist()]


def _up_to_stop(answer: list[int], stop_token_ids: Sequence[int]) -> list[int]:
    stops = (i for i, token in enumerate(answer) if token in stop_token_ids)
    return answer[: next(stops, len(answer))]
