"""What was said in a chat, and how much of it the model still sees."""

from __future__ import annotations

from typing import Any

from ..data.examples import Message
from ..errors import UserInputError
from ..trained import Prompts


class Conversation:
    """Requests and answers in turn.

    Args:
        prompts: The model's; where its template takes one request, each request stands alone.
        room: Tokens that a prompt may have, so that an answer still fits into the context.
        system: A system message.

    Attributes:
        exchanges: All of them, each a request and its answer.

    Raises:
        UserInputError: If the template has no place for the system message.
    """

    def __init__(self, prompts: Prompts, room: int, system: str | None = None) -> None:
        self.prompts, self.room = prompts, room
        self.exchanges: list[tuple[str, str]] = []
        self._system: str | None = None
        self._first_seen = 0  # index of the oldest exchange that the model sees
        self.system = system

    @property
    def system(self) -> str | None:
        """The system message, from the next request on."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        check_system(self.prompts, text)
        self._system = text

    def prompt(self, request: str) -> tuple[list[int], int]:
        """Token ids of the conversation with one more request, and how many exchanges were forgotten for it.

        The oldest are, until there is room; forgotten ones stay so.
        """
        before = self._first_seen
        if not self.prompts.takes_conversations:
            return self.prompts.ids(self._messages(request, len(self.exchanges))), 0
        while True:
            ids = self.prompts.ids(self._messages(request, self._first_seen))
            if len(ids) <= self.room or self._first_seen == len(self.exchanges):
                return ids, self._first_seen - before
            self._first_seen += 1

    def add(self, request: str, answer: str) -> None:
        """Remember an exchange."""
        self.exchanges.append((request, answer))

    def reset(self) -> None:
        """Forget all but the system message."""
        self.exchanges, self._first_seen = [], 0

    def rows(self) -> list[dict[str, Any]]:
        """The whole conversation as a row of ``messages``; a row for each exchange, where each stood alone."""
        if self.prompts.takes_conversations:
            parts = [self.exchanges] if self.exchanges else []
        else:
            parts = [[exchange] for exchange in self.exchanges]
        return [{"messages": [*self._head(), *_messages(part)]} for part in parts]

    def _messages(self, request: str, first: int) -> list[Message]:
        return [*self._head(), *_messages(self.exchanges[first:]), {"role": "user", "content": request}]

    def _head(self) -> list[Message]:
        return [{"role": "system", "content": self._system}] if self._system else []


def check_system(prompts: Prompts, text: str | None) -> None:
    """Refuse a system message that the model would never see.

    Raises:
        UserInputError: If the template has no place for one, or leaves it out.
    """
    if text is None:
        return
    if not text.strip():
        raise UserInputError("the system message is blank.")
    if not prompts.takes_conversations:
        raise UserInputError(f"the prompt template {prompts.name} has no place for a system message.")
    shown = prompts.text([{"role": "system", "content": text}, {"role": "user", "content": "?"}])
    if text.strip() not in shown:
        raise UserInputError(f"the prompt template {prompts.name} leaves the system message out.")


def _messages(exchanges: list[tuple[str, str]]) -> list[Message]:
    said = []
    for request, answer in exchanges:
        said += [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    return said
