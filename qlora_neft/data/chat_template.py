"""Render conversations by a chat template, the tokenizer's own or the user's, and find the text that is trained.

An assistant's turn is trained from the end of the generation prompt through the token that ends the turn: what the
model will have to write. Stock templates do not mark that text, so it is searched for (see `chat_turns`); a template
with ``{% generation %}`` marks says itself what is trained.

Many templates drop the thoughts of earlier turns, as generation does. A turn whose thought the conversation as a whole
does not show becomes a sequence of its own: the conversation up to it, in which it alone is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateSyntaxError

from ..errors import UserInputError
from .chat_markers import AMBIGUOUS, CONTENT, Span, marked, read_marks, thought_and_answer, ways_to_mark
from .chat_messages import plain_messages, taken
from .chat_renderer import ChatRenderer, Messages
from .chat_sequence import NO_CALL, Shown, in_pieces
from .chat_turns import Rendering, Turn, TurnFinder, by_message, rendering_of, without_markers
from .chat_wording import OPENED_THOUGHT, learn_calls, learn_wording
from .examples import BadRow, Dialogue, EmptyRow, Message, Piece, Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatTemplate:
    """Renders conversations and finds the responses in them.

    Args:
        tokenizer: A Hugging Face tokenizer.
        chat_template: The user's Jinja text; None for the tokenizer's own template.
        name: ``chat`` or a path, as the recipe says; for messages.
        kwargs: ``data.chat_template_kwargs``, for the template's eyes.

    Raises:
        UserInputError: If there is no template, it does not compile, it cannot write a plain exchange, or it never
            reads one of ``kwargs``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        name: str = "chat",
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.chat_template, self.name = chat_template, name
        if chat_template is None and not tokenizer.chat_template:
            raise UserInputError(
                f"data.prompt_template: {name} is the tokenizer's own chat template, and the tokenizer of "
                f"{tokenizer.name_or_path!r} has none. Set it to alpaca, vicuna or a Jinja file, or set "
                "model.name_or_path to an instruction-tuned model."
            )
        self.renderer = ChatRenderer(tokenizer, chat_template, kwargs)
        try:
            self.renderer.check_kwargs()
            self.wording = learn_wording(self.renderer)
        except BadRow as error:
            raise UserInputError(self._unusable(error)) from error
        self.calls = learn_calls(self.renderer, self.wording.special)
        self._ends = tuple(filter(None, (self.end_of_turn, self.end_of_call)))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer whose tokens the template writes."""
        return self.renderer.tokenizer

    @property
    def end_of_turn(self) -> str | None:
        """The special token that the template writes after an assistant turn; None if it writes none.

        If turns end differently, the last turn's, where the model stops; of several tokens, the last. Earlier turns
        that end without a special token are trained to the end of their contents.
        """
        ends = self.wording.ends
        return self.wording.special.findall(ends[0])[-1] if ends else None

    @property
    def end_of_call(self) -> str | None:
        """The special token that ends a turn of calls, where the model stops for their results; None if there is none.

        Mostly it is `end_of_turn`; GPT-OSS has ``<|call|>``.
        """
        return self.calls.end if self.calls else None

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> list[Piece]:
        """Return the whole conversation's text in pieces, the assistant's turns and the rest alternating.

        Joined, the pieces are byte for byte the text of ``apply_chat_template``. Contents that are lists of text parts
        are joined first.

        Raises:
            BadRow: If there is no assistant turn, or the template refuses the conversation or hides a response.
        """
        taken, described = self._taken(messages), _listed(tools)
        numbers = _responses(taken)
        rendering, turns = self._found(taken, described, numbers)
        return in_pieces(rendering.text, turns)

    def sequences(self, dialogue: Dialogue) -> Rendered:
        """Return what is trained of a conversation: one text, or several where one cannot show every thought.

        Raises:
            BadRow: If the template refuses the conversation, or leaves out something that is trained, or that a trained
                turn answers.
            EmptyRow: If no turn is trained.
        """
        messages, tools = self._taken(dialogue.messages), _listed(dialogue.tools)
        responses = _responses(messages)
        numbers = [number for number, is_trained in enumerate(dialogue.trained_turns) if is_trained]
        if not numbers:
            raise EmptyRow("has no response that is trained")
        whole = self._whole(messages, tools, numbers, [number for number in responses if number not in numbers])
        hidden = whole.hidden()
        found = [self._alone(messages, tools, number, responses) for number in hidden]
        shown = [turn for turn in whole.turns if turn.number not in hidden]
        if shown and not hidden:  # nearly always
            found = [whole]
        elif shown:
            others = [*whole.others, *(turn for turn in whole.turns if turn.number in hidden)]
            found.insert(0, Shown(whole.rendering, shown, others))
        left_out: dict[str, None] = {}  # in order, each once
        for sequence in found:
            lacks = sequence.left_out(len(tools or ()))
            left_out |= {said: None for number, said in lacks if number not in numbers}  # else it is trained elsewhere
        turns = [(sequence.rendering, turn) for sequence in found for turn in sequence.turns]
        marks = {"off prompt"} if any(not t.is_prompted for s in found if s.given is None for t in s.turns) else set()
        marks |= {"unended"} if any(self._never_ends(*turn) for turn in turns) else set()
        marks |= {"doubled"} if self._doubles(messages, numbers) else set()
        return Rendered(tuple(sequence.pieces() for sequence in found), ", ".join(left_out), frozenset(marks))

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """Return the text of a conversation up to where the next assistant turn begins.

        Raises:
            BadRow: If the template refuses the conversation.
        """
        return self._text(self._taken(messages), _listed(tools), prompt=True)

    def _taken(self, messages: Sequence[Message]) -> Messages:
        return taken(plain_messages(messages), self.calls, takes_thoughts=self.wording.takes_thoughts)

    def _text(self, messages: Messages, tools: list[Any] | None = None, *, prompt: bool = False) -> str:
        return self.renderer.text(messages, tools, prompt=prompt, nulls=self._nulls(messages))

    def _nulls(self, messages: Messages) -> bool:
        """Whether the template must see a content that is None, which `taken` gave some call without words."""
        return bool(self.calls and self.calls.nulls) and any(m.get("content", "") is None for m in messages)

    def _found(self, messages: Messages, tools: list[Any] | None, numbers: list[int]) -> tuple[Rendering, list[Turn]]:
        """Return a conversation's rendering, and the turns of some of its messages."""
        text = self._text(messages, tools)
        if self.renderer.has_marks(tools):
            return self._found_marked(text, messages, tools, numbers)
        for options in ways_to_mark(messages):
            with suppress(BadRow):  # it may accept the messages and refuse them marked
                # Markers may send a template down another branch. Only if the text is otherwise the same do they tell
                # places in it.
                plain, markers = read_marks(self._text(*marked(messages, tools, options)))
                if plain == text:
                    break
        else:
            raise BadRow(AMBIGUOUS)
        rendering = rendering_of(text, messages, markers, tools, options)

        def first_messages(count: int, *, prompt: bool) -> str | None:
            with suppress(BadRow):  # a template may refuse half a conversation
                return self._text(messages[:count], tools, prompt=prompt)
            return None

        turns = TurnFinder(rendering, self.wording, self.calls, first_messages).turns(numbers)
        # Turns that overlap: a piece of one was taken for the other.
        if any(a.end > b.begin for a, b in pairwise(turns)):
            raise BadRow(AMBIGUOUS)
        return rendering, turns

    def _found_marked(
        self, text: str, messages: Messages, tools: list[Any] | None, numbers: list[int]
    ) -> tuple[Rendering, list[Turn]]:
        """Find turns by the template's own marks, each extended by its end token if the marks leave it out."""
        nulls = self._nulls(messages)
        rendering, covered = Rendering(text, messages, ()), None
        for options in ways_to_mark(messages):
            with suppress(BadRow):
                with_marks, spans = self.renderer.marked(*marked(messages, tools, options), nulls=nulls)
                plain, markers = read_marks(with_marks)
                if plain == text:
                    rendering = rendering_of(text, messages, markers, tools, options)
                    covered = [without_markers(with_marks, span) for span in spans]
                    break
        if covered is None:  # no string can be marked: the template's marks have to do
            with suppress(BadRow):
                rendered, spans = self.renderer.marked(messages, tools, nulls=nulls)
                covered = spans if rendered == text else None
        if covered is None:
            raise BadRow(AMBIGUOUS)
        covered = [self._with_end(text, span) for span in sorted(covered)]
        if not any(begin < end for begin, end in covered):
            raise BadRow("the chat template's {% generation %} marks cover nothing of it")
        spans_of = by_message(rendering, [span for span in covered if span[0] < span[1]])
        if any(number not in spans_of for number in numbers):
            number = next(number for number in numbers if number not in spans_of)
            raise BadRow(f"message {number + 1} is not within the chat template's {{% generation %}} marks")
        finder = TurnFinder(rendering, self.wording, self.calls, lambda count, *, prompt: None)
        turns = []
        for number in numbers:
            spans = self._through_end(text, spans_of[number])
            whole_from = finder.whole_from(number, (spans[0][0], spans[-1][1]))
            prompted = text[: spans[0][0]].endswith(self.wording.header or self.wording.after_request)
            turns.append(Turn(number, tuple(spans), whole_from, prompted))
        return rendering, turns

    def _through_end(self, text: str, spans: list[Span]) -> list[Span]:
        """Drop marked stretches of nothing but special tokens behind the end of a turn: generation has stopped."""
        while len(spans) > 1 and not self.wording.special.sub("", text[slice(*spans[-1])]).strip():
            if not any(text[slice(*spans[-2])].endswith(end) for end in self.wording.ends):
                break
            spans = spans[:-1]
        return spans

    def _with_end(self, text: str, span: Span) -> Span:
        """Return a marked stretch through its end token, and not further: nothing is generated behind it."""
        begin, end = span
        said = text[begin:end].rstrip()
        if any(said.endswith(token) for token in self.wording.ends):
            return begin, begin + len(said)
        behind = [len(token) for token in self.wording.ends if text.startswith(token, end)]
        return begin, end + max(behind, default=0)

    def _whole(self, messages: Messages, tools: list[Any] | None, numbers: list[int], others: list[int]) -> Shown:
        """Return the whole conversation with its trained turns, and the others as far as they can be told apart."""
        try:
            rendering, turns = self._found(messages, tools, sorted(numbers + others))
        except BadRow as error:
            # A template that takes no calls leaves a turn that says nothing.
            called = next((number for number in numbers if messages[number].get("tool_calls")), None)
            if str(error) == AMBIGUOUS and self.calls is None and called is not None:
                raise BadRow(NO_CALL.format(called + 1)) from error
            if not others:
                raise
            rendering, turns = self._found(messages, tools, numbers)
        apart = {number: [turn for turn in turns if (turn.number in numbers) == number] for number in (True, False)}
        return Shown(rendering, apart[True], apart[False])

    def _alone(self, messages: Messages, tools: list[Any] | None, number: int, responses: list[int]) -> Shown:
        """Return a sequence in which one turn is the last, so that the template shows all of it."""
        others = [other for other in responses if other < number]
        whole = self._whole(messages[: number + 1], tools, [number], others)
        rendering, [turn] = whole.rendering, whole.turns
        thought, answer = thought_and_answer(messages[number])
        prompt = self._text(messages[:number], tools, prompt=True) if thought else ""
        # The template drops every thought and opens one in its prompt (DeepSeek R1): what the model wrote is known.
        if not (OPENED_THOUGHT.search(prompt) and rendering.missing_from(turn) == "its thought"):
            return whole
        contents = [m.position for m in rendering.markers if m.owner == number and m.kind == CONTENT]
        begin = contents[0] if answer and contents else turn.begin
        return replace(whole, given=(prompt, f"{thought}\n</think>\n\n"), answer=(begin, turn.end))

    def _never_ends(self, rendering: Rendering, turn: Turn) -> bool:
        """Whether nothing tells generation to stop behind a turn, of calls or with a template that writes no ends."""
        if self.wording.ends and not rendering.messages[turn.number].get("tool_calls"):
            return False
        text = rendering.text[turn.begin : turn.end].rstrip()
        ends = (*self.wording.ends, self.end_of_call, self.tokenizer.eos_token)
        return not any(end and text.endswith(end) for end in ends)

    def _doubles(self, messages: Messages, numbers: Sequence[int]) -> bool:
        """Whether a message spells the begin or end token that the template writes beside it."""
        begin = self.tokenizer.bos_token if self.wording.begins else None
        if begin and (messages[0].get("content") or "").lstrip().startswith(begin):
            return True
        return any((messages[number].get("content") or "").rstrip().endswith(self._ends) for number in numbers)

    def _unusable(self, error: BadRow) -> str:
        syntax = error.__cause__ if isinstance(error.__cause__, TemplateSyntaxError) else None
        reason = f"line {syntax.lineno}: {syntax.message}" if syntax else str(error)
        rule = "must be a valid Jinja template" if syntax else "must write a request and its response"
        if self.chat_template is None:
            what, remedy = "the tokenizer's own chat template", "Set it to alpaca, vicuna or a Jinja file."
        else:
            what, remedy = repr(self.name), "Fix the file, or set chat for the tokenizer's own template."
        return f"data.prompt_template: {what} {rule} ({reason}). {remedy}"


def _responses(messages: Messages) -> list[int]:
    numbers = [number for number, message in enumerate(messages) if message.get("role") == "assistant"]
    if not numbers:
        raise BadRow("has no assistant turn")
    return numbers


def _listed(tools: Sequence[Mapping[str, Any]] | None) -> list[Any] | None:
    """Return the tools as upstream takes them: a list, None for none."""
    return list(tools) if tools else None
