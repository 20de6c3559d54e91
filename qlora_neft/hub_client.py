"""The client of the Hub, kept from waiting without end, and what its failures are in one line. Nothing is patched."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .errors import UserInputError, first_line

if TYPE_CHECKING:
    from httpx2 import Response

LONGEST_WAIT = 300.0  # seconds; the Hub counts requests in windows of five minutes
# The statuses that huggingface_hub itself tries again, in those calls where it does.
PASSING = (408, 429, 500, 502, 503, 504)


class _LongWaits:
    """A hook of the client that ends a request whose answer asks to wait too long.

    huggingface_hub 2.4 waits as long as a server says (``Retry-After``), a day if it is a day.
    """

    def __init__(self) -> None:
        self.longest = LONGEST_WAIT

    def __call__(self, response: Response) -> None:
        from huggingface_hub.errors import HfHubHTTPError

        asked = seconds_asked_for(response.headers)
        if response.status_code in PASSING and asked is not None and asked > self.longest:
            raise HfHubHTTPError(
                f"{response.url.host} answers {response.status_code} and asks to wait {asked:.0f} s",
                response=response,
                server_message=response.headers.get("X-Error-Message"),
            )


_LONG_WAITS = _LongWaits()


def bound_waits(longest: float = LONGEST_WAIT) -> None:
    """Let the client of this process wait no longer than some seconds between two tries of a request.

    To be called before the Hub is asked: upstream makes a new client after a lost connection.
    """
    from huggingface_hub import get_session

    _LONG_WAITS.longest = longest
    session = get_session()
    hooks = session.event_hooks
    if _LONG_WAITS not in hooks["response"]:
        session.event_hooks = {**hooks, "response": [*hooks["response"], _LONG_WAITS]}


def seconds_asked_for(headers: Mapping[str, str]) -> float | None:
    """Return how long a server asks to wait, None if it does not say."""
    if (after := headers.get("Retry-After", "").strip()).isascii() and after.isdecimal():
        return float(after)
    # r: requests left, t: seconds until there are more (https://huggingface.co/docs/hub/rate-limits).
    limit = re.search(r"\br\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("RateLimit", ""))
    # A second more, for clocks that differ and numbers that were rounded.
    return float(limit[1]) + 1 if limit else None


def check_token(token: str | None, source: str) -> None:
    """Refuse a token that cannot be sent, such as one pasted with a dash that a word processor made.

    Args:
        token: Never shown.
        source: Where it comes from, for the message.

    Raises:
        UserInputError: If it holds anything but printable ASCII.
    """
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise UserInputError(
            f"{source} holds a character that no token has (a space, or one outside ASCII). Copy it again from "
            "https://huggingface.co/settings/tokens."
        )


def ready() -> None:
    """Bound the client's waits and check its token, before a download.

    Raises:
        UserInputError: If the token cannot be sent.
    """
    from huggingface_hub import get_token

    check_token(get_token(), "the token for the Hub (HF_TOKEN, or stored by `hf auth login`)")
    bound_waits()


def download_errors() -> tuple[type[Exception], ...]:
    """Return what a download raises: refusals, failures of the network, and ValueError for file names that lead out.

    The others are upstream's own, about an answer of another shape than the Hub's.
    """
    from huggingface_hub.errors import HTTPError

    # HTTPError is httpx's, or httpx2's with huggingface_hub 2; a circle of redirects is no OSError.
    return (OSError, HTTPError, ValueError, KeyError, TypeError, AttributeError)


def why(error: BaseException) -> str:
    """Return a download's failure in one line: the server's answer, where the client says that nothing was found."""
    if is_redirected_in_a_circle(error):
        return "the Hub redirects in a circle"
    if isinstance(error, ValueError) and "pointer path" in str(error):
        return "a file name in the repository leads out of its folder"
    cause = error.__cause__
    has_answer = cause is not None and getattr(cause, "response", None) is not None
    return first_line(cause if cause is not None and has_answer else error)


def is_redirected_in_a_circle(error: BaseException) -> bool:
    """Return whether a server led from one address to the next without end."""
    # By name: the class is httpx's or httpx2's.
    return type(error).__name__ == "TooManyRedirects"
