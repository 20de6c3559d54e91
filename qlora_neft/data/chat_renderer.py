"""What a chat template writes: the one place that calls transformers' renderer, with the recipe's own values."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import jinja2.meta
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import render_jinja_template

from ..errors import UserInputError
from .chat_markers import Span
from .examples import BadRow
from .template_limits import EITHER_MARK, limited

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
Messages = list[dict[str, Any]]


class ChatRenderer:
    """Renders conversations by one chat template.

    Args:
        tokenizer: A Hugging Face tokenizer.
        chat_template: The user's Jinja text; None for the tokenizer's own template.
        kwargs: ``data.chat_template_kwargs``.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None, kwargs: Mapping[str, Any] | None
    ) -> None:
        self.tokenizer, self.chat_template, self.kwargs = tokenizer, chat_template, dict(kwargs or {})

    def text(
        self, messages: Messages, tools: list[Any] | None = None, *, prompt: bool = False, nulls: bool = False
    ) -> str:
        """Return the text of a conversation.

        Args:
            messages, tools: The conversation.
            prompt: Whether the generation prompt follows.
            nulls: Whether the template is to see fields that are None, of which newer versions of transformers rid it.

        Raises:
            BadRow: If the template refuses the conversation.
        """
        if nulls:
            return self._rendered(messages, tools, add_generation_prompt=prompt)[0]
        with _refusals(), limited(self.source(tools)):
            text = self.tokenizer.apply_chat_template(
                messages,
                tools,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=prompt,
                **self.kwargs,
            )
        assert isinstance(text, str)  # since it is not tokenized
        return text

    def marked(self, messages: Messages, tools: list[Any] | None, *, nulls: bool) -> tuple[str, list[Span]]:
        """Return the text, and the stretches that the template's ``{% generation %}`` marks cover."""
        # apply_chat_template makes a mask over tokens of the marks; the characters they cover come from its renderer
        # alone. Newer versions of transformers drop keys without a value before rendering; older ones do not.
        if not nulls:
            messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        return self._rendered(messages, tools, return_assistant_tokens_mask=True)

    def source(self, tools: list[Any] | None = None) -> str:
        """Return the Jinja text; a tokenizer may have one of its own for conversations with tools."""
        return self.tokenizer.get_chat_template(self.chat_template, tools)

    def has_marks(self, tools: list[Any] | None) -> bool:
        """Whether the template says itself what is trained."""
        return _has_marks(self.source(tools))

    def check_kwargs(self) -> None:
        """Refuse values that the template never reads.

        Raises:
            UserInputError: With what it reads.
        """
        if not self.kwargs:
            return
        read = self._variables()
        unread = sorted(self.kwargs.keys() - read)
        if unread:
            known = sorted(read - {"messages", "tools", "documents", "add_generation_prompt", "strftime_now"})
            own = [name for name in known if name not in self.tokenizer.special_tokens_map and name not in GLOBALS]
            raise UserInputError(
                f"data.chat_template_kwargs: the chat template never reads {', '.join(unread)}; it reads "
                f"{', '.join(own) or 'nothing of the kind'}. Remove or correct it."
            )

    def _variables(self) -> set[str]:
        named = self.tokenizer.chat_template
        several = self.chat_template is None and isinstance(named, dict)
        sources = list(named.values()) if several and isinstance(named, dict) else [self.source()]
        environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
        found: set[str] = set()
        for source in sources:
            with _refusals(), limited(source):
                # The marks are transformers' extension of Jinja, and name no variable.
                tree = environment.parse(EITHER_MARK.sub("", source))
            # Jinja also counts names that a template sets in one branch and reads after it; a name that it guards
            # (`if x is not defined: set x`) is the caller's to give.
            guarded = {test.node.name for test in tree.find_all(nodes.Test) if isinstance(test.node, nodes.Name)}
            own = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"} - guarded
            found |= jinja2.meta.find_undeclared_variables(tree) - own
        return found

    def _rendered(self, messages: Messages, tools: list[Any] | None, **options: Any) -> tuple[str, list[Span]]:
        tokens: dict[str, Any] = {**self.tokenizer.special_tokens_map, **self.kwargs}
        with _refusals(), limited(self.source(tools)):
            # Both are lists with an entry per conversation; upstream annotates the second as text.
            rendered, spans = cast(
                "tuple[list[str], list[list[Span]]]",
                render_jinja_template(
                    conversations=[messages], tools=tools, chat_template=self.source(tools), **options, **tokens
                ),
            )
        return rendered[0], spans[0] if spans else []


@lru_cache(maxsize=64)
def _has_marks(source: str) -> bool:
    return GENERATION_MARK.search(source) is not None


GLOBALS = frozenset({"raise_exception", "strftime_now", "namespace", "range", "dict", "lipsum", "cycler", "joiner"})


@contextmanager
def _refusals() -> Generator[None, None, None]:
    try:
        yield
    # Whatever it is: templates raise about conversations they were not written for, transformers about what it is
    # given, and a stranger's template anything that an expression can, such as a division by zero.
    except Exception as error:
        raise BadRow(f"the chat template refuses it: {str(error)[:500] or type(error).__name__}") from error
