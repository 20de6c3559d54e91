"""A branch of a repository on the Hub: found or made, its newest commit, the right to write to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from huggingface_hub import CommitOperationAdd, HfApi, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from ..errors import UserInputError
from .errors import Place, token_source
from .retrying import Patience, keep_trying

LOG_IN = "Log in with `hf auth login`, set HF_TOKEN, or add a Colab secret HF_TOKEN: a token with write access."


def place_of(repo_id: str, token: str | None, resume_command: str) -> Place:
    """Where a push goes, and with which token.

    Raises:
        UserInputError: If there is no token, or the name is not ``owner/name``.
    """
    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise UserInputError(f"{repo_id!r} is no name for a repository: it must be owner/name.")
    used = token or get_token()
    if not used:
        raise UserInputError(f"{repo_id}: there is no token for the Hub. {LOG_IN} Then:\n  {resume_command}")
    return Place(repo_id, HfApi().endpoint, used, token_source(token), resume_command)


class Branch:
    """A branch to push to.

    Args:
        place: The repository, and the token.
        revision: Name of the branch.
        private: Of a repository that is made; one that is there stays as it is.
        say: Told if it is not as asked for.
    """

    def __init__(self, place: Place, revision: str, private: bool, say: Callable[[str], None]) -> None:
        self.place, self.revision, self.private, self.say = place, revision, private, say
        self.repo_id = place.repo_id
        self.api = HfApi(token=place.token, library_name="qlora_neft")
        self._is_known = False

    @property
    def url(self) -> str:
        """For a browser."""
        return f"{self.place.endpoint}/{self.repo_id}" + ("" if self.revision == "main" else f"/tree/{self.revision}")

    def head(self) -> str:
        """The newest commit; repository and branch are made if they are missing. Harmless to repeat.

        Raises:
            OSError: Or another of the client's errors.
        """
        try:
            info = self.api.repo_info(self.repo_id, revision=self.revision)
        except RevisionNotFoundError:
            self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
        except RepositoryNotFoundError:
            self._create()
        else:
            self._tell_if_otherwise(info.private)
            return info.sha
        return self.head_that_is_there()

    def head_that_is_there(self) -> str:
        """The newest commit.

        Raises:
            OSError: Or another of the client's errors.
        """
        return self.api.repo_info(self.repo_id, revision=self.revision).sha

    def _create(self) -> None:
        self._is_known = True
        try:
            self.api.create_repo(self.repo_id, private=self.private)
        except HfHubHTTPError as error:
            if error.response.status_code != 409 or not self.api.repo_exists(self.repo_id):
                raise  # else it was made by an earlier attempt, or just now by someone else
        if self.revision != "main":
            self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)

    def _tell_if_otherwise(self, is_private: bool) -> None:
        if not self._is_known and is_private != self.private:
            kind, other = ("private", "public") if is_private else ("public", "private")
            settings = f"{self.place.endpoint}/{self.repo_id}/settings"
            self.say(f"{self.repo_id} is there already and stays {kind}; to make it {other}: {settings}")
        self._is_known = True


@contextmanager
def patient_client(patience: Patience) -> Iterator[Callable[[], None]]:
    """Inside the block the client waits for an answer as long as told; upstream's waits without end.

    The value is to be called before each attempt: upstream makes a new client after a lost connection.
    """
    before = get_session().timeout

    def apply() -> None:
        get_session().timeout = patience.answer

    try:
        yield apply
    finally:
        get_session().timeout = before


def check_push(
    repo_id: str,
    revision: str,
    *,
    private: bool = True,
    say: Callable[[str], None],
    resume_command: str,
    patience: Patience | None = None,
) -> None:
    """Make sure that a later push will not fail for its name or token; repository and branch are made if missing.

    Raises:
        UserInputError: If the token, the name or the account does not allow it.
        RunFailed: If the network did not come back.
    """
    patience = patience or Patience()
    branch = Branch(place_of(repo_id, None, resume_command), revision, private, say)

    def ask() -> None:
        limit_waiting()
        branch.head()
        # The first request of an upload is refused without the right to write; a small text is not uploaded by it.
        branch.api.preupload_lfs_files(repo_id, [CommitOperationAdd("README.md", b"\n")], revision=revision)

    with patient_client(patience) as limit_waiting:
        keep_trying(ask, patience, branch.place, say)
