"""The stand-in as a whole: two origins, what they share, and what a test asks of it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from .accounts import Accounts
from .faults import Fault, Faults
from .pull import PULL_ROUTES
from .push import PUSH_ROUTES
from .repositories import Repository
from .routes import routed
from .storage import Storage
from .wire import Answer, Origin, Request


class HubServer:
    """A Hub of its own on two ports of the loopback interface; a context manager.

    Attributes:
        requests: All that arrived, at both origins, in order.
        repos: By id.
        page_size: Entries in one page of a listing.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.repos: dict[str, Repository] = {}
        self.page_size = 1000
        self.accounts, self._faults, self._lock = Accounts(), Faults(), threading.RLock()

    def __enter__(self) -> HubServer:
        self._api = Origin("api", self._respond, self.requests, self._faults, self._lock)
        self.storage = Storage(self)
        self._cdn = Origin("cdn", self.storage.respond, self.requests, self._faults, self._lock)
        return self

    def __exit__(self, *_: object) -> None:
        self._api.close()
        self._cdn.close()

    @property
    def url(self) -> str:
        """What ``HF_ENDPOINT`` must be."""
        return self._api.url

    @property
    def storage_url(self) -> str:
        """The second origin, which never gets a token."""
        return self._cdn.url

    # ---- What is there ----

    def add_user(
        self, name: str, *, write: str | None = None, read: str | None = None, orgs: tuple[str, ...] = ()
    ) -> None:
        """A user, their tokens, and the organizations they write for."""
        self.accounts.add(name, write, read, orgs)

    def add_repo(self, repo_id: str, folder: Path | None = None, *, private: bool = False) -> Repository:
        """A repository that was there before, empty or with a folder's files."""
        repo = self.repos[repo_id] = Repository(repo_id, private)
        if folder is not None:
            files = {
                path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
            }
            repo.add(files)
        return repo

    def repo(self, repo_id: str) -> Repository:
        """A repository as it is now.

        Raises:
            KeyError: If there is none.
        """
        return self.repos[repo_id]

    # ---- What goes wrong ----

    def fail(
        self,
        method: str,
        pattern: str,
        *,
        status: int = 503,
        times: int | None = 1,
        drop: bool = False,
        lands: Literal["now", "late"] | None = None,
        **more: Any,
    ) -> Fault:
        """Let requests fail; see `Fault`. What was asked for first is met first."""
        fault = Fault(method, pattern, status, times, drop, lands, **more)
        self._faults.add(fault)
        return fault

    def meanwhile(self, method: str, pattern: str, action: Callable[[], Any]) -> None:
        """Let something happen once, just before a request of this kind is answered."""
        self._faults.add_action(Fault(method, pattern), action)

    def heal(self) -> None:
        """Let nothing fail any more."""
        self._faults.clear()

    def sent(self, method: str, pattern: str) -> list[Request]:
        """The requests that arrived with this method and something in their path."""
        rule = Fault(method, pattern)
        return [request for request in self.requests if rule.matches(request)]

    # ---- How a client comes here ----

    def environment(self, token: str | None, home: Any = None) -> dict[str, str]:
        """Variables for a process: this Hub, and no other.

        Args:
            token: Of the user; None for nobody.
            home: ``HF_HOME``, a folder of the test.
        """
        own = {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return {**own, "HF_TOKEN": token or "", **({"HF_HOME": str(home)} if home else {})}

    def use(self, monkeypatch: pytest.MonkeyPatch, token: str | None, cache: Path | None = None) -> None:
        """Let the client in this process come here: what the variables above say, which it reads but once.

        Args:
            monkeypatch: Undoes it.
            token: Of the user; None for nobody.
            cache: For downloads; without one, give them a ``local_dir``: the user's cache stays the user's.
        """
        from huggingface_hub import constants, hf_api

        if cache is not None:
            monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

        for name, value in self.environment(token).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)  # what functions such as list_repo_tree are methods of
        if "transformers.utils.hub" in sys.modules:  # it keeps a client of its own, if there is one already
            monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")

    def _respond(self, request: Request) -> Answer:
        return routed(self, request, (*PUSH_ROUTES, *PULL_ROUTES))
