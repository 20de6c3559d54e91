"""What a failure of the Hub means: whether waiting helps, and the one message that says what to do."""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

from ...errors import RunFailed, UserInputError

# HTTPError is httpx's, or httpx2's with huggingface_hub 2: every error of the connection, and every bad status.
# The client wraps some in RuntimeError, gives ValueError for an answer it cannot read, OSError from its Xet part.
CLIENT_ERRORS = (HTTPError, OSError, RuntimeError, ValueError)
PASSING = (408, 429, 500, 502, 503, 504)
ROOM = re.compile(r"storage|quota|limit reached|too many files", re.IGNORECASE)


@dataclass(frozen=True)
class Place:
    """What a message about a push can name.

    Attributes:
        repo_id: As the caller wrote it.
        endpoint: Of the Hub.
        token: Never shown: it is taken out of whatever else is.
        token_source: Where it came from.
        resume_command: What repeats the push.
    """

    repo_id: str
    endpoint: str
    token: str
    token_source: str
    resume_command: str

    def text(self, message: str) -> str:
        """A message without the token."""
        return message.replace(self.token, "(the token)")


def token_source(given: str | None) -> str:
    """Where the client takes its token from, in its own order."""
    if given is not None:
        return "the token given"
    for name in ("HF_OIDC_RESOURCE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name):
            return f"the token of the environment variable {name}"
    if os.path.isfile(constants.HF_TOKEN_PATH):
        return f"the token that `hf auth login` stored in {constants.HF_TOKEN_PATH}"
    return "the token of the Colab secret HF_TOKEN"


def root_of(error: BaseException) -> BaseException:
    """The error below the client's own wrapping."""
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, CLIENT_ERRORS):
        error = error.__cause__
    return error


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed later: no connection, a busy or broken server, a gateway's page."""
    if isinstance(error, OfflineModeIsEnabled | HFValidationError):
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING
    if isinstance(error, PermissionError | FileNotFoundError):  # of the folder, or Xet's word for a bad token
        return False
    return isinstance(error, HTTPError | OSError | json.JSONDecodeError)


