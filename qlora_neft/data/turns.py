"""The turns of a conversation: which are trained, and how a long conversation is split between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .examples import Dialogue, EmptyRow, Message

Measure = Callable[[Dialogue], int]
Turn = tuple[Message, bool]  # a message, and whether the loss is taken on it


def narrowed(dialogue: Dialogue, train_on: str, *, trains_prompts: bool) -> tuple[Dialogue, int]:
    """Narrow what a row lets be trained to what the recipe trains.

    Args:
        dialogue: A conversation with at least one response.
        train_on: The recipe's ``data.train_on``.
        trains_prompts: Whether requests are trained as well; else messages after the last trained one, which would
            train nothing, are left out.

    Returns:
        The conversation, and how many messages were left out.

    Raises:
        EmptyRow: If no response is left to train.
    """
    if dialogue.trained is None and train_on != "last-response":
        return dialogue, 0
    flags = dialogue.trained_turns
    if train_on == "last-response":
        last = max(i for i, message in enumerate(dialogue.messages) if message["role"] == "assistant")
        flags = tuple(flag and i == last for i, flag in enumerate(flags))
    if not any(flags):
        raise EmptyRow("has no response that is trained")
    stop = len(flags) if trains_prompts else max(i for i, flag in enumerate(flags) if flag) + 1
    return replace(dialogue, messages=dialogue.messages[:stop], trained=flags[:stop]), len(flags) - stop


def split_dialogue(dialogue: Dialogue, max_length: int, measure: Measure) -> list[Dialogue]:
    """Split a conversation into pieces of whole exchanges, as many in each piece as fit.

    The NEFTune paper splits ShareGPT "closer to a single-turn format" for its 512 tokens; FastChat's
    ``split_long_conversation.py`` is the model. Each turn is in exactly one piece, except a system message: it is never
    trained, and every piece repeats it. An exchange too long by itself becomes its own piece, to be cut and counted
    later. Pieces without a trained turn are left out.

    Args:
        dialogue: The conversation. An exchange begins at the first message after a response that is not itself one.
        max_length: Maximum number of tokens per piece.
        measure: Counts the tokens of a dialogue, including template and end tokens.
    """
    system, exchanges = _exchanges(dialogue)
    pieces: list[Dialogue] = []
    start = 0
    while start < len(exchanges):
        stop = start + 1
        while stop < len(exchanges) and measure(_piece(dialogue, system, exchanges[start : stop + 1])) <= max_length:
            stop += 1
        pieces.append(_piece(dialogue, system, exchanges[start:stop]))
        start = stop
    return [piece for piece in pieces if any(piece.trained_turns)]


def last_exchanges(dialogue: Dialogue, max_length: int, measure: Measure) -> Dialogue:
    """Return the last exchange with as many before it as fit: the context of a last response; as `split_dialogue`."""
    system, exchanges = _exchanges(dialogue)
    start = len(exchanges) - 1
    while start and measure(_piece(dialogue, system, exchanges[start - 1 :])) <= max_length:
        start -= 1
    return _piece(dialogue, system, exchanges[start:])


def _exchanges(dialogue: Dialogue) -> tuple[list[Turn], list[list[Turn]]]:
    turns = list(zip(dialogue.messages, dialogue.trained_turns, strict=True))
    system = [turn for turn in turns[:1] if turn[0]["role"] in ("system", "developer")]
    exchanges: list[list[Turn]] = []
    previous: Any = None
    for message, trained in turns[len(system) :]:
        # A tool's result answers the call before it, so the two stay together.
        if previous is None or (previous == "assistant" and message["role"] not in ("assistant", "tool")):
            exchanges.append([])
        exchanges[-1].append((message, trained))
        previous = message["role"]
    return system, exchanges


def _piece(dialogue: Dialogue, system: Sequence[Turn], exchanges: Sequence[Sequence[Turn]]) -> Dialogue:
    turns = [*system, *(turn for exchange in exchanges for turn in exchange)]
    trained = None if dialogue.trained is None else tuple(flag for _, flag in turns)
    return replace(dialogue, messages=tuple(message for message, _ in turns), trained=trained)
