"""Which function answers which request."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .wire import Answer, Refused, Request

if TYPE_CHECKING:
    from .server import HubServer

Route = tuple[str, re.Pattern[str], Callable[..., Answer]]
PLACES = {"{repo}": r"(?P<repo>[\w.-]+/[\w.-]+)", "{rev}": r"(?P<rev>[^/]+)", "{path}": r"(?P<path>.+)"}


def route(methods: str, pattern: str, respond: Callable[..., Answer]) -> Route:
    """A route.

    Args:
        methods: Separated by a space.
        pattern: Of the path, with ``{repo}``, ``{rev}`` and ``{path}``, whose values ``respond`` is given by name.
        respond: Answers ``(hub, request, **values)``.
    """
    for place, expression in PLACES.items():
        pattern = pattern.replace(place, expression)
    return methods, re.compile(pattern + "$"), respond


def routed(hub: HubServer, request: Request, routes: Sequence[Route]) -> Answer:
    """Answer a request.

    Raises:
        Refused: With 404 for a path that the stand-in does not know.
    """
    for methods, pattern, respond in routes:
        found = pattern.match(request.path)
        if found and request.method in methods.split():
            return respond(hub, request, **{k: urllib.parse.unquote(v) for k, v in found.groupdict().items() if v})
    raise Refused(404, f"Sorry, we can't find the page you are looking for: {request.method} {request.path}")
