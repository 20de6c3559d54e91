"""Who may do what: users with a write and a read token, strangers, nobody, and tokens that are not valid."""

from __future__ import annotations

from dataclasses import dataclass

from .repositories import Repository
from .wire import Refused, Request


@dataclass(frozen=True)
class Account:
    """Who sends a request. ``name`` is None for nobody."""

    name: str | None
    can_write: bool = False
    orgs: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        """Whether it may write under this name, given a token for writing."""
        return self.name is not None and namespace in (self.name, *self.orgs)


class Accounts:
    """The table of tokens."""

    def __init__(self) -> None:
        self._by_token: dict[str, Account] = {}

    def add(self, name: str, write: str | None, read: str | None, orgs: tuple[str, ...]) -> None:
        """A user and their tokens."""
        for token, can_write in ((write, True), (read, False)):
            if token:
                self._by_token[token] = Account(name, can_write, orgs)

    def of(self, request: Request) -> Account:
        """Whose token a request carries.

        Raises:
            Refused: With 401 for a token nobody has: also where none would be needed.
        """
        stated = request.headers.get("authorization")
        if stated is None:
            return Account(None)
        account = self._by_token.get(stated.removeprefix("Bearer "))
        if account is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return account


def must_read(account: Account, repo: Repository | None) -> Repository:
    """The repository, if it is there for this account; a private one is not, for others.

    Raises:
        Refused: With 401 for nobody, 404 RepoNotFound for a stranger, 403 GatedRepo.
    """
    if repo is None or (repo.private and not account.owns(repo.owner)):
        raise Refused(404 if account.name else 401, "Repository not found", "RepoNotFound")
    if repo.is_gated and not account.owns(repo.owner):
        raise Refused(403 if account.name else 401, f"Access to model {repo.id} is restricted", "GatedRepo")
    return repo


def must_write(account: Account, repo: Repository | None) -> Repository:
    """The repository, if this account may change it.

    Raises:
        Refused: As `must_read`, and with 401 or 403.
    """
    repo = must_read(account, repo)
    if account.name is None:
        raise Refused(401, "Invalid username or password.")
    if not account.owns(repo.owner):
        raise Refused(403, f"Forbidden: you have no right to write to {repo.id}")
    _must_have_write_token(account)
    return repo


def must_create(account: Account, namespace: str) -> None:
    """Pass an account that may begin a repository under this name.

    Raises:
        Refused: With 401 or 403.
    """
    if account.name is None:
        raise Refused(401, "Invalid username or password.")
    if not account.owns(namespace):
        raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
    _must_have_write_token(account)


def _must_have_write_token(account: Account) -> None:
    if not account.can_write:
        raise Refused(403, "Forbidden: you must use a write token to change a repository")
