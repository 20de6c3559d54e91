"""A chat template in Ollama's language, where it writes each message on its own: something, the content, something.

The template is asked with conversations of marked contents, the pieces are cut out, put together again for other
conversations and compared. What does not come out byte for byte has no translation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..data.examples import BadRow
from ..errors import UserInputError
from ..trained import Prompts

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Pieces:
    """What a template writes around contents.

    Attributes:
        default: Before a conversation without a system message.
        around: By role, what stands before and behind a content; without ``system`` if the template refuses one.
        opening: What a response follows.
    """

    default: str
    around: dict[str, tuple[str, str]]
    opening: str

    def write(self, messages: Sequence[tuple[str, str]]) -> str:
        """A conversation that waits for a response."""
        head = "" if messages[0][0] == "system" else self.default
        turns = (self.around[role][0] + content + self.around[role][1] for role, content in messages)
        return head + "".join(turns) + self.opening


def chat_to_go(prompts: Prompts, tokenizer: Any) -> str | None:
    """The translation, None if there is none. The begin token at its start is left away."""
    pieces = _pieces(prompts)
    if pieces is None:
        return None
    bos = tokenizer.bos_token or ""
    default, around = pieces.default.removeprefix(bos), dict(pieces.around)
    if "system" in around:
        around["system"] = (around["system"][0].removeprefix(bos), around["system"][1])
    written = "".join([default, pieces.opening, *map("".join, around.values())])
    if "{{" in written or (bos and bos in written):
        return None
    head = "{{ if not .System }}" + default + "{{ end }}" if default else ""
    cases = "".join(
        f'{{{{ {"else " * (number > 0)}if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{behind}'
        for number, (role, (before, behind)) in enumerate(around.items())
    )
    return head + "{{ range .Messages }}" + cases + "{{ end }}{{ end }}" + pieces.opening


def _pieces(prompts: Prompts) -> Pieces | None:
    """The first way to cut the template's text into pieces that give it again; None if there is none."""
    one, two, system = (_ask(prompts, roles) for roles in ("u", "uau", "su"))
    if one is None or two is None:
        return None
    start, end = one  # default and the request's header; what ends it and the opening
    for opening, before_answer, behind_user in _ends(end, two[1]):
        for default, before_user, behind_answer in _starts(start, two[2], prompts.template.end):
            around = {"user": (before_user, behind_user), "assistant": (before_answer, behind_answer)}
            if system is not None and system[1].endswith(before_user):
                around = {"system": (system[0], system[1].removesuffix(before_user)), **around}
            found = Pieces(default, around, opening)
            if _is_faithful(found, prompts):
                return found
    return None


def _ends(end: str, to_answer: str) -> Iterator[tuple[str, str, str]]:
    """Ways to cut what stands behind the last request, in view of what stands before an answer."""
    for cut in range(len(end), -1, -1):
        if to_answer.startswith(end[:cut]):
            yield end[cut:], to_answer[cut:], end[:cut]


def _starts(start: str, to_request: str, end_of_turn: str | None) -> Iterator[tuple[str, str, str]]:
    """Ways to cut what stands before the first request, in view of what stands between an answer and the next."""
    ways = [
        (start[:cut], start[cut:], to_request.removesuffix(start[cut:]))
        for cut in range(len(start) + 1)
        if to_request.endswith(start[cut:])
    ]
    yield from sorted(ways, key=lambda way: end_of_turn is not None and end_of_turn not in way[2])


def _ask(prompts: Prompts, roles: str) -> list[str] | None:
    """What stands between marked contents of a conversation; None if the template refuses it."""
    contents = [f"content{number}of" for number in range(len(roles))]
    text = _written(prompts, [(_role(letter), content) for letter, content in zip(roles, contents, strict=True)])
    pieces = []
    for content in contents:
        if text is None or text.count(content) != 1:
            return None
        before, _, text = text.partition(content)
        pieces.append(before)
    return [*pieces, text]


def _role(letter: str) -> str:
    return next(role for role in _ROLES if role.startswith(letter))


def _written(prompts: Prompts, messages: Sequence[tuple[str, str]]) -> str | None:
    with suppress(BadRow, UserInputError):
        return prompts.text([{"role": role, "content": content} for role, content in messages])
    return None


def _is_faithful(pieces: Pieces, prompts: Prompts) -> bool:
    """Whether the pieces give what the template gives, for conversations of several lengths and contents."""
    for roles in ("u", "uau", "uauau", "su", "suau"):
        if roles.startswith("s") and "system" not in pieces.around:
            continue
        messages = [(_role(letter), f"{letter}{number}: one\ntwo") for number, letter in enumerate(roles)]
        if pieces.write(messages) != _written(prompts, messages):
            return False
    return True
