"""Repositories with their whole history, as git has it: branches, commits, blobs and Git LFS pointers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from .wire import Refused

LFS_SUFFIXES = ("7z arrow bin bz2 ckpt ftz gz h5 joblib model msgpack npy npz onnx ot parquet pb pickle pkl pt pth rar "
                "safetensors tar tflite tgz wasm xz zip zst").split()  # fmt: skip
GITATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
LFS_FROM_BYTES = 10 * 1024**2


@dataclass(frozen=True)
class Blob:
    """A file's content, and whether the repository holds it or only a pointer to it."""

    data: bytes
    is_lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the content: the identity of large files."""
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def _in_git(self) -> bytes:
        if not self.is_lfs:
            return self.data
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @cached_property
    def oid(self) -> str:
        """What `git hash-object` gives: of the pointer, for a large file."""
        return hashlib.sha1(b"blob %d\0" % len(self._in_git) + self._in_git).hexdigest()

    def entry(self, path: str) -> dict:
        """Its line in a listing."""
        lfs = {"lfs": {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self._in_git)}}
        return {"type": "file", "oid": self.oid, "size": len(self.data), "path": path, **(lfs if self.is_lfs else {})}


@dataclass(frozen=True)
class Commit:
    """One commit and the files at it."""

    title: str
    description: str
    author: str
    parent: str | None
    files: Mapping[str, Blob]

    @cached_property
    def oid(self) -> str:
        """SHA-1 of all that it says."""
        tree = "\n".join(f"{path} {blob.oid}" for path, blob in sorted(self.files.items()))
        return hashlib.sha1(
            f"{self.parent}\n{self.author}\n{self.title}\n{self.description}\n{tree}".encode()
        ).hexdigest()


class Repository:
    """A model repository.

    It begins as the Hub's do: with one commit of the Hub's own, which holds ``.gitattributes``.

    Args:
        repo_id: ``owner/name``.
        private: Hidden from all but its owner.
    """

    def __init__(self, repo_id: str, private: bool) -> None:
        self.id, self.private, self.is_gated = repo_id, private, False
        first = Commit("initial commit", "", self.owner, None, {".gitattributes": Blob(GITATTRIBUTES)})
        self._commits = {first.oid: first}
        self.branches = {"main": first.oid}
        self.large_files: dict[str, bytes] = {}  # uploaded for it, by SHA-256, committed or not

    @property
    def owner(self) -> str:
        """User or organization."""
        return self.id.split("/")[0]

    def at(self, revision: str) -> Commit:
        """The commit of a branch or of an id, also a short one.

        Raises:
            Refused: With 404 RevisionNotFound.
        """
        if revision in self.branches:
            return self._commits[self.branches[revision]]
        found = [commit for oid, commit in self._commits.items() if len(revision) >= 7 and oid.startswith(revision)]
        if not found:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found[0]

    def commits(self, revision: str = "main") -> list[Commit]:
        """The history, oldest first."""
        found = [self.at(revision)]
        while found[-1].parent:
            found.append(self._commits[found[-1].parent])
        return found[::-1]

    def pushes(self, revision: str = "main") -> list[Commit]:
        """The history without the Hub's own first commit."""
        return self.commits(revision)[1:]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Content by path, without ``.gitattributes``."""
        return {path: blob.data for path, blob in self.at(revision).files.items() if path != ".gitattributes"}

    def branch(self, name: str, start: str = "main") -> None:
        """Begin a branch.

        Raises:
            Refused: With 409 if there is one, 404 if there is nowhere to begin.
        """
        if name in self.branches:
            raise Refused(409, f"Reference already exists: refs/heads/{name}")
        self.branches[name] = self.at(start).oid

    def commit(self, branch: str, title: str, description: str, author: str, files: Mapping[str, Blob]) -> Commit:
        """Put a commit on a branch."""
        made = Commit(title, description, author, self.branches[branch], dict(files))
        self._commits[made.oid] = made
        self.branches[branch] = made.oid
        return made

    def add(self, files: Mapping[str, bytes], branch: str = "main", title: str = "before the test") -> Commit:
        """Put a commit there that adds files, without the protocol."""
        blobs = {path: Blob(data, self.is_large(path, len(data), data[:512])) for path, data in files.items()}
        self.large_files |= {blob.sha256: blob.data for blob in blobs.values() if blob.is_lfs}
        return self.commit(branch, title, "", self.owner, {**self.at(branch).files, **blobs})

    def is_large(self, path: str, size: int, sample: bytes) -> bool:
        """Whether the Hub keeps a file out of git: by its suffix, its size, or because it is no text."""
        return path.rsplit(".", 1)[-1] in LFS_SUFFIXES or size >= LFS_FROM_BYTES or b"\0" in sample
