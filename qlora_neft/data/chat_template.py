"""Render conversations by a chat template, the tokenizer's own or the user's, and find the text that is trained.

Every assistant turn is trained, from the end of the generation prompt through the token that ends the turn: what the
model will have to write. Stock templates do not mark that text, so it is searched for (see `chat_markers`); a template
with ``{% generation %}`` marks says itself what is trained.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, cast

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from ..errors import UserInputError
from .chat_markers import AMBIGUOUS, Span, TurnFinder, Wording, mark, read_marks
from .examples import BadRow, Message, Piece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Raised by templates about conversations they were not written for; ValueError by transformers itself.
REFUSALS = (TemplateError, TypeError, ValueError, AttributeError, LookupError)
GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
Messages = list[dict[str, Any]]
# Two exchanges, since many templates write the last response in another way than earlier ones.
PROBE: Messages = [{"role": role, "content": text} for text in ("one", "two") for role in ("user", "assistant")]


class ChatTemplate:
    """Renders conversations and finds the responses in them.

    Args:
        tokenizer: A Hugging Face tokenizer.
        chat_template: The user's Jinja text; None for the tokenizer's own template.
        name: ``chat`` or a path, as the recipe says; for messages.

    Raises:
        UserInputError: If there is no template, it does not compile, or it cannot write a plain exchange.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None, name: str = "chat"
    ) -> None:
        self.tokenizer, self.chat_template, self.name = tokenizer, chat_template, name
        if chat_template is None and not tokenizer.chat_template:
            raise UserInputError(
                f"data.prompt_template: {name} is the tokenizer's own chat template, and the tokenizer of "
                f"{tokenizer.name_or_path!r} has none. Set it to alpaca, vicuna or a Jinja file, or set "
                "model.name_or_path to an instruction-tuned model."
            )
        try:
            self._wording = self._learn()
        except BadRow as error:
            raise UserInputError(self._unusable(error)) from error

    @property
    def end_of_turn(self) -> str | None:
        """The special token that the template writes after an assistant turn; None if it writes none.

        If turns end differently, the last turn's, where the model stops; of several tokens, the last. Earlier turns
        that end without a special token are trained to the end of their contents.
        """
        ends = self._wording.ends
        return self._wording.special.findall(ends[0])[-1] if ends else None

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> list[Piece]:
        """Return the conversation's text in pieces, trained and untrained ones alternating.

        Joined, the pieces are byte for byte the text of ``apply_chat_template``. Contents that are lists of text parts
        are joined first.

        Raises:
            BadRow: If there is no assistant turn, or the template refuses the conversation or hides a response.
        """
        plain, described = plain_messages(messages), _listed(tools)
        if not any(message.get("role") == "assistant" for message in plain):
            raise BadRow("has no assistant turn")
        text = self._apply(plain, described)
        template = self.tokenizer.get_chat_template(self.chat_template, described)
        find = self._spans_marked if GENERATION_MARK.search(template) else self._spans_found
        return _pieces(text, find(text, plain, described))

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """Return the text of a conversation up to where the next assistant turn begins.

        Raises:
            BadRow: If the template refuses the conversation.
        """
        return self._apply(plain_messages(messages), _listed(tools), prompt=True)

    def _apply(self, messages: Messages, tools: list[Any] | None = None, *, prompt: bool = False) -> str:
        with _refusals():
            text = self.tokenizer.apply_chat_template(
                messages, tools, chat_template=self.chat_template, tokenize=False, add_generation_prompt=prompt
            )
        assert isinstance(text, str)  # since it is not tokenized
        return text

    def _spans_found(self, text: str, messages: Messages, tools: list[Any] | None) -> list[Span]:
        def first_messages(count: int, *, prompt: bool) -> str | None:
            with suppress(BadRow):  # a template may refuse half a conversation
                return self._apply(messages[:count], tools, prompt=prompt)
            return None

        for options in _ways_to_mark(messages):
            with suppress(BadRow):  # it may accept the messages and refuse them marked
                # Markers may send a template down another branch. Only if the text is otherwise the same do they tell
                # places in it.
                marked, markers = read_marks(self._apply(mark(messages, **options), tools))
                if marked == text:
                    break
        else:
            raise BadRow(AMBIGUOUS)
        return TurnFinder(text, messages, markers, self._wording, first_messages).spans()

    def _spans_marked(self, text: str, messages: Messages, tools: list[Any] | None) -> list[Span]:
        """Return the stretches the template marks, each extended by its end token if the marks leave it out."""
        # Newer versions of transformers drop keys without a value before rendering; older ones do not.
        dense = [{key: value for key, value in message.items() if value is not None} for message in messages]
        for conversation in (dense, messages):
            with suppress(BadRow):
                rendered, found = self._render_marked(conversation, tools)
                if rendered == text:
                    break
        else:
            raise BadRow(AMBIGUOUS)
        ends = self._wording.ends
        behind = {end: [len(token) for token in ends if text.startswith(token, end)] for _, end in found}
        spans = sorted((begin, end + max(behind[end], default=0)) for begin, end in found)
        if not any(begin < end for begin, end in spans):
            raise BadRow("the chat template's {% generation %} marks cover nothing of it")
        return spans

    def _render_marked(self, conversation: Messages, tools: list[Any] | None) -> tuple[str, list[Span]]:
        # apply_chat_template makes a mask over tokens of the marks; the characters they cover come from its renderer
        # alone.
        tokens: dict[str, Any] = dict(self.tokenizer.special_tokens_map)
        with _refusals():
            # Both are lists with an entry per conversation; upstream annotates the second as text.
            rendered, spans = cast(
                "tuple[list[str], list[list[Span]]]",
                render_jinja_template(
                    conversations=[conversation],
                    tools=tools,
                    chat_template=self.tokenizer.get_chat_template(self.chat_template, tools),
                    return_assistant_tokens_mask=True,
                    **tokens,
                ),
            )
        return rendered[0], spans[0]

    def _learn(self) -> Wording:
        """Learn what the template writes around turns, from an exchange or two.

        Raises:
            BadRow: If it cannot write one, or leaves out what was said.
        """
        around, before = self._probe(PROBE[:2]), PROBE[:1]
        with suppress(BadRow):  # a template for a single exchange
            around, before = self._probe(PROBE), PROBE[:-1]
        # The same place twice: between a request and a response to be generated, and, in ``around``, a recorded one.
        after_request = self._probe(before, prompt=True)[-1]
        prompt, without = self._apply(before, prompt=True), self._apply(before)
        header = prompt.removeprefix(without) if prompt.startswith(without) else ""
        special = special_tokens(self.tokenizer)
        # RUF071: characters are meant, not parts of paths.
        common = commonprefix([after_request, around[1]]).removeprefix(after_request.removesuffix(header))  # noqa: RUF071
        # Up to a token or a line's end: "<think>" and "<tool_call>" share a bracket, which means nothing.
        whole = re.match(rf"(?s:.*)(?:{special.pattern}|\n)", common)
        start = common if common == header else whole.group() if whole else ""
        return Wording(after_request, header, start, _end_texts(around, header, special), special)

    def _probe(self, messages: Messages, *, prompt: bool = False) -> list[str]:
        """Return what the template writes before, between and after the contents of messages."""
        text, markers = read_marks(self._apply(mark(messages), prompt=prompt))
        if [marker.owner for marker in markers] != [number for number in range(len(messages)) for _ in range(2)]:
            raise BadRow("it does not write each message's content once, in order")
        edges = [0, *(marker.position for marker in markers), len(text)]
        # Every second stretch is a content; those around them are the template's.
        return [text[begin:end] for begin, end in pairwise(edges)][::2]

    def _unusable(self, error: BadRow) -> str:
        syntax = error.__cause__ if isinstance(error.__cause__, TemplateSyntaxError) else None
        reason = f"line {syntax.lineno}: {syntax.message}" if syntax else str(error)
        rule = "must be a valid Jinja template" if syntax else "must write a request and its response"
        if self.chat_template is None:
            what, remedy = "the tokenizer's own chat template", "Set it to alpaca, vicuna or a Jinja file."
        else:
            what, remedy = repr(self.name), "Fix the file, or set chat for the tokenizer's own template."
        return f"data.prompt_template: {what} {rule} ({reason}). {remedy}"


