"""Failures of the Hub: whether trying again helps, and the one message that says what to do."""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

from ...errors import RunFailed, UserInputError, first_line
from ...hub_client import PASSING, is_redirected_in_a_circle, seconds_asked_for

# HTTPError is httpx's, or httpx2's with huggingface_hub 2: every error of the connection, and every bad status.
# The client wraps some in RuntimeError, raises ValueError for an answer it cannot read, OSError from its Xet part.
CLIENT_ERRORS = (HTTPError, OSError, RuntimeError, ValueError)
# How a store of files refuses a signed address whose time is over: S3 and Azure with 403, Google with 400.
EXPIRED = (400, 401, 403)
NO_ROOM = re.compile(r"storage|quota|limit reached|too many files", re.IGNORECASE)

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Names that a message about a push can use.

    Attributes:
        repo_id: As the caller wrote it.
        endpoint: URL of the Hub.
        token: Never shown: `text` removes it from every message.
        token_source: Where the token came from, for messages.
        resume_command: Command that repeats the push.
    """

    repo_id: str
    endpoint: str
    token: str
    token_source: str
    resume_command: str

    def text(self, message: str) -> str:
        """Return a message without the token."""
        return message.replace(self.token, "(the token)")


@dataclass(frozen=True)
class Patience:
    """How long to go on trying.

    Waits double from ``first_wait`` to ``longest_wait``. Each varies by up to a quarter, so that clients that failed
    together do not all come back together. If the server asks for a longer wait (Retry-After, RateLimit), it gets it,
    within the total.

    Attributes:
        attempts: Maximum number of attempts.
        first_wait: Seconds.
        longest_wait: Seconds.
        total: Seconds after which no attempt begins.
        answer: Seconds to wait for the server's answer to one request.
        sleep: Waits for some seconds.
        clock: Returns the seconds that have passed.
    """

    attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 30.0
    total: float = 300.0
    answer: float = 100.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic


class BadAnswer(OSError):
    """The Hub answered with success and with content that its client cannot use, such as ``{}``."""


class NotYet(OSError):
    """A failure that one more attempt may mend, and no more than one: the cause says which.

    A repository is not found right after it was made, until all servers know of it; a signed address has expired.
    """


@contextmanager
def reading_answers() -> Generator[None, None, None]:
    """Turn what the client raises about an answer of another shape into an error of the connection.

    Raises:
        BadAnswer: In place of KeyError and the like.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise BadAnswer(f"{type(error).__name__}: {first_line(error)}") from error


def keep_trying(action: Callable[[], T], patience: Patience, place: Place, say: Callable[[str], None]) -> T:
    """Do something with the Hub that may safely be done twice.

    Args:
        action: Looks at what is there before it changes anything.
        patience: How long to try.
        place: For messages.
        say: Told of each wait.

    Raises:
        UserInputError: If the user has to change something.
        RunFailed: If the failures did not pass.
    """
    started, wait, forgiven = patience.clock(), patience.first_wait, False
    for attempt in range(1, patience.attempts + 1):
        try:
            return action()
        except (UserInputError, RunFailed):  # ours, and some of them are ValueErrors
            raise
        except CLIENT_ERRORS as caught:
            error = root_of(caught)
            if isinstance(error, NotYet) and forgiven and error.__cause__ is not None:
                error = error.__cause__
            forgiven = forgiven or isinstance(error, NotYet)
            if not _is_passing(error):
                raise _explained(error, place) from error
            # The server's own wish is taken as it is: coming back earlier only prolongs a limit.
            seconds = _seconds_asked_for(error) or wait * random.uniform(0.75, 1.25)
            spent = patience.clock() - started
            # A wait that would end after the total is not begun.
            if attempt == patience.attempts or spent + seconds > patience.total:
                raise _gave_up(error, place, attempt, spent) from error
            say(f"{_what_happened(error, place)}; trying again in {seconds:.0f} s")
            patience.sleep(seconds)
            wait = min(wait * 2, patience.longest_wait)
    raise AssertionError("the last attempt returns or raises")


def token_source(given: str | None) -> str:
    """Say where the client takes its token from; the order is its own."""
    if given is not None:
        return "the token given"
    # Only for messages: the token itself comes from the client.
    for name in ("HF_OIDC_RESOURCE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name):
            return f"the token of the environment variable {name}"
    if os.path.isfile(constants.HF_TOKEN_PATH):
        return f"the token that `hf auth login` stored in {constants.HF_TOKEN_PATH}"
    return "the token of the Colab secret HF_TOKEN"


# ---- Failures that pass ----


def root_of(error: BaseException) -> BaseException:
    """Return the error below the client's own wrapping."""
    # The client wraps errors of its upload threads in RuntimeError; the cause decides whether trying again helps.
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, CLIENT_ERRORS):
        error = error.__cause__
    return error


def _is_passing(error: BaseException) -> bool:
    """Return whether the same request may succeed later: no connection, a busy or broken server, a gateway's page."""
    if isinstance(error, OfflineModeIsEnabled | HFValidationError) or is_redirected_in_a_circle(error):
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING
    if isinstance(error, PermissionError | FileNotFoundError):  # of the folder, or what Xet raises for a bad token
        return False
    return isinstance(error, HTTPError | OSError | json.JSONDecodeError) or _is_malformed(error)


