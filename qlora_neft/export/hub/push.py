"""A folder pushed to the Hub in one commit, whatever the network does on the way, and compared afterwards.

Upstream retries some of a push's requests and not others, and a commit answered with 504 may have landed. So the push
as a whole is tried again here, and every attempt first looks whether the repository holds the folder already. Each
commit names the one it follows (``parent_commit``): if an earlier attempt lands after all, the later one is refused
instead of being made a second time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from ...adapter.folder import CONFIG, RECIPE, WEIGHTS
from ...errors import RunFailed, UserInputError
from ...hub_client import bound_waits, check_token
from ...run_folder.checkpoints import files_in
from ...run_folder.tokenizer_files import FILES as TOKENIZER_FILES
from ..inputs import CURVES, refuse_links
from .failures import (
    CLIENT_ERRORS,
    EXPIRED,
    BadAnswer,
    NotYet,
    Patience,
    Place,
    keep_trying,
    reading_answers,
    root_of,
    token_source,
)
from .public import SUMMARY

# Files of an earlier push that are removed if this folder lacks them: beside a newer adapter they would be wrong.
OURS = {CONFIG, CURVES, RECIPE, SUMMARY, WEIGHTS, "generation_config.json", "lengths.png", *TOKENIZER_FILES}
CHUNK = 1 << 20  # bytes read at a time
LOG_IN = "Log in with `hf auth login`, set HF_TOKEN, or add a Colab secret HF_TOKEN: a token with write access."

Change = CommitOperationAdd | CommitOperationDelete


@dataclass(frozen=True)
class Pushed:
    """Result of a push.

    Attributes:
        repo_id: ``owner/name``.
        revision: Branch.
        commit: The commit that holds the folder, 40 hexadecimal digits.
        url: For a browser.
        files: Number of files in the folder, all compared with the repository's by hash.
        was_up_to_date: Whether the branch held the folder before, so that no commit was made.
    """

    repo_id: str
    revision: str
    commit: str
    url: str
    files: int
    was_up_to_date: bool


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str = "main",
    message: str,
    say: Callable[[str], None],
    resume_command: str,
    token: str | None = None,
    patience: Patience | None = None,
) -> Pushed:
    """Make a branch hold a folder's files, by one commit or none, and compare its content afterwards.

    A missing repository or branch is created. In an existing one, files of the same names are replaced, files of `OURS`
    that the folder lacks are removed, and all others stay; it stays as private or public as it is.

    Args:
        folder: All files below it are pushed.
        repo_id: ``owner/name``.
        private: Whether a repository that is created is private.
        revision: Branch.
        message: Title of the commit.
        say: Told, in one line each, of waits and of what differs from what was asked for.
        resume_command: Command that error messages give for trying again.
        token: Used in place of the one that is logged in with.
        patience: How long to go on trying.

    Raises:
        UserInputError: If the token, the name, the card or the account does not allow it.
        RunFailed: If the network did not come back, or the repository does not hold what was sent.
    """
    patience = patience or Patience()
    branch = _Branch(_place_of(repo_id, token, resume_command), revision, private, say)
    push = _Push(branch, Path(folder), message)
    with _patient_client(patience) as limit_waiting:

        def attempt() -> Pushed:
            limit_waiting()
            with branch.one_more_try():
                return push.attempt()

        return keep_trying(attempt, patience, branch.place, say)


def check_push(
    repo_id: str,
    revision: str,
    *,
    private: bool = True,
    say: Callable[[str], None],
    resume_command: str,
    patience: Patience | None = None,
) -> None:
    """Make sure that a later push will not fail for its name or token; create the repository and branch if missing.

    Raises:
        UserInputError: If the token, the name or the account does not allow it.
        RunFailed: If the network did not come back.
    """
    patience = patience or Patience()
    branch = _Branch(_place_of(repo_id, None, resume_command), revision, private, say)

    def ask() -> None:
        limit_waiting()
        with branch.one_more_try():
            branch.head()
            # The first request of an upload is refused without the right to write. It uploads nothing of a small text.
            with reading_answers():
                branch.api.preupload_lfs_files(repo_id, [CommitOperationAdd("README.md", b"\n")], revision=revision)

    with _patient_client(patience) as limit_waiting:
        keep_trying(ask, patience, branch.place, say)


def _place_of(repo_id: str, token: str | None, resume_command: str) -> Place:
    """Check the name and find the token.

    Raises:
        UserInputError: If there is no token, or the name is not ``owner/name``.
    """
    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise UserInputError(f"{repo_id!r} is not a name for a repository: it must be owner/name.")
    used = token or get_token()
    if not used:
        raise UserInputError(f"{repo_id}: there is no token for the Hub. {LOG_IN} Then:\n  {resume_command}")
    check_token(used, f"{repo_id}: {token_source(token)}")
    return Place(repo_id, HfApi().endpoint, used, token_source(token), resume_command)


@contextmanager
def _patient_client(patience: Patience) -> Generator[Callable[[], None], None, None]:
    """Limit how long the client waits for an answer inside the block; by default it waits without end.

    Yields what must be called before each attempt: upstream makes a new client after a lost connection.
    """
    # The session is the client's global one, so the caller's setting is restored.
    before = get_session().timeout

    def limit_waiting() -> None:
        get_session().timeout = patience.answer
        bound_waits(patience.longest_wait)  # a longer wait is for `keep_trying`, which says that it waits

    try:
        yield limit_waiting
    finally:
        get_session().timeout = before
        bound_waits()


class _Push:
    """One push: what several attempts at it share."""

    def __init__(self, branch: _Branch, folder: Path, message: str) -> None:
        self.branch, self.folder, self.message = branch, folder, message
        names = files_in(folder)
        refuse_links(str(folder), folder, names)
        self.wanted = {name: _hashes(folder / name) for name in names}
        if not self.wanted:
            raise UserInputError(f"{folder}: holds no file to push.")
        self.has_sent = False

    def attempt(self) -> Pushed:
        """Look, and change what is not as wanted. Harmless to repeat.

        Raises:
            OSError: Or another of the client's errors.
            RunFailed: If the repository does not hold what was sent.
        """
        # Look first: an earlier attempt may have landed although its answer was lost.
        branch, head = self.branch, self.branch.head()
        changes = self._changes(branch.files_at(head))
        if changes:
            head = self._commit(head, changes)
            # Compared even though the Hub has accepted it: a .gitignore there drops files without a word.
            self._compare(head)
        # Not "no changes": an attempt that finds everything in place may follow one that landed without an answer.
        up_to_date = not self.has_sent
        return Pushed(branch.repo_id, branch.revision, head, branch.url, len(self.wanted), up_to_date)

    def _changes(self, there: dict[str, RepoFile]) -> list[Change]:
        # Only names that an export writes: files that somebody added by hand stay.
        gone = sorted(OURS & there.keys() - self.wanted.keys())
        new = [CommitOperationAdd(name, str(self.folder / name)) for name in self._differing(there)]
        return [*new, *(CommitOperationDelete(name) for name in gone)]

    def _differing(self, there: dict[str, RepoFile]) -> list[str]:
        return [name for name, hashes in self.wanted.items() if not hashes.are_of(there.get(name))]

    def _commit(self, head: str, changes: list[Change]) -> str:
        """Make the commit. If it is refused because the branch has moved, an earlier attempt may have moved it."""
        branch = self.branch
        # Before the request, not after: an answer that never came may belong to a commit that was made.
        self.has_sent = True
        try:
            return branch.commit(changes, self.message, parent=head)
        except HfHubHTTPError as error:
            if error.response.status_code != 412:
                raise
            # 412: the parent has moved. If the branch holds the folder now, it was our own earlier attempt.
            now = branch.existing_head()
            if self._changes(branch.files_at(now)):
                raise
            return now

    def _compare(self, commit: str) -> None:
        there = self.branch.files_at(commit)
        if wrong := self._differing(there):
            what = "is missing" if wrong[0] not in there else "has other content"
            raise RunFailed(
                f"{self.branch.repo_id}: {wrong[0]} {what} in the repository after the push (commit {commit[:10]}, "
                f"{len(wrong)} of {len(self.wanted)} files differ). Check whether a .gitignore there names it. Then:\n"
                f"  {self.branch.place.resume_command}"
            )


class _Branch:
    """A branch to push to.

    Its methods raise OSError or another of the client's errors; `keep_trying` sorts them.

    Args:
        place: The repository, and the token.
        revision: Name of the branch.
        private: Whether a repository that is created is private; an existing one stays as it is.
        say: Told if it is not as asked for.
    """

    def __init__(self, place: Place, revision: str, private: bool, say: Callable[[str], None]) -> None:
        self.place, self.revision, self.private, self.say = place, revision, private, say
        self.repo_id = place.repo_id
        # The token is passed on, not looked up again, so that messages name the one that was used.
        self.api = HfApi(token=place.token, library_name="qlora_neft")
        self._is_known = self._is_new = False

    @contextmanager
    def one_more_try(self) -> Generator[None, None, None]:
        """Mark what one more attempt may mend inside the block.

        Raises:
            NotYet: In place of 404 about what was made here, and of a refusal by the store of files.
        """
        try:
            yield
        except CLIENT_ERRORS as caught:
            error = root_of(caught)
            if not isinstance(error, HfHubHTTPError):
                raise
            status, url = error.response.status_code, str(error.response.url)
            if status == 404 and self._is_new:
                raise NotYet(f"{self.repo_id} was made just now and is not found yet") from error
            if status in EXPIRED and not url.startswith(self.place.endpoint):
                raise NotYet(f"the address for an upload was refused ({status}), as one that has expired") from error
            raise

    @property
    def url(self) -> str:
        """For a browser."""
        return f"{self.place.endpoint}/{self.repo_id}" + ("" if self.revision == "main" else f"/tree/{self.revision}")

    def head(self) -> str:
        """Return the newest commit; create repository and branch if they are missing. Harmless to repeat."""
        try:
            commit, is_private = self._ask()
        except RevisionNotFoundError:  # the repository exists, the branch does not
            self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
            self._is_new = True
        except RepositoryNotFoundError:
            if not self._is_new:
                self._create()
        else:
            self._tell_if_otherwise(is_private)
            return commit
        return self.existing_head()

    def existing_head(self) -> str:
        """Return the newest commit of a branch that exists."""
        commit, _ = self._ask()
        return commit

    def files_at(self, commit: str) -> dict[str, RepoFile]:
        """Return every file at a commit, by its path."""
        # At a commit, not a branch: what is compared cannot change meanwhile.
        with reading_answers():
            entries = self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit)
            return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def commit(self, changes: list[Change], title: str, *, parent: str) -> str:
        """Commit changes on top of a parent, which must be the newest commit; return the new one."""
        with reading_answers():
            made = self.api.create_commit(
                self.repo_id, changes, commit_message=title, revision=self.revision, parent_commit=parent
            )
            return made.oid

    def _ask(self) -> tuple[str, bool]:
        """Ask for the newest commit, and whether the repository is private."""
        with reading_answers():
            info = self.api.repo_info(self.repo_id, revision=self.revision)
        if not info.sha:
            raise BadAnswer("no commit is named")
        return info.sha, bool(info.private)

    def _create(self) -> None:
        self._is_known = True
        try:
            with reading_answers():
                self.api.create_repo(self.repo_id, private=self.private)
            self._is_new = True
        except HfHubHTTPError as error:
            # 409: an earlier attempt created it, or just now someone else did.
            if error.response.status_code != 409 or not self.api.repo_exists(self.repo_id):
                raise
        # A new repository has "main" alone.
        if self.revision != "main":
            self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)

    def _tell_if_otherwise(self, is_private: bool) -> None:
        # Said once, not at each attempt; never changed: publishing or hiding somebody's repository is not a push's
        # business.
        if not self._is_known and is_private != self.private:
            kind, other = ("private", "public") if is_private else ("public", "private")
            settings = f"{self.place.endpoint}/{self.repo_id}/settings"
            self.say(f"{self.repo_id} exists already and stays {kind}; to make it {other}: {settings}")
        self._is_known = True


@dataclass(frozen=True)
class _Hashes:
    """A file's two identities: as git stores it, and as Git LFS and Xet do."""

    blob_id: str
    sha256: str

    def are_of(self, file: RepoFile | None) -> bool:
        """Return whether a file of a repository has the same content."""
        if file is None:
            return False
        # The Hub decides by size and name which files are in LFS; each kind has its own hash.
        return file.lfs.sha256 == self.sha256 if file.lfs else file.blob_id == self.blob_id


def _hashes(path: Path) -> _Hashes:
    # git's own identity of a file: https://git-scm.com/book/en/v2/Git-Internals-Git-Objects
    blob, content = hashlib.sha1(b"blob %d\0" % path.stat().st_size), hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            blob.update(chunk)
            content.update(chunk)
    return _Hashes(blob.hexdigest(), content.hexdigest())
