"""How answers are chosen, token by token: greedily or by sampling, with a repetition penalty, in batches.

An answer depends on its prompt, the weights and `Decoding` alone: not on the rest of its batch, nor on the base's
``generation_config.json``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from ..errors import UserInputError, first_line
from ..noise.streams import preserved_rng, stream_key, uniform_draws


@dataclass(frozen=True)
class Decoding:
    """How an answer is chosen.

    Attributes:
        max_new_tokens: Maximum number of new tokens.
        min_new_tokens: Do not end an answer before it has this many (the paper's Table 5 takes 250); 0: no minimum.
        do_sample: Sample tokens; without it, take the most likely one.
        temperature: Divides the logits before sampling.
        top_p: Sample from the most likely tokens that together have this probability.
        top_k: Sample from at most this many tokens; 0: from all.
        repetition_penalty: Penalty on tokens of the prompt and the answer so far (1: none), see `RepetitionPenalty`.
            NEFTune's authors decode greedily with 1.2 (arXiv:2310.05914, appendix, "Additional Ablation Studies").
        seed: Seed of the sampling.

    Raises:
        UserInputError: If a value is out of its range.
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
        # Each rule is stated as what must hold, so that NaN, of which no comparison is true, breaks it too.
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
                "must be above 0 (to take the most likely token, do not sample)",
            ),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "must be 0 (all tokens) or more"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "must be above 0; 1 is none"),
        )
        for name, is_kept, rule in rules:
            if not is_kept:
                raise UserInputError(f"{name}: {rule}, got {getattr(self, name)}.")


@dataclass(frozen=True)
class Continuation:
    """The answer to a prompt.

    Attributes:
        index: The prompt's place in the list.
        ids: The answer's token ids, without the stop token.
        finish_reason: ``stop``: it ended; ``length``: cut at ``max_new_tokens`` or at the end of the model's context;
            ``no room``: the prompt fills the context; ``interrupted``: ``should_stop`` ended it.
    """

    index: int
    ids: list[int]
    finish_reason: str


def continuations(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    batch_size: int,
    stop_token_ids: Sequence[int] = (),
    streamer: BaseStreamer | None = None,
    should_stop: Callable[[], bool] | None = None,
    first_number: int = 0,
) -> Iterator[Continuation]:
    """Answer prompts, padded on the left. Apart from rounding, an answer does not depend on its batch.

    Args:
        model: A causal LM, with or without adapter; left in the mode it was in.
        tokenizer: The model's tokenizer.
        prompts: Token ids of each prompt.
        decoding: How tokens are chosen.
        batch_size: Prompts per forward pass.
        stop_token_ids: Tokens that end an answer; by default the tokenizer's end token.
        streamer: Receives the tokens as they are chosen; needs a ``batch_size`` of 1.
        should_stop: Called after every token; True ends all answers of the batch there.
        first_number: Number of the first prompt, a part of every draw's key: with it, two halves of a list are
            sampled as the whole list would be.

    Yields:
        One continuation per prompt, batch by batch; prompts near the end of the model's context come last.
    """
    # An empty list would let every answer run to its limit.
    stops = list(stop_token_ids) or [tokenizer.eos_token_id]
    lengths, context = [len(prompt) for prompt in prompts], context_of(model)
    # Near the context's end rows go one by one, unless a finished one may run past it as padding.
    crowded_batch = batch_size if may_outrun_its_context(model.config) else 1
    for part in _batches(lengths, context - decoding.max_new_tokens, batch_size, crowded_batch, context):
        batch = _Batch(tokenizer, [prompts[i] for i in part], [first_number + i for i in part], stops, model.device)
        limits = [min(context - lengths[i], decoding.max_new_tokens) for i in part]
        with _answering(model):
            found = batch.answers(model, decoding, limits, streamer, should_stop)
        for index, ids, limit in zip(part, found, limits, strict=True):
            answer = _up_to_stop(ids, stops)
            # Short of its limit and without a stop token: `should_stop` ended it.
            cut = "interrupted" if len(ids) < limit else "length"
            yield Continuation(index, answer, "stop" if len(answer) < len(ids) else cut)
    for i, length in enumerate(lengths):
        if length >= context:
            yield Continuation(i, [], "no room")