def seconds_asked_for(error: BaseException) -> float | None:
    """How long the server wants to be left alone; None if it does not say."""
    if not isinstance(error, HfHubHTTPError):
        return None
    headers: Mapping[str, str] = error.response.headers
    if (after := headers.get("Retry-After", "").strip()).isdigit():
        return float(after)
    limit = re.search(r"\br\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("RateLimit", ""))
    return float(limit[1]) + 1 if limit else None


def gave_up(error: BaseException, place: Place, attempts: int, seconds: float) -> RunFailed:
    """The end of a push whose failures did not pass."""
    tried = f"{attempts} attempts in {seconds:.0f} s"
    advice = f"Nothing is half done; to try again:\n  {place.resume_command}"
    if (asked := seconds_asked_for(error)) is not None:
        return RunFailed(
            place.text(f"{what_happened(error, place)}; it asks to wait {asked:.0f} s ({tried}). {advice}")
        )
    return RunFailed(place.text(f"{what_happened(error, place)} ({tried}). {advice}"))


def what_happened(error: BaseException, place: Place) -> str:
    """A failure in a few words."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return f"{place.endpoint} answers {'429, too many requests' if status == 429 else status}"
    if isinstance(error, json.JSONDecodeError):
        return f"{place.endpoint} answers with a page in place of data, as a proxy or gateway does"
    return place.text(f"no connection to {place.endpoint} ({_first_line(error)})")


def explained(error: BaseException, place: Place) -> UserInputError | RunFailed:
    """What a failure that does not pass by itself asks of the user."""
    kind, message = _meaning(error, place)
    again = f" Then:\n  {place.resume_command}"
    return kind(place.text(message) + again)


def _meaning(error: BaseException, place: Place) -> tuple[type[UserInputError | RunFailed], str]:
    if isinstance(error, OfflineModeIsEnabled):
        return UserInputError, "HF_HUB_OFFLINE is set, so nothing can be sent. Unset it."
    if isinstance(error, HFValidationError):
        return UserInputError, f"{place.repo_id}: not a name for a repository ({_first_line(error)}). Give owner/name."
    if isinstance(error, HfHubHTTPError):
        return _meaning_of_status(error.response.status_code, _said(error), place)
    if isinstance(error, PermissionError):
        return UserInputError, _bad_token(place)
    if "Invalid metadata in README.md" in str(error):
        return UserInputError, f"the Hub refuses the model card, nothing was pushed: {_card_problems(error)}."
    return RunFailed, f"the push to {place.repo_id} failed: {_first_line(error)}. Nothing is half done."


def _meaning_of_status(status: int, said: str, place: Place) -> tuple[type[UserInputError | RunFailed], str]:
    repo_id, words = place.repo_id, f" ({said})" if said else ""
    if status == 401:
        return UserInputError, _bad_token(place)
    if status in (402, 403, 413) and ROOM.search(said):
        return UserInputError, f"{repo_id}: the Hub has no room left for it{words}. Free space or take a larger plan."
    if status == 413:
        return UserInputError, f"{repo_id}: a file is larger than the Hub takes{words}. Make it smaller."
    if status in (402, 403):
        return UserInputError, (
            f"{repo_id}: {place.token_source} may not write there{words}. Give a repository of your own, or use a "
            f"token with write access: {place.endpoint}/settings/tokens."
        )
    if status == 404:
        return UserInputError, (
            f"{repo_id}: not there for {place.token_source}{words}. Check owner, name and branch; a private repository "
            "of someone else looks like this as well."
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
        f"{place.endpoint} does not accept {place.token_source}: it is wrong, expired or revoked. Make one with write "
        f"access at {place.endpoint}/settings/tokens and give it with `hf auth login`, HF_TOKEN or a Colab secret."
    )


def _card_problems(error: BaseException) -> str:
    """The Hub's own list, which the client puts below a first line."""
    listed = [line.strip("- ") for line in str(error).splitlines()[1:] if line.strip("- ")]
    return "; ".join(listed) or (_said(error.__cause__) if isinstance(error.__cause__, HfHubHTTPError) else str(error))


def _said(error: HfHubHTTPError) -> str:
    """What the server says of its refusal, on one line."""
    said = error.server_message or error.response.headers.get("X-Error-Message", "")
    return "; ".join(dict.fromkeys(line.strip().rstrip(".") for line in said.splitlines() if line.strip()))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long to go on trying.

    Waits double from ``first_wait`` to ``longest_wait``, each varied by up to a quarter, so that many clients that
    failed together do not come back together. A server's own wish (Retry-After, RateLimit) is granted
    within the total.

    Attributes:
        attempts: At most.
        first_wait: Seconds.
        longest_wait: Seconds.
        total: Seconds after which no attempt begins.
        answer: Seconds to wait for the server's answer to one request.
        sleep: Waits.
        clock: Seconds that have passed.
    """

    attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 30.0
    total: float = 300.0
    answer: float = 100.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic


def keep_trying(action: Callable[[], T], patience: Patience, place: Place, say: Callable[[str], None]) -> T:
    """Do something with the Hub that may be done twice.

    Args:
        action: Looks at what is there before it changes anything.
        patience: How long.
        place: For messages.
        say: Told of each wait.

    Raises:
        UserInputError: If the user has to change something.
        RunFailed: If the failures did not pass.
    """
    started, wait = patience.clock(), patience.first_wait
    for attempt in range(1, patience.attempts + 1):
        try:
            return action()
        except (UserInputError, RunFailed):
            raise
        except CLIENT_ERRORS as caught:
            error = root_of(caught)
            if not is_passing(error):
                raise explained(error, place) from error
            seconds = seconds_asked_for(error) or wait * random.uniform(0.75, 1.25)
            spent = patience.clock() - started
            if attempt == patience.attempts or spent + seconds > patience.total:
                raise gave_up(error, place, attempt, spent) from error
            say(f"{what_happened(error, place)}; trying again in {seconds:.0f} s")
            patience.sleep(seconds)
            wait = min(wait * 2, patience.longest_wait)
    raise AssertionError("the last attempt returns or raises")
