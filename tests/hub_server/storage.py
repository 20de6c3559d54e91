"""The second origin: large files by signed URLs. As a real object store, it refuses a request with an Authorization."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from .wire import Answer, Refused, Request

if TYPE_CHECKING:
    from .server import HubServer

SECRET = "of the stand-in"


class Storage:
    """Large files of all repositories."""

    def __init__(self, hub: HubServer) -> None:
        self._hub = hub

    def signed(self, method: str, repo_id: str, sha256: str) -> str:
        """A URL that allows one method for one file."""
        path = f"/{repo_id}/{sha256}"
        return f"{self._hub.storage_url}{path}?X-Amz-Signature={_signature(method, path)}"

    def respond(self, request: Request) -> Answer:
        """Take or give a file.

        Raises:
            Refused: If the request is not signed, or carries an Authorization.
        """
        if "authorization" in request.headers:
            raise Refused(400, "Only one auth mechanism allowed")
        method = "GET" if request.method == "HEAD" else request.method
        if request.query.get("X-Amz-Signature") != _signature(method, request.path):
            raise Refused(403, "SignatureDoesNotMatch")
        repo_id, sha256 = request.path[1:].rsplit("/", 1)
        files = self._hub.repos[repo_id].large_files
        if method == "PUT":
            if hashlib.sha256(request.body).hexdigest() != sha256:
                raise Refused(400, "XAmzContentSHA256Mismatch")
            files[sha256] = request.body
            return Answer(200, b"", {"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})
        return ranged(request, files[sha256], {"ETag": f'"{sha256}"', "Content-Type": "binary/octet-stream"})


def ranged(request: Request, data: bytes, headers: dict[str, str]) -> Answer:
    """A file, or the part of it that is asked for."""
    headers = {"Accept-Ranges": "bytes", **headers}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if wanted is None:
        return Answer(200, data, headers)
    start, end = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
    if start > end:
        return Answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
    return Answer(206, data[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"})


def _signature(method: str, path: str) -> str:
    return hashlib.sha256(f"{SECRET} {method} {path}".encode()).hexdigest()[:16]
