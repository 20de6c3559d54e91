"""What a chat template writes around turns and around calls, learned from a few conversations of our own."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise, product
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from .chat_markers import REASONING, mark, read_marks
from .chat_renderer import ChatRenderer, Messages
from .examples import BadRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Two exchanges, since many templates write the last response in another way than earlier ones.
PROBE: Messages = [{"role": role, "content": text} for text in ("one", "two") for role in ("user", "assistant")]
THOUGHT_TAGS = ("<think>", "</think>")
OPENED_THOUGHT = re.compile(r"<think>\s*$")


@dataclass(frozen=True)
class Wording:
    """The text a template writes around every turn.

    Attributes:
        after_request: From the end of a request to where its response is generated.
        header: The part of ``after_request`` that ``add_generation_prompt=True`` adds; may be empty.
        header_start: The part of the header that also precedes responses of earlier turns.
        ends: The special tokens after a response, mostly one, beginning with those after the last response.
        special: Matches any special token of the tokenizer, and any token that the template marks turns with.
        begins: Whether the text begins with the tokenizer's begin token.
        takes_thoughts: Whether it writes a thought that a message carries in a field of its own.
    """

    after_request: str
    header: str
    header_start: str
    ends: tuple[str, ...]
    special: re.Pattern[str]
    begins: bool
    takes_thoughts: bool


def learn_wording(renderer: ChatRenderer) -> Wording:
    """Learn what the template writes around turns, from an exchange or two.

    Raises:
        BadRow: If it cannot write one, or leaves out what was said.
    """
    around, before = _probe(renderer, PROBE[:2]), PROBE[:1]
    with suppress(BadRow):  # a template for a single exchange
        around, before = _probe(renderer, PROBE), PROBE[:-1]
    # The same place twice: between a request and a response to be generated, and, in ``around``, a recorded one.
    after_request = _probe(renderer, before, prompt=True)[-1]
    prompt, without = renderer.text(before, prompt=True), renderer.text(before)
    header = prompt.removeprefix(without) if prompt.startswith(without) else ""
    special = special_tokens(renderer.tokenizer, "".join([*around, after_request]))
    # RUF071: characters are meant, not parts of paths.
    common = commonprefix([after_request, around[1]]).removeprefix(after_request.removesuffix(header))  # noqa: RUF071
    # Up to a token or a line's end: "<think>" and "<tool_call>" share a bracket, which means nothing.
    whole = re.match(rf"(?s:.*)(?:{special.pattern}|\n)", common)
    start = common if common == header else whole.group() if whole else ""
    bos = renderer.tokenizer.bos_token
    begins = bos is not None and around[0].lstrip().startswith(str(bos))
    ends = _end_texts(around, header, special)
    return Wording(after_request, header, start, ends, special, begins, _takes_thoughts(renderer))


def special_tokens(tokenizer: PreTrainedTokenizerBase, written: str = "") -> re.Pattern[str]:
    """Return a pattern that matches any special token of a tokenizer, the longest first.

    Args:
        tokenizer: The tokenizer.
        written: What a chat template writes around turns. Added tokens in it that are not flagged special (DeepSeek's
            mark of a user's turn) mark turns as well; the tags of a thought, which a response may say, do not.
    """
    # `all_special_tokens` has the named ones alone: 2 of Llama 3.1's 256.
    added = [
        str(token)
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or (str(token).strip() and str(token) in written and str(token) not in THOUGHT_TAGS)
    ]
    # The longest first, because the first alternative of a pattern that fits wins.
    tokens = sorted({*tokenizer.all_special_tokens, *added} - {""}, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")  # (?!) matches nothing


def _probe(renderer: ChatRenderer, messages: Messages, *, prompt: bool = False) -> list[str]:
    """Return what the template writes before, between and after the contents of messages."""
    text, markers = read_marks(renderer.text(mark(messages), prompt=prompt))
    if [marker.owner for marker in markers] != [number for number in range(len(messages)) for _ in range(2)]:
        raise BadRow("it does not write each message's content once, in order")
    edges = [0, *(marker.position for marker in markers), len(text)]
    # Every second stretch is a content; those around them are the template's.
    return [text[begin:end] for begin, end in pairwise(edges)][::2]


def _takes_thoughts(renderer: ChatRenderer) -> bool:
    thinking = {**PROBE[1], **dict.fromkeys(REASONING, "three")}
    with suppress(BadRow):
        return "three" in renderer.text([PROBE[0], thinking])
    return False


def _end_texts(probe: list[str], header: str, special: re.Pattern[str]) -> tuple[str, ...]:
    """Return the special tokens after the last response of a probe, and those after others if they differ."""
    first = special.search(probe[-1])
    if first is None:
        return ()
    # Often several in a row: the end of the turn, then that of the text.
    run = re.match(f"(?:{special.pattern})+", probe[-1][first.start() :])
    assert run is not None  # at least ``first``
    several = run.group()
    between = probe[2] if len(probe) > 3 else several
    if several in between:  # every turn ends as the last one does
        return (several,)
    found = special.findall(between)
    # Another token after the turn before the last counts, unless it is the one that opens the next turn.
    other = len(found) > 1 and first.group() not in found and found[0] not in header
    return (first.group(), found[0]) if other else (first.group(),)


# ---- Calls ----

# Mistral's templates demand ids of nine letters and digits.
CALL_ID, NINE = "call_1", "callnrone"
ARGUMENTS = {"city": "Rome", "days": 2}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "A city"}}},
    },
}
# Arguments encoded twice, and a dictionary as Python prints it.
NOT_JSON = re.compile(r"""\\"city|\{'city""")


