"""A chat on a screen: requests, answers as they grow, and commands."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from ..adapter.load import Trained
from ..adapter.prompts import Prompts
from ..data.examples import Message
from ..display.preview_text import plural
from ..errors import RunFailed, RunInterrupted, UserInputError
from ..noise.streams import stream_key
from ..run_folder.stop import StopNow, StopRequest, answered
from .decode import Continuation, Decoding, context_of
from .generate import TextStream, answer_ids, text_stream
from .output import ChatRow, SavedChat
from .screen import Screen, Write

ADAPTER, BASE = "adapter", "base"
COMMANDS = {
    "/reset": "forget what was said (a system message stays)",
    "/save FILE": "write the conversation to a new file, one row of messages as training takes it",
    "/system TEXT": "set the system message from here on; without TEXT, remove it",
    "/help": "show this list",
    "/quit": "leave, as Ctrl-D does",
}
MORE_HELP = (
    "Ctrl-C stops an answer. A line that ends with \\ continues on the next. To say a line that begins with /, put a "
    "space before it."
)
NOTES = {  # by reason why an answer is not complete
    "interrupted": "(stopped)",
    "length": "(cut at --max-new-tokens or the end of the model's context)",
    "no room": "(no answer: the request fills the model's context. Shorten it)",
}


class Chat:
    """Passes what a user types to a trained model, and its answers back, until the user leaves.

    Args:
        trained: The model.
        decoding: How answers are chosen. Each answer draws its own numbers, so a repeated question may be answered
            differently; a whole chat repeats with its seed.
        screen: Where the user types and reads.
        compare: Show the base's answers next to the adapter's, each with its own history.
        base_alone: Talk to the base without the adapter.
        system: A system message; None for that of the training, if there was one, and an empty text for none.

    Raises:
        UserInputError: If the template has no place for the system message.
    """

    def __init__(
        self,
        trained: Trained,
        decoding: Decoding,
        screen: Screen,
        *,
        compare: bool = False,
        base_alone: bool = False,
        system: str | None = None,
    ) -> None:
        self.trained, self.decoding, self.screen = trained, decoding, screen
        names = [BASE, ADAPTER] if compare else [BASE] if base_alone else [ADAPTER]
        # An answer's share of the context is max_new_tokens, but at most a quarter, so that a prompt fits beside it.
        context = context_of(trained.model)
        max_prompt_tokens = context - min(decoding.max_new_tokens, context // 4)
        system = trained.prompts.system if system is None else system or None
        self.conversations = {name: Conversation(trained.prompts, max_prompt_tokens, system) for name in names}
        self._num_asked = 0
        self._saved = SavedChat()

    def run(self) -> None:
        """Read and answer until the input ends or the user leaves."""
        self.screen.say("/help lists the commands, /quit or Ctrl-D leaves.", style="dim")
        if not self.trained.prompts.takes_conversations:
            note = f"The prompt template {self.trained.prompts.name} takes one request: each stands alone."
            self.screen.say(note, style="dim")
        while (line := self._line()) is not None and line.split() != ["/quit"]:
            try:
                self._heard(line)
            # A refused request or a full memory ends the answer, not the chat.
            except (UserInputError, RunFailed) as error:
                self.screen.say(str(error), style="red")

    def ask(self, request: str) -> None:
        """Answer one request, on the screen and in the history.

        Raises:
            UserInputError: If the template has no place for it.
            RunFailed: If it does not fit in memory.
            RunInterrupted: On SIGTERM.
        """
        # All prompts first: a request that the template refuses is answered by neither side.
        prompts = {}
        for name, conversation in self.conversations.items():
            prompts[name], forgotten = conversation.prompt(request)
            if forgotten:
                what = f"{plural(forgotten, 'oldest exchange')} forgotten: the model's context is full"
                self.screen.say(f"({what})" if len(self.conversations) == 1 else f"({name}: {what})", style="dim")
        notes = []
        with self.screen.answers(list(prompts)) as begin:
            for name, ids in prompts.items():
                notes += self._answer(name, request, ids, begin(name))
        self._num_asked += 1
        for note in notes:
            self.screen.say(note, style="dim")

    def _answer(self, name: str, request: str, ids: list[int], write: Write) -> list[str]:
        """Write and remember one answer; return notes on it."""
        pieces: list[str] = []

        def write_and_keep(text: str) -> None:
            pieces.append(text)
            write(text)

        answer = self._continued(name, ids, text_stream(self.trained, write_and_keep))
        # The history holds what was shown, even where Ctrl-C cut it.
        text = "".join(pieces)
        if text:
            self.conversations[name].add(request, text)
        note = NOTES.get(answer.finish_reason) or ("" if text else "(no answer: the model ended at once)")
        prefix = f"{name}: " if len(self.conversations) > 1 else ""
        return [prefix + note] if note else []

    def _continued(self, name: str, ids: list[int], stream: TextStream) -> Continuation:
        """Answer one prompt. The first Ctrl-C ends the answer, a second one the program."""
        # Keyed by the request's number alone: both sides of a comparison draw the same numbers.
        decoding = replace(self.decoding, seed=stream_key("chat", self.decoding.seed, self._num_asked))
        # No grace: an answer can end after any token, unlike an optimizer step.
        with answered(StopRequest(grace_seconds=0, has_echoes=False)) as stop, self._voice(name):
            [answer] = answer_ids(self.trained, [ids], decoding, streamer=stream, should_stop=lambda: stop.requested)
        if stop.signal not in (None, signal.SIGINT):
            raise RunInterrupted(stop.signal, f"the chat ended on {stop.signal.name}")
        return answer

    def _voice(self, name: str) -> AbstractContextManager[None]:
        return self.trained.base_alone() if name == BASE else nullcontext()

    # ---- What the user types ----

    def _line(self) -> str | None:
        """Read what the user says next, with its continuation lines; None at the end of the input."""
        try:
            line = self.screen.read()
            while line is not None and line.endswith("\\"):
                # The input may end after a backslash.
                line = line[:-1] + "\n" + (self.screen.read() or "")
            return line
        except KeyboardInterrupt as error:
            if isinstance(error, StopNow) and error.signal != signal.SIGINT:
                raise
            # At the keyboard Ctrl-C drops the line; in a pipe there is none to drop, so it ends the program.
            if not self.screen.is_typed_to:
                raise
            self.screen.say("\n/quit or Ctrl-D leaves.", style="dim")
            return ""

    def _heard(self, line: str) -> None:
        if line.startswith("/"):
            name, _, rest = line.partition(" ")
            self._command(name, rest.strip())
        elif line.strip():
            self.ask(line.strip())

    def _command(self, name: str, rest: str) -> None:
        actions: dict[str, Callable[[str], str]] = {
            "/reset": self._reset,
            "/save": self._save,
            "/system": self._system,
            "/help": _help,
        }
        if name not in actions:
            raise UserInputError(f"there is no command {name}; /help lists them. Begin with a space to say it.")
        self.screen.say(actions[name](rest), style="dim")

    def _reset(self, _: str) -> str:
        for conversation in self.conversations.values():
            conversation.reset()
        return "(forgotten)"

    def _system(self, text: str) -> str:
        for conversation in self.conversations.values():
            conversation.system = text or None
        return "(the system message is set)" if text else "(no system message)"

    def _save(self, name: str) -> str:
        rows = {side: conversation.rows() for side, conversation in self.conversations.items()}
        return self._saved.write(name, rows, main=ADAPTER if ADAPTER in rows else BASE)


def _help(_: str) -> str:
    width = max(map(len, COMMANDS))
    return "\n".join([*(f"{name:<{width}}  {what}" for name, what in COMMANDS.items()), MORE_HELP])


class Conversation:
    """Requests and answers in turn.

    Args:
        prompts: The model's prompts; if their template takes one request, each request stands alone.
        max_prompt_tokens: Maximum tokens of a prompt, so that an answer still fits into the context.
        system: A system message.

    Attributes:
        exchanges: All of them, each a request and its answer.

    Raises:
        UserInputError: If the template has no place for the system message.
    """

    def __init__(self, prompts: Prompts, max_prompt_tokens: int, system: str | None = None) -> None:
        self.prompts, self.max_prompt_tokens = prompts, max_prompt_tokens
        self.exchanges: list[tuple[str, str]] = []
        self._system: str | None = None
        self._first_seen = 0  # index of the oldest exchange that the model sees
        # Through the setter, which checks it.
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
        """Return the token ids of the conversation with one more request, and how many exchanges were forgotten.

        The oldest exchanges are forgotten until the rest fits; they do not come back.
        """
        before = self._first_seen
        # Earlier exchanges are not in the prompt, so there is nothing to forget.
        if not self.prompts.takes_conversations:
            return self.prompts.ids(self._messages(request, len(self.exchanges))), 0
        while True:
            ids = self.prompts.ids(self._messages(request, self._first_seen))
            if len(ids) <= self.max_prompt_tokens or self._first_seen == len(self.exchanges):
                return ids, self._first_seen - before
            self._first_seen += 1

    def add(self, request: str, answer: str) -> None:
        """Remember an exchange."""
        self.exchanges.append((request, answer))

    def reset(self) -> None:
        """Forget all but the system message."""
        self.exchanges, self._first_seen = [], 0

    def rows(self) -> list[ChatRow]:
        """Return the conversation as one row of ``messages``, or one row per exchange if each stood alone."""
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
        UserInputError: If the template has no place for it, or drops it.
    """
    if text is None:
        return
    if not text.strip():
        raise UserInputError("the system message is blank.")
    if not prompts.takes_conversations:
        raise UserInputError(f"the prompt template {prompts.name} has no place for a system message.")
    # By example: some chat templates drop a system message without an error.
    shown = prompts.text([{"role": "system", "content": text}, {"role": "user", "content": "?"}])
    if text.strip() not in shown:
        raise UserInputError(f"the prompt template {prompts.name} leaves the system message out.")


def _messages(exchanges: list[tuple[str, str]]) -> list[Message]:
    said: list[Message] = []
    for request, answer in exchanges:
        said += [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    return said
