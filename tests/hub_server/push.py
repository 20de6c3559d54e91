"""What a push asks: who am I, make a repository or branch, is this card valid, how to upload, commit."""

from __future__ import annotations

import base64
import fnmatch
import json
import re
from typing import TYPE_CHECKING, Any

from .accounts import must_create, must_write
from .card import problems_of
from .repositories import Blob, Repository
from .routes import route
from .wire import Answer, Refused, Request, as_json

if TYPE_CHECKING:
    from .server import HubServer


def whoami(hub: HubServer, request: Request) -> Answer:
    """Name, organizations and the role of the token."""
    account = hub.accounts.of(request)
    if account.name is None:
        raise Refused(401, "Invalid username or password.")
    role = "write" if account.can_write else "read"
    return as_json(
        {
            "type": "user",
            "id": f"id-of-{account.name}",
            "name": account.name,
            "fullname": account.name.title(),
            "isPro": False,
            "orgs": [{"type": "org", "name": name, "roleInOrg": "write"} for name in account.orgs],
            "auth": {"type": "access_token", "accessToken": {"displayName": "of the test", "role": role}},
        }
    )


def create(hub: HubServer, request: Request) -> Answer:
    """Begin a repository; one that is there is answered with 409 and its URL."""
    account, stated = hub.accounts.of(request), request.json
    if stated.get("type") not in (None, "model"):
        raise Refused(400, "the stand-in holds models alone")
    namespace = stated.get("organization") or account.name or ""
    must_create(account, namespace)
    repo_id = f"{namespace}/{stated['name']}"
    if not re.fullmatch(r"[\w.-]{1,96}", stated["name"]) or ".." in repo_id or "--" in repo_id:
        raise Refused(400, f"Invalid repo name: {repo_id}")
    about = {"url": f"{hub.url}/{repo_id}", "name": repo_id}
    if repo_id in hub.repos:
        return as_json({"error": "You already created this model repo", **about}, 409)
    hub.add_repo(repo_id, private=stated.get("private", stated.get("visibility") == "private"))
    return as_json(about)


def create_branch(hub: HubServer, request: Request, repo: str, rev: str) -> Answer:
    """Begin a branch, from main or where it is asked."""
    if rev.startswith("refs/"):
        raise Refused(400, f"Invalid reference for a branch: {rev}")
    must_write(hub.accounts.of(request), hub.repos.get(repo)).branch(rev, request.json.get("startingPoint", "main"))
    return as_json({})


def validate_yaml(hub: HubServer, request: Request) -> Answer:
    """Check a card's metadata."""
    hub.accounts.of(request)
    errors, warnings = problems_of(request.json["content"])
    content = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return as_json(content, 400 if errors else 200)


def preupload(hub: HubServer, request: Request, repo: str, rev: str) -> Answer:
    """How each file is to be uploaded, and what is there under its name."""
    found = must_write(hub.accounts.of(request), hub.repos.get(repo))
    stated, there = request.json, found.at(rev).files
    ignored = stated.get("gitIgnore", there[".gitignore"].data.decode() if ".gitignore" in there else "").split()
    files = []
    for file in stated["files"]:
        path, old = file["path"], there.get(file["path"])
        large = found.is_large(path, file["size"], base64.b64decode(file["sample"]))
        about = {"path": path, "uploadMode": "lfs" if large else "regular"}
        about["shouldIgnore"] = any(fnmatch.fnmatch(path, pattern) for pattern in ignored)
        if old is not None:
            about["oid"] = old.sha256 if old.is_lfs else old.oid
        files.append(about)
    return as_json({"files": files})


def lfs_batch(hub: HubServer, request: Request, repo: str) -> Answer:
    """Where to put each large file; nowhere, if it is there."""
    found = must_write(hub.accounts.of(request), hub.repos.get(repo))
    objects = []
    for wanted in request.json["objects"]:
        about: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
        if wanted["oid"] not in found.large_files:
            upload = {"href": hub.storage.signed("PUT", repo, wanted["oid"])}
            verify = {"href": f"{hub.url}/{repo}.git/info/lfs/objects/verify"}
            about["actions"] = {"upload": upload, "verify": verify}
        objects.append(about)
    return as_json({"transfer": "basic", "objects": objects}, **{"Content-Type": "application/vnd.git-lfs+json"})


def lfs_verify(hub: HubServer, request: Request, repo: str) -> Answer:
    """Whether a large file has arrived."""
    found, stated = must_write(hub.accounts.of(request), hub.repos.get(repo)), request.json
    data = found.large_files.get(stated["oid"])
    if data is None or len(data) != stated["size"]:
        raise Refused(404, f"Object {stated['oid']} is not there")
    return as_json({})


def commit(hub: HubServer, request: Request, repo: str, rev: str) -> Answer:
    """All changes at once, or none."""
    account = hub.accounts.of(request)
    found = must_write(account, hub.repos.get(repo))
    head = found.at(rev)
    if rev not in found.branches:
        raise Refused(404, f"Invalid rev id: {rev}", "RevisionNotFound")
    lines = [json.loads(line) for line in request.body.splitlines()]
    header = lines[0]["value"]
    if not header.get("summary"):
        raise Refused(400, "summary is required")
    if header.get("parentCommit") and not head.oid.startswith(header["parentCommit"]):
        raise Refused(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for line in lines[1:]:
        _apply(found, files, line["key"], line["value"])
    errors, _ = problems_of(files["README.md"].data.decode()) if "README.md" in files else ([], [])
    if errors:
        raise Refused(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
    made = found.commit(rev, header["summary"], header.get("description", ""), account.name or "", files)
    return as_json({"success": True, "commitOid": made.oid, "commitUrl": f"{hub.url}/{repo}/commit/{made.oid}"})


def _apply(repo: Repository, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
    path = value["path"]
    if any(part in ("", ".", "..", ".git") for part in path.rstrip("/").split("/")):
        raise Refused(400, f"Invalid path: {path}")
    if key == "file":
        data = base64.b64decode(value["content"])
        if repo.is_large(path, len(data), data[:512]) and data:
            raise Refused(400, f"{path} must be uploaded as a large file")
        files[path] = Blob(data)
    elif key == "lfsFile":
        if value["oid"] not in repo.large_files:
            raise Refused(400, f"Your push was rejected because {path} points to a file that was not uploaded")
        files[path] = Blob(repo.large_files[value["oid"]], is_lfs=True)
    else:
        gone = [
            name
            for name in files
            if name == path or (key == "deletedFolder" and name.startswith(path.rstrip("/") + "/"))
        ]
        if not gone:
            raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        for name in gone:
            del files[name]


PUSH_ROUTES = (
    route("GET", "/api/whoami-v2", whoami),
    route("POST", "/api/repos/create", create),
    route("POST", "/api/validate-yaml", validate_yaml),
    route("POST", "/api/models/{repo}/branch/{rev}", create_branch),
    route("POST", "/api/models/{repo}/preupload/{rev}", preupload),
    route("POST", "/{repo}.git/info/lfs/objects/batch", lfs_batch),
    route("POST", "/{repo}.git/info/lfs/objects/verify", lfs_verify),
    route("POST", "/api/models/{repo}/commit/{rev}", commit),
)
