"""Answers on standard output or in a file: as text, as JSON lines, or as one JSON list."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.progress import track

from .generate import Reply

Replies = dict[str, Reply]  # of one request, by who answers: ``adapter``, ``base``


def entries(answers: Iterable[Replies], form: str, count: int) -> Iterator[str]:
    """Each request's answers as text that a line end follows.

    Args:
        answers: In order.
        form: ``text``, ``lines`` of JSON, or a JSON ``list``.
        count: How many there are.
    """
    for number, found in enumerate(answers, 1):
        if form == "text":
            yield _text(found, alone=count == 1)
            continue
        entry = json.dumps(_to_dict(found), ensure_ascii=False)
        if form == "list":
            entry = "[\n" * (number == 1) + entry + ("," if number < count else "\n]")
        yield entry


def with_progress(answers: Iterable[Replies], count: int) -> Iterator[Replies]:
    """A bar on the terminal of standard error, where there is one and more than one answer to wait for."""
    console = Console(stderr=True)
    is_seen = console.is_terminal and count > 1 and not sys.stdout.isatty()
    return iter(track(answers, "answers", count, console=console, transient=True, disable=not is_seen))


def remarks(found: Replies) -> list[str]:
    """What is to be said about answers that are not whole."""
    said = []
    for name, reply in found.items():
        where = reply.request.place + (f", {name}" if len(found) > 1 else "")
        if reply.finish_reason == "no room":
            said.append(
                f"{where}: no answer, the {reply.prompt_tokens} tokens of the prompt fill the model's context. "
                "Shorten it."
            )
        if reply.finish_reason == "length":
            said.append(f"{where}: cut after {reply.tokens} tokens, at --max-new-tokens or the context's end.")
    return said


def _to_dict(found: Replies) -> dict[str, object]:
    replies = list(found.values())
    more = {name: reply.to_dict() for name, reply in found.items()} if len(found) > 1 else replies[0].to_dict()
    return {**replies[0].request.to_dict(), "prompt_tokens": replies[0].prompt_tokens, **more}


def _text(found: Replies, *, alone: bool) -> str:
    prompt = [] if alone else _quoted(next(iter(found.values())))
    if len(found) == 1:
        answers: Sequence[str] = [reply.text for reply in found.values()]
    else:
        answers = [f"{name}:\n{reply.text}" for name, reply in found.items()]
    return "\n".join([*prompt, *answers]) + ("" if alone else "\n")


def _quoted(reply: Reply) -> list[str]:
    said = reply.request.to_dict()
    return [f"> {line}" for part in ("prompt", "input") for line in said.get(part, "").splitlines()]