def plain_messages(messages: Sequence[Message]) -> Messages:
    """Return messages as dictionaries whose contents are strings, None or missing, text parts joined.

    Raises:
        BadRow: If a content is anything else.
    """
    plain = [dict(message) for message in messages]
    for number, message in enumerate(plain):
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            message["content"] = _joined(content, number)
    return plain


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern that matches any special token of a tokenizer, the longest first."""
    # `all_special_tokens` has the named ones alone: 2 of Llama 3.1's 256.
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    # The longest first, because the first alternative of a pattern that fits wins.
    tokens = sorted({*tokenizer.all_special_tokens, *added} - {""}, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")  # (?!) matches nothing


@contextmanager
def _refusals() -> Generator[None, None, None]:
    try:
        yield
    except REFUSALS as error:
        raise BadRow(f"the chat template refuses it: {error}") from error


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


def _ways_to_mark(messages: Sequence[Message]) -> list[dict[str, bool]]:
    """Return options of `mark`, the most informative first; few rows need more than the first."""
    has_blank = any(not message["content"].strip() for message in messages if message.get("content") is not None)
    # Without a blank content the first two would mark the same.
    return [{}] * has_blank + [{"blanks": False}, {"blanks": False, "requests": False}]


def _listed(tools: Sequence[Mapping[str, Any]] | None) -> list[Any] | None:
    """Return the tools as upstream takes them: a list, None for none."""
    return list(tools) if tools else None


def _joined(content: Any, number: int) -> str:
    parts = content if isinstance(content, (list, tuple)) else [content]
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise BadRow(f"message {number + 1} has content that is not text")
    return "".join(part["text"] for part in parts)


def _pieces(text: str, spans: Sequence[Span]) -> list[Piece]:
    """Cut the text at the ends of trained stretches, which are in order; stretches that touch become one."""
    pieces: list[Piece] = []
    position = 0
    for begin, end in [*spans, (len(text), len(text))]:
        begin = max(begin, position)  # the end token that extended one stretch may begin the next
        for stretch, trained in ((text[position:begin], False), (text[begin:end], True)):
            if stretch and pieces and pieces[-1].trained == trained:
                pieces[-1] = Piece(pieces[-1].text + stretch, trained)
            elif stretch:
                pieces.append(Piece(stretch, trained))
        position = max(position, end)
    return pieces
