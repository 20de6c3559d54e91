"""What a folder and a repository hold, in the terms in which they can be compared without a download."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile

from ..run_folder.checkpoint_files import files_in

CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class Hashes:
    """A file's two identities: as git stores it, and as Git LFS and Xet do."""

    blob_id: str
    sha256: str

    def are_of(self, file: RepoFile | None) -> bool:
        """Whether a file of a repository has the same content."""
        if file is None:
            return False
        return file.lfs.sha256 == self.sha256 if file.lfs else file.blob_id == self.blob_id


def hashes_of(folder: Path) -> dict[str, Hashes]:
    """Every file of a folder by its path from there; each is read once."""
    return {name: _hashes(folder / name) for name in files_in(folder)}


def files_at(api: HfApi, repo_id: str, commit: str) -> dict[str, RepoFile]:
    """Every file of a repository at a commit.

    Raises:
        OSError: Or another of the client's errors.
    """
    entries = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _hashes(path: Path) -> Hashes:
    # git's own identity of a file: https://git-scm.com/book/en/v2/Git-Internals-Git-Objects
    blob, content = hashlib.sha1(b"blob %d\0" % path.stat().st_size), hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            blob.update(chunk)
            content.update(chunk)
    return Hashes(blob.hexdigest(), content.hexdigest())
