"""A console of rich that shows what is not ours and obeys none of it (see `terminal`). No torch."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from .terminal import shown


class SafeConsole(Console):
    """A console that escapes every text it prints, wherever in a table or a bar it stands."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does; what rich itself makes for the terminal (colors, the cursor) is left."""
        for segment in super().render(renderable, options):
            # A lone return ends a line that is to be written over; rich removes those of texts.
            is_ours = segment.control or segment.text == "\r"
            yield segment if is_ours else segment._replace(text=shown(segment.text))
