"""Failures on request: which requests fail, how often, and whether what they asked for is done all the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .wire import Answer, Request

HTML = b"<html><head><title>%d</title></head><body><h1>Bad Gateway</h1></body></html>"


@dataclass
class Fault:
    """What happens to the requests that match.

    Attributes:
        method: HTTP method.
        pattern: Searched for in the path.
        status: Answered; with ``drop`` nothing is.
        times: Requests that fail; None for all.
        drop: Hang up in place of an answer.
        lands: ``now``: what was asked for is done, and then the request fails. ``late``: it is done just before the
            next request that matches is answered, as by a gateway that gave up on a server which did not.
        message: In X-Error-Message and the JSON body.
        code: X-Error-Code.
        html: A page for a body, as gateways send.
        content: JSON in place of what was asked for, with the status and no error.
        headers: Sent as well.
        stall: Seconds until anything happens.
    """

    method: str
    pattern: str
    status: int = 503
    times: int | None = 1
    drop: bool = False
    lands: Literal["now", "late"] | None = None
    message: str = "a fault asked for by the test"
    code: str | None = None
    html: bool = False
    content: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    stall: float = 0

    @property
    def answer(self) -> Answer:
        """What the client gets."""
        from .wire import Answer, Refused, as_json

        if self.content is not None or 300 <= self.status < 400:
            return as_json(self.content or {}, self.status, **self.headers)
        if self.html:
            return Answer(self.status, HTML % self.status, {"Content-Type": "text/html", **self.headers})
        return Refused(self.status, self.message, self.code, self.headers).answer

    def matches(self, request: Request) -> bool:
        """Whether it is about this request."""
        return request.method == self.method and re.search(self.pattern, request.path) is not None


class Faults:
    """The failures asked for; the first that matches is taken."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._late: list[tuple[Fault, Request]] = []
        self._actions: list[tuple[Fault, Callable[[], Any]]] = []

    def add_action(self, rule: Fault, action: Callable[[], Any]) -> None:
        """Ask for something to happen before the next request that matches."""
        self._actions.append((rule, action))

    def add(self, fault: Fault) -> None:
        """Ask for one."""
        self._faults.append(fault)

    def clear(self) -> None:
        """No more failures."""
        self._faults.clear()
        self._late.clear()

    def due(self, request: Request, do: Callable[[Request], Any]) -> Fault | None:
        """The failure this request meets, if any, with what it lets happen done."""
        for due in [due for due in self._actions if due[0].matches(request)]:
            self._actions.remove(due)
            due[1]()
        for late in [late for late in self._late if late[0].matches(request)]:
            self._late.remove(late)
            do(late[1])
        fault = next((fault for fault in self._faults if fault.times != 0 and fault.matches(request)), None)
        if fault is None:
            return None
        if fault.times is not None:
            fault.times -= 1
        if fault.lands == "now":
            do(request)
        elif fault.lands == "late":
            self._late.append((fault, request))
        return fault