@dataclass(frozen=True)
class CallForm:
    """The form in which a template takes calls.

    Attributes:
        as_text: Arguments are JSON text, not an object.
        nulls: A call without words has None for its content, and the template must see it.
        nine: Ids are of nine letters and digits.
        end: The special token that ends a turn of calls; None if there is none that only ends the last of them.
    """

    as_text: bool = False
    nulls: bool = False
    nine: bool = False
    end: str | None = None


def learn_calls(renderer: ChatRenderer, special: re.Pattern[str]) -> CallForm | None:
    """Return the form in which a template writes calls, None if it writes them in no form."""
    for nine, nulls, as_text in product((False, True), (False, True), (False, True)):
        form = CallForm(as_text, nulls, nine)
        behind = _behind_calls(renderer, form, 1)
        if behind is not None:
            tokens = special.findall(behind)
            two = _behind_calls(renderer, form, 2, all_of_them=True)
            # A token behind every call ends none of the turns.
            ends = tokens and (two is None or special.findall(two).count(tokens[-1]) == 1)
            return CallForm(as_text, nulls, nine, tokens[-1] if ends else None)
    return None


def _behind_calls(renderer: ChatRenderer, form: CallForm, count: int, *, all_of_them: bool = False) -> str | None:
    """Return what follows the last call's arguments, or the first's; None if the template does not write the calls."""
    arguments: Any = json.dumps(ARGUMENTS) if form.as_text else ARGUMENTS
    function = {"name": "weather", "arguments": arguments}
    calls = [
        {"id": NINE if form.nine else CALL_ID, "type": "function", "function": dict(function)} for _ in range(count)
    ]
    calling = {"role": "assistant", "content": None if form.nulls else "", "tool_calls": calls}
    with suppress(BadRow):
        text = renderer.text([PROBE[0], calling], [TOOL], nulls=form.nulls)
        said = renderer.text([PROBE[0]], [TOOL], nulls=form.nulls)
        new = text[len(commonprefix([text, said])) :]  # noqa: RUF071  characters, no paths
        if new.count("Rome") < 1 or "weather" not in new or NOT_JSON.search(new):
            return None
        return new[new.find("Rome") if all_of_them else new.rfind("Rome") :]
    return None
