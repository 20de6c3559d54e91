"""A folder pushed to the Hub in one commit, whatever the network does on the way, and read back.

Upstream retries some of a push's requests and not others, and a commit that is answered with 504 may have landed. So
the push as a whole is tried again here, and every attempt first looks whether the repository holds the folder already.
Each commit names the one it follows (``parent_commit``): if an earlier attempt lands after all, the later one is
refused instead of being made a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile

from ..errors import RunFailed, UserInputError
from .branch import Branch, patient_client, place_of
from .contents import files_at, hashes_of
from .retrying import Patience, keep_trying

# What an earlier push of ours may have left and this one need not have: beside a newer adapter it would be wrong.
OURS = frozenset(
    """adapter_config.json adapter_model.safetensors added_tokens.json chat_template.jinja generation_config.json
    lengths.png loss.png merges.txt recipe.yaml sentencepiece.bpe.model special_tokens_map.json spiece.model
    tokenizer.json tokenizer.model tokenizer_config.json training_summary.json vocab.json vocab.txt""".split()
)


@dataclass(frozen=True)
class Pushed:
    """What a push came to.

    Attributes:
        repo_id: ``owner/name``.
        revision: Branch.
        commit: That holds the folder, 40 hexadecimal digits.
        url: For a browser.
        files: Files of the folder, all compared with the repository's by hash.
        was_up_to_date: The branch held the folder before; no commit was made.
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
    """Bring a branch to hold a folder's files, by one commit or by none, and compare what is there afterwards.

    A repository or branch that is missing is made. In one that is there, files of the same names are replaced, those of
    `OURS` that the folder has not are removed, and all others stay; it stays as private or public as it is.

    Args:
        folder: All files below it are pushed.
        repo_id: ``owner/name``.
        private: Of a repository that is made.
        revision: Branch.
        message: Title of the commit.
        say: Told, in one line each, of waits and of what was found otherwise than asked for.
        resume_command: What a message says to do to try again.
        token: In place of the one that is logged in with.
        patience: How long to go on trying.

    Raises:
        UserInputError: If the token, the name, the card or the account does not allow it.
        RunFailed: If the network did not come back, or if the repository does not hold what was sent.
    """
    patience = patience or Patience()
    branch = Branch(place_of(repo_id, token, resume_command), revision, private, say)
    push = _Push(branch, Path(folder), message)
    with patient_client(patience) as limit_waiting:

        def attempt() -> Pushed:
            limit_waiting()
            return push.attempt()

        return keep_trying(attempt, patience, branch.place, say)


class _Push:
    """One push; what several attempts at it share."""

    def __init__(self, branch: Branch, folder: Path, message: str) -> None:
        self.branch, self.folder, self.message = branch, folder, message
        self.wanted = hashes_of(folder)
        if not self.wanted:
            raise UserInputError(f"{folder}: holds no file to push.")
        self.has_sent = False

    def attempt(self) -> Pushed:
        """Look, and change what is not as wanted; harmless to repeat.

        Raises:
            OSError: Or another of the client's errors.
            RunFailed: If the repository does not hold what was sent.
        """
        branch, head = self.branch, self.branch.head()
        changes = self._changes(self._there(head))
        if changes:
            head = self._commit(head, changes)
            self._compare(head)
        up_to_date = not self.has_sent
        return Pushed(branch.repo_id, branch.revision, head, branch.url, len(self.wanted), up_to_date)

    def _there(self, commit: str) -> dict[str, RepoFile]:
        return files_at(self.branch.api, self.branch.repo_id, commit)

    def _changes(self, there: dict[str, RepoFile]) -> list[CommitOperationAdd | CommitOperationDelete]:
        gone = sorted(OURS & there.keys() - self.wanted.keys())
        new = [CommitOperationAdd(name, str(self.folder / name)) for name in self._differing(there)]
        return [*new, *(CommitOperationDelete(name) for name in gone)]

    def _differing(self, there: dict[str, RepoFile]) -> list[str]:
        return [name for name, hashes in self.wanted.items() if not hashes.are_of(there.get(name))]

    def _commit(self, head: str, changes: list[CommitOperationAdd | CommitOperationDelete]) -> str:
        """Make the commit. A refusal because the branch has moved is none if an earlier attempt has moved it."""
        branch, message = self.branch, self.message
        self.has_sent = True
        try:
            return branch.api.create_commit(
                branch.repo_id, changes, commit_message=message, revision=branch.revision, parent_commit=head
            ).oid
        except HfHubHTTPError as error:
            if error.response.status_code != 412:
                raise
            now = branch.head_that_is_there()
            if self._changes(self._there(now)):
                raise
            return now

    def _compare(self, commit: str) -> None:
        there = self._there(commit)
        if wrong := self._differing(there):
            what = "is missing" if wrong[0] not in there else "has other content"
            raise RunFailed(
                f"{self.branch.repo_id}: {wrong[0]} {what} in the repository after the push (commit {commit[:10]}, "
                f"{len(wrong)} of {len(self.wanted)} files differ). Look whether a .gitignore there names it. Then:\n"
                f"  {self.branch.place.resume_command}"
            )
