"""Cut a sequence to the lengths that a recipe allows, or split it into chunks."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .encode import Encoded


class CutParts(NamedTuple):
    """A sequence with its prompt and responses cut, and whether anything was lost of each."""

    sequence: Encoded
    prompt_cut: bool
    response_cut: bool


def cut_parts(
    encoded: Encoded, max_prompt_length: int | None, max_response_length: int | None, *, keep_end_token: bool
) -> CutParts:
    """Cut prompt and responses each to its own length, at their ends.

    As ``source_max_len`` and ``target_max_len`` in ``qlora.py`` of github.com/artidoro/qlora (QLoRA, Table 9), which
    also cuts off the end token: ``keep_end_token=False``.

    Args:
        encoded: A sequence.
        max_prompt_length: Maximum tokens before the first response, a begin token included; None for no limit.
        max_response_length: Maximum tokens of each response, its end token included; None for no limit.
        keep_end_token: Whether the last place of a response that is cut goes to its end token; never inside a thought
            or a call.
    """
    responses = encoded.trained if encoded.excluded is None else encoded.trained | encoded.excluded
    kept = np.ones(len(responses), dtype=bool)
    first = int(responses.argmax()) if responses.any() else len(responses)
    if max_prompt_length is not None:
        kept[max_prompt_length:first] = False
    prompt_cut = not kept.all()
    if max_response_length is not None:
        # Where stretches of responses begin and end, by turns.
        edges = np.flatnonzero(np.diff(np.concatenate([[False], responses, [False]]).astype(np.int8)))
        for begin, end in edges.reshape(-1, 2).tolist():
            if end - begin > max_response_length:
                last = begin + max_response_length
                ends = keep_end_token and _may_end(encoded, last - 1)
                kept[slice(last - 1, end - 1) if ends else slice(last, end)] = False
    return CutParts(
        encoded if kept.all() else encoded.at(kept), prompt_cut, bool((encoded.trained & ~kept)[first:].any())
    )


def cut_to_length(encoded: Encoded, max_length: int, *, keep_end_token: bool) -> tuple[Encoded, bool]:
    """Cut a sequence to ``max_length`` tokens.

    If the cut is inside a response, its last place goes to the response's end token, unless that is not to be kept, or
    the cut is inside a thought or a call: half of one is no answer. If the cut is in the request after a response,
    nothing of that request is left.

    Returns:
        The sequence, and whether trained tokens were lost.
    """
    if len(encoded.ids) <= max_length:
        return encoded, False
    lost = bool(encoded.trained[max_length:].any())
    trained = encoded.trained[:max_length]
    if not lost:
        return encoded.at(slice(max_length)), False
    # Trained on both sides of the cut. Otherwise it falls on the edge of a response, or in a request.
    inside_response = trained[-1] and encoded.trained[max_length]
    if inside_response and keep_end_token and _may_end(encoded, max_length - 1):
        if max_length >= 2 and not trained[-2]:  # only the end token of this response would be left
            return _up_to_last_trained(encoded.at(slice(max_length - 1))), True
        # The end token of this very response: templates may end turns in several ways.
        end = _end_of_stretch(encoded.trained, max_length)
        return encoded.at(np.append(np.arange(max_length - 1), end)), True
    # A request whose response is gone would be computed for nothing.
    return _up_to_last_trained(encoded.at(slice(max_length))), True


def _may_end(encoded: Encoded, place: int) -> bool:
    return encoded.unfinished is None or not encoded.unfinished[place]


def _up_to_last_trained(encoded: Encoded) -> Encoded:
    last = np.flatnonzero(encoded.trained)
    stop = int(last[-1]) + 1 if len(last) else 0
    return encoded.at(slice(stop))


def _end_of_stretch(trained: np.ndarray, inside: int) -> int:
    """Return the index of the last token of the trained stretch around index ``inside``."""
    after = np.flatnonzero(~trained[inside:])
    return inside + int(after[0]) - 1 if len(after) else len(trained) - 1


def split_into_chunks(encoded: Encoded, max_length: int) -> list[Encoded]:
    """Split plain text into chunks of ``max_length`` tokens, each token in exactly one.

    Each chunk begins with the begin token, if the tokenizer puts one before a text; only the last ends with the end
    token, and it holds more than that.

    Args:
        encoded: A sequence of which everything but a begin token is trained.
        max_length: Maximum tokens per chunk, at least 3 and the begin token.
    """
    if len(encoded.ids) <= max_length:
        return [encoded]
    begin = int(encoded.trained.argmax())
    edges = [*range(begin, len(encoded.ids), max_length - begin), len(encoded.ids)]
    if edges[-1] - edges[-2] == 1:  # the end token alone, which is nothing to learn
        edges[-2] -= 1
    head = np.arange(begin)
    return [encoded.at(np.append(head, np.arange(*edge))) for edge in pairwise(edges)]
