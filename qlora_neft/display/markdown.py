"""Text that is not ours in Markdown: shown as it is, never obeyed as HTML, a link, a heading or a table's bar.

Readers differ: some know no fenced blocks, some run the HTML that Markdown lets through. So nothing here relies on
either; what is escaped is escaped for all of them.
"""

from __future__ import annotations

import re
from html import escape
from typing import Any

from markupsafe import Markup

from .terminal import is_obeyed

SPECIAL = "\\`*_[]#|~"
# As entities, not behind a backslash: what is escaped twice by a careless reader is still no HTML. ">" alone ends no
# tag that was not begun, and begins a quotation at the start of a line.
_ENTITIES = (
    (re.compile(r"&(?=#?\w+;)"), "&amp;"),
    (re.compile("<"), "&lt;"),
    (re.compile(r"(?m)^([ \t]*)>"), r"\1&gt;"),
)


def inline(text: str) -> str:
    """Return a text as one line, with all that Markdown knows escaped."""
    return " ".join(_without_html("".join(f"\\{c}" if c in SPECIAL else c for c in visible(text))).split())


def cell(text: str) -> str:
    """Return a text for a table's cell or a sentence: emphasis stays, but no bar, line end, HTML or link breaks out."""
    plain = _without_html("".join(f"\\{c}" if c in "\\|`*" else c for c in visible(text)))
    return " ".join(plain.replace("](", "]\\(").split())  # no link, and no picture fetched from elsewhere


def block(text: str) -> str:
    """Return a text of several lines as it is, in a block that no content of it can end."""
    # Not between fences: a reader that does not know them takes what stands there for HTML and links.
    return f"<pre>\n{escape(visible(text), quote=False)}\n</pre>"


def visible(text: str) -> str:
    """Replace characters that a reader's program drops or obeys, such as those that reverse the text after them."""
    return "".join("\ufffd" if c not in "\n\t" and is_obeyed(c) else c for c in text)


def value(content: Any) -> Any:
    """Return what a template prints, for Jinja's ``finalize``: text that is not marked as safe is made so.

    Our own words in a template's expressions may hold code spans, so backticks stay: whether a span is open or not,
    neither HTML nor a link comes of what is escaped.
    """
    if not isinstance(content, str) or isinstance(content, Markup):
        return content
    plain = _without_html(visible(content)).replace("|", "\\|").replace("](", "]\\(")
    return " ".join(plain.split("\n")) if "\n" in plain else plain


def _without_html(text: str) -> str:
    for character, entity in _ENTITIES:
        text = character.sub(entity, text)
    return text