def generate_ids(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    batch_size: int,
    stop_token_ids: Sequence[int] = (),
) -> Iterator[tuple[int, list[int]]]:
    """Yield index and answer's token ids of each prompt, as `continuations`, omitting prompts that fill the context."""
    found = continuations(model, tokenizer, prompts, decoding, batch_size=batch_size, stop_token_ids=stop_token_ids)
    for continuation in found:
        if continuation.finish_reason != "no room":
            yield continuation.index, continuation.ids


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decode one sequence, without special tokens."""
    return cast("str", tokenizer.decode(list(ids), skip_special_tokens=True))  # a list of texts for a batch alone


def context_of(model: PreTrainedModel | PeftModel) -> int:
    """Return the maximum number of tokens of a prompt and its answer together."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def may_outrun_its_context(config: PreTrainedConfig) -> bool:
    """Return whether a finished row may run on past the context, as padding that nobody reads, while others go on.

    True for rotary positions that are computed from each position's number alone. Learned position embeddings end with
    the context, and dynamic NTK and LongRoPE compute every row's positions from the longest row.
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    # Models with sliding layers hold one set of parameters for each kind of layer.
    kinds = [rope] if "rope_type" in rope else list(rope.values())
    known = ("default", "linear", "llama3", "yarn")
    # None for a kind of layer without any.
    return bool(kinds) and all(kind is not None and kind["rope_type"] in known for kind in kinds)


# ---- Choosing a token ----


class RepetitionPenalty(LogitsProcessor):
    """Makes tokens that occurred before less likely: divides positive logits, multiplies negative ones.

    Differs from transformers' processor in two ways. Padding does not count: there, a shorter prompt of a batch loses
    its pad token, which often is the end token. Tokens that end an answer are never penalized: they follow every
    earlier turn of a conversation, and are not repetition.

    Args:
        penalty: Above 1 against repetition (Keskar et al. 2019, CTRL, section 4.1, arXiv:1909.05858).
        is_padding: Padding of the prompts, bool (B, T), on the left.
        stop_token_ids: Tokens that end an answer.
    """

    def __init__(self, penalty: float, is_padding: Tensor, stop_token_ids: Sequence[int]) -> None:
        self.penalty, self.is_padding = penalty, is_padding
        self.stop_token_ids = torch.tensor(list(stop_token_ids), device=is_padding.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the penalized logits (B, V) after ``input_ids`` (B, T + new tokens)."""
        width, vocabulary = self.is_padding.shape[1], scores.shape[1]
        spared = torch.isin(input_ids, self.stop_token_ids)
        spared[:, :width] |= self.is_padding
        # (B, V + 1): spared tokens are marked in a column of their own, which is dropped.
        seen = torch.zeros(len(scores), vocabulary + 1, dtype=torch.bool, device=scores.device)
        seen.scatter_(1, input_ids.masked_fill(spared, vocabulary), True)
        # Dividing a negative logit would make it more likely.
        penalized = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(seen[:, :vocabulary], penalized, scores)


