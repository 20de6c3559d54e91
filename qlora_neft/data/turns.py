"""Long conversations, split on turn boundaries into pieces that fit."""

from __future__ import annotations

from collections.abc import Callable

from .examples import Dialogue, Message

Measure = Callable[[Dialogue], int]


def split_dialogue(dialogue: Dialogue, max_length: int, measure: Measure) -> list[Dialogue]:
    """Split a conversation into pieces of whole exchanges, as many in each as fit.

    The NEFTune paper splits ShareGPT "closer to a single-turn format" for its 512 tokens (section 4); FastChat's
    ``split_long_conversation.py`` is the model. Every turn lands in one piece; only a system message, which is never
    trained, stands in each. An exchange that does not fit alone is a piece of its own, to be cut and counted later.

    Args:
        dialogue: What to split; each exchange begins with the first message after a response that is not one.
        max_length: Tokens per piece at most.
        measure: Tokens of a dialogue, template and end tokens included.
    """
    system, exchanges = _exchanges(dialogue.messages)
    pieces: list[Dialogue] = []
    start = 0
    while start < len(exchanges):
        stop = start + 1
        while stop < len(exchanges) and measure(_piece(dialogue, system, exchanges[start : stop + 1])) <= max_length:
            stop += 1
        pieces.append(_piece(dialogue, system, exchanges[start:stop]))
        start = stop
    return pieces


def _exchanges(messages: tuple[Message, ...]) -> tuple[list[Message], list[list[Message]]]:
    system = [message for message in messages[:1] if message["role"] in ("system", "developer")]
    exchanges: list[list[Message]] = []
    previous = None
    for message in messages[len(system) :]:
        # The result of a tool answers the call before it: the two belong together.
        if previous is None or (previous == "assistant" and message["role"] not in ("assistant", "tool")):
            exchanges.append([])
        exchanges[-1].append(message)
        previous = message["role"]
    return system, exchanges


def _piece(dialogue: Dialogue, system: list[Message], exchanges: list[list[Message]]) -> Dialogue:
    return Dialogue((*system, *(message for exchange in exchanges for message in exchange)), dialogue.tools)