def _is_malformed(error: BaseException) -> bool:
    # The client's own check of what the store of large files answers.
    return isinstance(error, BadAnswer) or (isinstance(error, ValueError) and str(error).startswith("Malformed "))


def _seconds_asked_for(error: BaseException) -> float | None:
    """Return how long the server asks to wait, None if it does not say."""
    if not isinstance(error, HfHubHTTPError):
        return None
    return seconds_asked_for(error.response.headers)


def _gave_up(error: BaseException, place: Place, attempts: int, seconds: float) -> RunFailed:
    asked = _seconds_asked_for(error)
    wish = "" if asked is None else f"; it asks to wait {asked:.0f} s"
    return RunFailed(
        place.text(
            f"{_what_happened(error, place)}{wish} ({attempts} attempts in {seconds:.0f} s). Nothing is half done; to "
            f"try again:\n  {place.resume_command}"
        )
    )


def _what_happened(error: BaseException, place: Place) -> str:
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return f"{place.endpoint} answers {'429, too many requests' if status == 429 else status}"
    if isinstance(error, json.JSONDecodeError):
        return f"{place.endpoint} answers with a page in place of data, as a proxy or gateway does"
    if _is_malformed(error):
        return place.text(f"{place.endpoint} answers with something else than was asked for ({error})")
    if isinstance(error, NotYet):
        return place.text(str(error))
    return place.text(f"no connection to {place.endpoint} ({_typed_line(error)})")


# ---- Failures that the user has to act on ----


def _explained(error: BaseException, place: Place) -> UserInputError | RunFailed:
    kind, message = _meaning(error, place)
    return kind(place.text(message) + f" Then:\n  {place.resume_command}")


def _meaning(error: BaseException, place: Place) -> tuple[type[UserInputError | RunFailed], str]:
    if isinstance(error, OfflineModeIsEnabled):
        return UserInputError, "HF_HUB_OFFLINE is set, so nothing can be sent. Unset it."
    if isinstance(error, HFValidationError):
        return UserInputError, f"{place.repo_id}: not a name for a repository ({_typed_line(error)}). Give owner/name."
    if isinstance(error, HfHubHTTPError):
        return _meaning_of_status(error.response.status_code, _said(error), place)
    if isinstance(error, PermissionError):
        return UserInputError, _bad_token(place)
    if is_redirected_in_a_circle(error):
        return (
            RunFailed,
            f"{place.endpoint} redirects in a circle, so nothing was pushed. Check HF_ENDPOINT and the proxy.",
        )
    # The client raises a plain ValueError for this one.
    if "Invalid metadata in README.md" in str(error):
        return UserInputError, f"the Hub rejects the model card, nothing was pushed: {_card_problems(error)}."
    return RunFailed, f"the push to {place.repo_id} failed: {_typed_line(error)}. Nothing is half done."


def _meaning_of_status(status: int, said: str, place: Place) -> tuple[type[UserInputError | RunFailed], str]:
    repo_id, words = place.repo_id, f" ({said})" if said else ""
    if status == 401:
        return UserInputError, _bad_token(place)
    # The same statuses stand for a missing right and for a full account; only the text tells them apart.
    if status in (402, 403, 413) and NO_ROOM.search(said):
        return UserInputError, f"{repo_id}: the Hub has no room left for it{words}. Free space or get a larger plan."
    if status == 413:
        return UserInputError, f"{repo_id}: a file is larger than the Hub accepts{words}. Make it smaller."
    if status in (402, 403):
        return UserInputError, (
            f"{repo_id}: {place.token_source} may not write there{words}. Give a repository of your own, or use a "
            f"token with write access: {place.endpoint}/settings/tokens."
        )
    if status == 404:
        return UserInputError, (
            f"{repo_id}: not found with {place.token_source}{words}. Check owner, name and branch; someone else's "
            "private repository looks like this too."
        )
    if status == 409:
        return UserInputError, f"{repo_id}: the name is taken, or being taken{words}. Give another one, or wait."
    if status == 412:
        return RunFailed, (
            f"{repo_id}: someone else changed it during the push, so nothing was pushed{words}. Look at "
            f"{place.endpoint}/{repo_id}/commits/main."
        )
    return RunFailed, f"{repo_id}: {place.endpoint} refuses the push with {status}{words}. Nothing was pushed."


def _bad_token(place: Place) -> str:
    return (
        f"{place.endpoint} does not accept {place.token_source}: it is wrong, expired or revoked. Create one with "
        f"write access at {place.endpoint}/settings/tokens and set it with `hf auth login`, HF_TOKEN or a Colab secret."
    )


def _card_problems(error: BaseException) -> str:
    """Return the Hub's own list of problems, which the client puts below a first line."""
    listed = [line.strip("- ") for line in str(error).splitlines()[1:] if line.strip("- ")]
    return "; ".join(listed) or (_said(error.__cause__) if isinstance(error.__cause__, HfHubHTTPError) else str(error))


def _said(error: HfHubHTTPError) -> str:
    """Return the server's own explanation, on one line."""
    said = error.server_message or error.response.headers.get("X-Error-Message", "")
    return "; ".join(dict.fromkeys(line.strip().rstrip(".") for line in said.splitlines() if line.strip()))


def _typed_line(error: BaseException) -> str:
    """Return the first line of an error, after the name of its type."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
