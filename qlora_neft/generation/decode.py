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
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..errors import UserInputError
from ..noise.streams import preserved_rng, stream_key, uniform_draws


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


class _Stop(StoppingCriteria):
    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self.should_stop = should_stop

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.should_stop(), device=input_ids.device)


class _Room(StoppingCriteria):
    """Ends each answer where the model's context does."""

    def __init__(self, ends: Tensor) -> None:
        self.ends = ends  # (B,) width of prompt and answer together

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] >= self.ends


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
    crowded_together = batch_size if may_outrun_its_context(model.config) else 1
    for part in _batches(lengths, context - decoding.max_new_tokens, batch_size, crowded_together, context):
        batch = _Batch(tokenizer, [prompts[i] for i in part], [first_number + i for i in part], stops, model.device)
        rooms = [min(context - lengths[i], decoding.max_new_tokens) for i in part]
        with _answering(model):
            found = batch.answered(model, decoding, rooms, streamer, should_stop)
        for index, ids, room in zip(part, found, rooms, strict=True):
            answer = _up_to_stop(ids, stops)
            cut = "interrupted" if len(ids) < room else "length"
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


def may_outrun_its_context(config: Any) -> bool:
    """Whether a row that has ended may run on past the context beside others, as padding that nobody reads.

    True where positions are rotary, computed for each from its number alone. Learned ones end with the context; dynamic
    NTK and LongRoPE compute all rows' from the longest.
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else list(rope.values())
    return bool(kinds) and all(kind["rope_type"] in ("default", "linear", "llama3", "yarn") for kind in kinds)


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


def _batches(
    lengths: list[int], roomy: int, batch_size: int, crowded_together: int, context: int
) -> Iterator[list[int]]:
    """Which prompts to answer together.

    Those of more than ``roomy`` tokens are near the end of the context and come last, like with like; those that fill
    it do not come.
    """
    parts = [[i for i, length in enumerate(lengths) if length <= roomy]]
    crowded = [i for i, length in enumerate(lengths) if roomy < length < context]
    parts.append(sorted(crowded, key=lambda i: lengths[i]))
    for part, size in zip(parts, (batch_size, crowded_together), strict=True):
        for start in range(0, len(part), size):
            yield part[start : start + size]


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
        self, model: Any, decoding: Decoding, rooms: list[int], streamer: Any, should_stop: Callable[[], bool] | None
    ) -> list[list[int]]:
        """New tokens of each prompt, at most as many as it has room for."""
        config = GenerationConfig(
            max_new_tokens=max(rooms),
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
            stopping_criteria=StoppingCriteriaList(self._stopping(rooms, should_stop)),
            streamer=streamer,
        )
        return [ids[:room] for ids, room in zip(output[:, self.width :].tolist(), rooms, strict=True)]

    def _stopping(self, rooms: list[int], should_stop: Callable[[], bool] | None) -> Iterator[StoppingCriteria]:
        if min(rooms) < max(rooms):
            yield _Room(self.width + torch.tensor(rooms, device=self.ids.device))
        if should_stop:
            yield _Stop(should_stop)

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
