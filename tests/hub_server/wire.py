"""HTTP/1.1 on the loopback interface: requests read whole and written down, answers sent, faults made."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .faults import Faults


@dataclass
class Request:
    """One request as it arrived; header names in lower case."""

    origin: str  # "api" or "cdn"
    method: str
    path: str  # as sent, without the query: a slash in a branch's name is still %2F
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    status: int | None = None  # what was answered; None for a dropped socket

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body or b"{}")


@dataclass
class Answer:
    """What is sent back."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Refused(Exception):
    """A refusal, in the form the Hub gives them: status, X-Error-Code, X-Error-Message and a JSON body."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.answer = as_json({"error": message}, status)
        self.answer.headers |= {
            "X-Error-Message": message,
            **({"X-Error-Code": code} if code else {}),
            **(headers or {}),
        }


def as_json(content: Any, status: int = 200, **headers: str) -> Answer:
    """An answer of JSON."""
    return Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json; charset=utf-8", **headers})


class Origin(ThreadingHTTPServer):
    """One origin: a port of its own.

    Args:
        name: "api" or "cdn".
        respond: Answers a request; called for one request at a time.
        requests: Where every request is written down.
        faults: Which requests fail, and how.
        lock: Held while a request is answered.
    """

    daemon_threads = True
    request_queue_size = 32

    def __init__(
        self,
        name: str,
        respond: Callable[[Request], Answer],
        requests: list[Request],
        faults: Faults,
        lock: threading.RLock,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name, self.respond, self.requests, self.faults, self.lock = name, respond, requests, faults, lock
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), name=f"hub {name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Free the port."""
        self.shutdown()
        self.server_close()
        self._thread.join()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error; everything else is one of the stand-in and is shown."""
        import sys

        if not isinstance(sys.exc_info()[1], (ConnectionError, BrokenPipeError)):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Origin

    def _serve(self) -> None:
        request = self._read()
        origin = self.server
        with origin.lock:
            origin.requests.append(request)
            fault = origin.faults.due(request, self._answered)
            answer = self._answered(request) if fault is None else fault.answer
        if fault is not None:
            time.sleep(fault.stall)
            if fault.drop:
                self._hang_up()
                return
        request.status = answer.status
        self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _answered(self, request: Request) -> Answer:
        try:
            return self.server.respond(request)
        except Refused as refusal:
            return refusal.answer

    def _read(self) -> Request:
        url = urllib.parse.urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        query = dict(urllib.parse.parse_qsl(url.query))
        return Request(self.server.name, self.command, url.path, query, headers, self._body(headers))

    def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(headers.get("content-length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        headers = {"Content-Length": str(len(answer.body)), **answer.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr: `HubServer.requests` is the log."""
