"""How answers are chosen, token by token: greedily or drawn, with a repetition penalty, in batches or as they come.

What an answer is depends on its prompt, the weights and `Decoding` alone: not on its batch, nor on the base's
``generation_config.json``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..errors import UserInputError
from ..steps.randomness import preserved_rng
from .token_choice import KeyedDraw, RepetitionPenalty


@dataclass(frozen=True)
class Decoding:
    """How an answer is chosen.

    Attributes:
        max_new_tokens: Tokens of an answer at most.
        min_new_tokens: An answer does not end before it has this many (the paper's Table 5 takes 250); 0: it may.
        do_sample: Draw tokens; else take the likeliest.
        temperature: Divides the logits before drawing.
        top_p: Draw among the likeliest tokens that together have this probability.
        top_k: Draw among this many at most; 0: all.
        repetition_penalty: Of tokens that were there before, prompt included (1: none), see `RepetitionPenalty`.
            NEFTune's authors decode greedily with 1.2 (arXiv:2310.05914, appendix, "Additional Ablation Studies").
        seed: Of the draws.

    Raises:
        UserInputError: If a value makes no sense.
    """

    max_new_tokens: int = 512
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        # Written such that NaN breaks a rule too.
        rules = (
            ("max_new_tokens", self.max_new_tokens >= 1, "must be at least 1"),
            (
                "min_new_tokens",
                0 <= self.min_new_tokens <= max(self.max_new_tokens, 0),
                f"must be 0 or more, and at most max_new_tokens ({self.max_new_tokens})",
            ),
            (
                "temperature",
                0 < self.temperature < float("inf"),
                "must be above 0 (to take the likeliest, do not draw)",
            ),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "must be 0 (all tokens) or more"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "must be above 0; 1 is none"),
        )
        for name, is_kept, rule in rules:
            if not is_kept:
                raise UserInputError(f"{name}: {rule}, got {getattr(self, name)}.")


class _Stop(StoppingCriteria):
    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self.should_stop = should_stop

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.should_stop(), device=input_ids.device)


@dataclass(frozen=True)
class Continuation:
    """What follows a prompt.

    Attributes:
        index: Of the prompt.
        ids: The answer's token ids, the stop token left away.
        finish_reason: ``stop``: it ended; ``length``: cut at ``max_new_tokens`` or at the end of the model's context;
            ``no room``: the prompt fills the context; ``interrupted``: ``should_stop`` said so.
    """

    index: int
    ids: list[int]
    finish_reason: str


def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    batch_size: int,
    stop_token_ids: Sequence[int] = (),
    streamer: Any = None,
    should_stop: Callable[[], bool] | None = None,
    first_number: int = 0,
) -> Iterator[Continuation]:
    """Answer prompts, padded on the left; answers do not depend on the batch, but for rounding.

    Args:
        model: A causal LM, with or without adapter; left in the mode it was in.
        tokenizer: Its tokenizer.
        prompts: Token ids.
        decoding: How tokens are chosen.
        batch_size: Prompts at a time.
        stop_token_ids: Tokens that end an answer; the tokenizer's end token without any.
        streamer: Sees the tokens as they come; for one prompt at a time.
        should_stop: Asked after every token whether to end all answers of the batch there.
        first_number: Of the first prompt, for the draws: the second of two parts of a list draws on from the first.

    Yields:
        One for each prompt, batch by batch, prompts near the end of the model's context last.
    """
    stops = list(stop_token_ids) or [tokenizer.eos_token_id]
    lengths, context = [len(prompt) for prompt in prompts], context_of(model)
    for part, num_tokens in _batches(lengths, context, decoding.max_new_tokens, batch_size):
        batch = _Batch(tokenizer, [prompts[i] for i in part], [first_number + i for i in part], stops, model.device)
        with _answering(model):
            found = batch.answered(model, decoding, num_tokens, streamer, should_stop)
        for index, ids in zip(part, found, strict=True):
            answer = _up_to_stop(ids, stops)
            cut = "interrupted" if should_stop is not None and should_stop() else "length"
            yield Continuation(index, answer, "stop" if len(answer) < len(ids) else cut)
    for i, length in enumerate(lengths):
        if length >= context:
            yield Continuation(i, [], "no room")


def generate_ids(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    batch_size: int,
    stop_token_ids: Sequence[int] = (),
) -> Iterator[tuple[int, list[int]]]:
    """As `continuations`: index of a prompt and its answer's token ids; a prompt that fills the context gets none."""
    options = {"batch_size": batch_size, "stop_token_ids": stop_token_ids}
    for found in continuations(model, tokenizer, prompts, decoding, **options):
        if found.finish_reason != "no room":
            yield found.index, found.ids


def context_of(model: Any) -> int:
    """Tokens of prompt and answer together at most."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


@contextmanager
def _answering(model: Any) -> Iterator[None]:
    """Eval mode, and a clean slate: what the base's ``generation_config.json`` asks for would be added to ours."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    was_training, own = model.training, base.generation_config
    model.eval()
    base.generation_config = GenerationConfig()
    try:
        with torch.no_grad(), preserved_rng():
            yield
    finally:
        base.generation_config = own
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


class _Batch:
    """Prompts as one tensor, padded on the left, and what chooses their next tokens."""

    def __init__(
        self, tokenizer: Any, rows: list[Sequence[int]], numbers: list[int], stops: list[int], device: torch.device
    ) -> None:
        self.width, self.numbers, self.stops = max(len(row) for row in rows), numbers, stops
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.ids = torch.tensor([[self.pad] * (self.width - len(row)) + list(row) for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        self.is_padding = torch.arange(self.width, device=device) < self.width - lengths[:, None]  # (B, T)

    def answered(
        self, model: Any, decoding: Decoding, num_tokens: int, streamer: Any, should_stop: Callable[[], bool] | None
    ) -> list[list[int]]:
        """New tokens of each prompt, (B, up to ``num_tokens``)."""
        config = GenerationConfig(
            max_new_tokens=num_tokens,
            do_sample=False,  # `KeyedDraw` leaves one token: the likeliest
            use_cache=True,
            pad_token_id=self.pad,
            eos_token_id=self.stops,
        )
        output = model.generate(
            input_ids=self.ids,
            attention_mask=(~self.is_padding).long(),
            generation_config=config,
            logits_processor=LogitsProcessorList(self._processors(decoding)),
            stopping_criteria=StoppingCriteriaList([_Stop(should_stop)] if should_stop else []),
            streamer=streamer,
        )
        return output[:, self.width :].tolist()

    def _processors(self, decoding: Decoding) -> Iterator[Any]:
        if decoding.repetition_penalty != 1:
            yield RepetitionPenalty(decoding.repetition_penalty, self.is_padding, self.stops)
        if decoding.min_new_tokens:
            device = self.ids.device
            yield MinNewTokensLengthLogitsProcessor(self.width, decoding.min_new_tokens, self.stops, device=device)
        if not decoding.do_sample:
            return
        yield TemperatureLogitsWarper(float(decoding.temperature))
        if decoding.top_k:
            yield TopKLogitsWarper(decoding.top_k)
        if decoding.top_p < 1:
            yield TopPLogitsWarper(decoding.top_p)
        yield KeyedDraw(decoding.seed, self.numbers, self.width)


def _up_to_stop(answer: list[int], stop_token_ids: Sequence[int]) -> list[int]:
    stops = (i for i, token in enumerate(answer) if token in stop_token_ids)
    return answer[: next(stops, len(answer))]
