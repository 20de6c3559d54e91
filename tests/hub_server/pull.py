"""What a reader asks: repositories, listings, histories, files."""

from __future__ import annotations

import urllib.parse
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import yaml

from .accounts import must_read
from .repositories import Blob
from .routes import route
from .storage import ranged
from .wire import Answer, Refused, Request, as_json

if TYPE_CHECKING:
    from .server import HubServer

DATE = "2026-01-01T00:00:00.000Z"


def info(hub: HubServer, request: Request, repo: str, rev: str = "main") -> Answer:
    """A repository at a revision."""
    found = must_read(hub.accounts.of(request), hub.repos.get(repo))
    at = found.at(rev)
    return as_json(
        {
            "_id": f"id-of-{repo}",
            "id": repo,
            "modelId": repo,
            "author": found.owner,
            "sha": at.oid,
            "lastModified": DATE,
            "createdAt": DATE,
            "private": found.private,
            "gated": "auto" if found.is_gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "cardData": front_matter(at.files.get("README.md")),
            "siblings": [{"rfilename": path} for path in sorted(at.files)],
        }
    )


def front_matter(card: Blob | None) -> dict[str, Any]:
    """What a model card says to programs; empty without one."""
    text = card.data.decode() if card else ""
    return yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else {}


def tree(hub: HubServer, request: Request, repo: str, rev: str, path: str = "") -> Answer:
    """Files and folders, page by page."""
    found = must_read(hub.accounts.of(request), hub.repos.get(repo))
    entries = _entries(found.at(rev).files, path, request.query.get("recursive", "").lower() in ("1", "true"))
    if path and not entries:
        raise Refused(404, f"{path} does not exist on {rev!r}", "EntryNotFound")
    return _page(hub, request, entries, found.at(rev).oid)


def paths_info(hub: HubServer, request: Request, repo: str, rev: str) -> Answer:
    """Some files and folders; what is not there is left out."""
    files = must_read(hub.accounts.of(request), hub.repos.get(repo)).at(rev).files
    if request.headers.get("content-type", "").startswith("application/json"):
        paths = request.json["paths"]
    else:
        paths = urllib.parse.parse_qs(request.body.decode()).get("paths", [])
    return as_json([entry for entry in _entries(files, "", True) if entry["path"] in paths])


def commits(hub: HubServer, request: Request, repo: str, rev: str) -> Answer:
    """The history, newest first."""
    history = must_read(hub.accounts.of(request), hub.repos.get(repo)).commits(rev)[::-1]
    lines = [
        {"id": c.oid, "title": c.title, "message": c.description, "authors": [{"user": c.author}], "date": DATE}
        for c in history
    ]
    return _page(hub, request, lines, history[0].oid)


def refs(hub: HubServer, request: Request, repo: str) -> Answer:
    """The branches."""
    found = must_read(hub.accounts.of(request), hub.repos.get(repo))
    branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in found.branches.items()]
    return as_json({"branches": branches, "tags": [], "converts": []})


def resolve(hub: HubServer, request: Request, repo: str, rev: str, path: str) -> Answer:
    """A file: itself, or the way to the second origin."""
    found = must_read(hub.accounts.of(request), hub.repos.get(repo))
    at = found.at(rev)
    blob = at.files.get(path)
    headers = {"X-Repo-Commit": at.oid}
    if blob is None:
        raise Refused(404, "Entry not found", "EntryNotFound", headers)
    if blob.is_lfs:
        headers |= {"X-Linked-Size": str(len(blob.data)), "X-Linked-Etag": f'"{blob.sha256}"', "ETag": f'"{blob.oid}"'}
        return Answer(302, b"", {**headers, "Location": hub.storage.signed("GET", repo, blob.sha256)})
    return ranged(request, blob.data, {**headers, "ETag": f'"{blob.oid}"', "Content-Type": "text/plain; charset=utf-8"})


def _entries(files: dict[str, Blob], folder: str, recursive: bool) -> list[dict[str, Any]]:
    inside = {path: blob for path, blob in files.items() if not folder or path.startswith(folder + "/")}
    folders = {str(above) for path in inside for above in PurePosixPath(path).parents} - {".", folder}
    folders = {name for name in folders if name.startswith(folder)}
    entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": name} for name in folders]
    entries += [blob.entry(path) for path, blob in inside.items()]
    depth = len(PurePosixPath(folder).parts) + 1
    return sorted(
        (entry for entry in entries if recursive or len(PurePosixPath(entry["path"]).parts) == depth),
        key=lambda entry: entry["path"],
    )


def _page(hub: HubServer, request: Request, entries: Sequence[dict[str, Any]], commit: str) -> Answer:
    start, size = (
        int(request.query.get("cursor", 0)),
        min(hub.page_size, int(request.query.get("limit", hub.page_size))),
    )
    answer = as_json(entries[start : start + size], **{"X-Repo-Commit": commit})
    if start + size < len(entries):
        query = urllib.parse.urlencode({**request.query, "cursor": start + size})
        answer.headers["Link"] = f'<{hub.url}{request.path}?{query}>; rel="next"'
    return answer


PULL_ROUTES = (
    route("GET", "/api/models/{repo}", info),
    route("GET", "/api/models/{repo}/revision/{rev}", info),
    route("GET", "/api/models/{repo}/tree/{rev}(?:/{path})?", tree),
    route("POST", "/api/models/{repo}/paths-info/{rev}", paths_info),
    route("GET", "/api/models/{repo}/commits/{rev}", commits),
    route("GET", "/api/models/{repo}/refs", refs),
    route("GET HEAD", "/{repo}/resolve/{rev}/{path}", resolve),
)
