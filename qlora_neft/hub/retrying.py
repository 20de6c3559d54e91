"""One action tried again, a bounded number of times in a bounded time, while its failures are of a kind that passes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ..errors import RunFailed, UserInputError
from .errors import CLIENT_ERRORS, Place, explained, gave_up, is_passing, root_of, seconds_asked_for, what_happened

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
