"""The date that chat templates write: fixed once for a run, so that a resume on another day renders the same text.

transformers gives templates a function ``strftime_now``, which reads the clock at every rendering
(``utils/chat_template_utils.py``). What is passed to a template is turned into plain values there, so that no other
function can be handed in; a macro of that name, written before the template's own text, takes its place.
"""

from __future__ import annotations

import copy
import json
import re
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CALLED = "strftime_now"
_NAMED = re.compile(_CALLED + r"\(\s*(['\"])([^'\"]*)\1\s*\)")  # called with a format that can be read here
# glibc's directives without padding, then those of strftime(3). "%%" is apart: see `dated`.
_DIRECTIVES = tuple(f"%-{letter}" for letter in "dmHIMSj") + tuple(
    f"%{letter}" for letter in "aAbBcdDeFGHIjklmMnpPrRsStTuUVwWxXyYzZf"
)
_PERCENT = "\x00"  # stands for "%%" while the others are replaced


def reads_date(template: str | dict[str, str] | None) -> bool:
    """Tell whether a chat template, or one of several by name, reads today's date."""
    texts = template.values() if isinstance(template, dict) else [template or ""]
    return any(_CALLED in text for text in texts)


def dated(template: str, now: datetime) -> str:
    """Return a chat template whose ``strftime_now`` gives a fixed moment; one that reads no date is unchanged."""
    if not reads_date(template):
        return template
    values = [("%%", _PERCENT), *((name, now.strftime(name)) for name in _DIRECTIVES), (_PERCENT, "%")]
    filters = "".join(f"|replace({json.dumps(name)}, {json.dumps(value)})" for name, value in values)
    # The line's end is the first after a block, which transformers' environment trims (trim_blocks): the template's own
    # text begins a line as it did before, which decides what lstrip_blocks strips.
    return f"{{% macro {_CALLED}(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{template}"


def with_date(tokenizer: PreTrainedTokenizerBase, now: datetime) -> PreTrainedTokenizerBase:
    """Return a tokenizer whose chat templates write a fixed date; the given one if they write none."""
    template = tokenizer.chat_template
    if not reads_date(template):
        return tokenizer
    found = copy.copy(tokenizer)  # shallow: the vocabulary is shared
    found.chat_template = (
        {name: dated(text, now) for name, text in template.items()}
        if isinstance(template, dict)
        else dated(str(template), now)
    )
    return found


def written(template: str | dict[str, str] | None, now: datetime) -> list[str]:
    """Return what a template writes of a moment: all that makes two renderings of it differ.

    The values of the formats it names; the whole moment if it makes up a format as it goes. Nothing if it reads no
    date.
    """
    if not reads_date(template):
        return []
    texts = "\n".join(template.values()) if isinstance(template, dict) else template or ""
    found = [match[2] for match in _NAMED.finditer(texts)]
    makes_up = len(re.findall(_CALLED + r"\s*\(", texts)) > len(found)
    return [now.isoformat()] if makes_up else [now.strftime(name) for name in sorted(set(found))]