class KeyedDraw(LogitsProcessor):
    """Samples each next token with a random number that is a function of (seed, prompt, position) alone.

    Every other token's logit becomes minus infinity, so that greedy search takes the sampled one. Tokens lie along
    [0, 1) in the order of the vocabulary, not sorted by probability: rounding, which differs between batches, would
    change such an order, but rarely changes which token covers a number.

    Args:
        seed: Seed of all draws.
        prompts: Number of each prompt in the batch, (B,).
        width: Tokens of the padded prompts.
    """

    def __init__(self, seed: int, prompts: Sequence[int], width: int) -> None:
        self.keys, self.width = [stream_key("sampling", seed, number) for number in prompts], width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the logits (B, V), all but one per row minus infinity."""
        position = input_ids.shape[1] - self.width
        # On the CPU and in float64, so that every device gets the same numbers and compares them alike.
        draws = uniform_draws([1] * len(self.keys), [(key, position) for key in self.keys], torch.device("cpu"))
        draw = torch.tensor([[number.item()] for number in draws], dtype=torch.float64).to(scores.device)  # (B, 1)
        reach = scores.double().softmax(dim=1).cumsum(dim=1)  # (B, V): where each token's stretch of [0, 1) ends
        # The last end is 1 but for rounding; scaling by it keeps the draw inside the vocabulary.
        # right=True: a draw on a boundary goes to the token above it, so one of probability 0 is never chosen.
        chosen = torch.searchsorted(reach, draw * reach[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


# ---- One batch ----


class _Batch:
    """Prompts as one tensor, padded on the left, and what chooses their next tokens."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: list[Sequence[int]],
        numbers: list[int],
        stops: list[int],
        device: torch.device,
    ) -> None:
        self.width, self.numbers, self.stops = max(len(row) for row in rows), numbers, stops
        # Any token would do: padding is masked in the prompt and cut off the answer.
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.ids = torch.tensor([[self.pad] * (self.width - len(row)) + list(row) for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        # By length and not by token: a prompt may contain the pad token itself.
        self.is_padding = torch.arange(self.width, device=device) < self.width - lengths[:, None]  # (B, T)

    def answers(
        self,
        model: PreTrainedModel | PeftModel,
        decoding: Decoding,
        limits: list[int],
        streamer: BaseStreamer | None,
        should_stop: Callable[[], bool] | None,
    ) -> list[list[int]]:
        """Return the new tokens of each prompt, at most its limit; past its end a row is padding."""
        config = GenerationConfig(
            max_new_tokens=max(limits),
            do_sample=False,  # `KeyedDraw` leaves one token: the most likely
            use_cache=True,
            pad_token_id=self.pad,
            eos_token_id=self.stops,
        )
        generate = cast("Any", model).generate  # upstream declares it on the classes of the architectures alone
        try:
            output = generate(
                input_ids=self.ids,
                attention_mask=(~self.is_padding).long(),
                generation_config=config,
                logits_processor=LogitsProcessorList(self._processors(decoding)),
                stopping_criteria=StoppingCriteriaList(self._stopping(limits, should_stop)),
                streamer=streamer,
            )
        except UserInputError:
            raise
        except (NotImplementedError, ValueError) as error:
            raise _cannot_generate(model, error) from error
        return [ids[:limit] for ids, limit in zip(output[:, self.width :].tolist(), limits, strict=True)]

    def _processors(self, decoding: Decoding) -> Iterator[LogitsProcessor]:
        # In transformers' order; the draw comes last, on the distribution that the others have shaped.
        if decoding.repetition_penalty != 1:
            yield RepetitionPenalty(decoding.repetition_penalty, self.is_padding, self.stops)
        if decoding.min_new_tokens:
            device = str(self.ids.device)
            yield MinNewTokensLengthLogitsProcessor(self.width, decoding.min_new_tokens, self.stops, device=device)
        if not decoding.do_sample:
            return
        # float: transformers refuses an int, such as a caller's temperature=1.
        yield TemperatureLogitsWarper(float(decoding.temperature))
        if decoding.top_k:
            yield TopKLogitsWarper(decoding.top_k)
        if decoding.top_p < 1:
            yield TopPLogitsWarper(decoding.top_p)
        yield KeyedDraw(decoding.seed, self.numbers, self.width)

    def _stopping(self, limits: list[int], should_stop: Callable[[], bool] | None) -> Iterator[StoppingCriteria]:
        # Equal limits are `max_new_tokens` already.
        if min(limits) < max(limits):
            yield _ContextEnd(self.width + torch.tensor(limits, device=self.ids.device))
        if should_stop:
            yield _OnRequest(should_stop)


class _ContextEnd(StoppingCriteria):
    """Ends each answer where the model's context does."""

    def __init__(self, ends: Tensor) -> None:
        self.ends = ends  # (B,): width of padded prompt and answer together

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] >= self.ends


class _OnRequest(StoppingCriteria):
    """Ends all answers once a function says so."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self.should_stop = should_stop

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.should_stop(), device=input_ids.device)


def _cannot_generate(model: PreTrainedModel | PeftModel, error: Exception) -> UserInputError:
    """Return a refusal of upstream's as one message: some families train, but their caches do not fit their layers."""
    kind = type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__
    return UserInputError(
        f"model.name_or_path: {kind} cannot answer ({type(error).__name__}: {first_line(error)}). It can be trained "
        "without answers (machine.eval_answers=0); to generate, choose another base."
    )


@contextmanager
def _answering(model: PreTrainedModel | PeftModel) -> Generator[None, None, None]:
    """Switch to eval mode, without gradients and without the base's own generation settings.

    What a config passed to ``generate`` leaves unset, transformers takes from the base's ``generation_config.json``; so
    that is replaced meanwhile.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    was_training, own = model.training, base.generation_config
    model.eval()
    base.generation_config = GenerationConfig()
    try:
        # preserved_rng: answers in the middle of training must not move the streams that training draws from.
        with torch.no_grad(), preserved_rng():
            yield
    finally:
        base.generation_config = own
        model.train(was_training)


def _batches(lengths: list[int], roomy: int, batch_size: int, crowded_batch: int, context: int) -> Iterator[list[int]]:
    """Yield the indices of prompts to answer together.

    Prompts of more than ``roomy`` tokens are near the end of the context and come last, like lengths together; those
    that fill the context are omitted.
    """
    parts = [[i for i, length in enumerate(lengths) if length <= roomy]]
    crowded = [i for i, length in enumerate(lengths) if roomy < length < context]
    parts.append(sorted(crowded, key=lambda i: lengths[i]))
    for part, size in zip(parts, (batch_size, crowded_batch), strict=True):
        for start in range(0, len(part), size):
            yield part[start : start + size]


def _up_to_stop(answer: list[int], stop_token_ids: Sequence[int]) -> list[int]:
    stops = (i for i, token in enumerate(answer) if token in stop_token_ids)
    return answer[: next(stops, len(answer))]
