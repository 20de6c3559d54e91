"""Signals as requests to stop, answered where nothing is lost: between steps and batches, or at once before the first.

No torch here: the command line answers signals while torch is still being imported.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ..processes import SIGNALS

# A second one of these stops at once. The others may well be followed: SIGXCPU is sent every second, and a batch
# system's SIGUSR1 by its SIGTERM.
IMPATIENT = (signal.SIGINT, signal.SIGTERM)
# A launcher passes on the Ctrl-C that its children got as well, and a hand trembles: within this time signals are one.
TOGETHER_SECONDS = 2.0


class StopNow(KeyboardInterrupt):
    """A signal ended what had nothing to save. A `KeyboardInterrupt`, since libraries let that pass.

    Attributes:
        signal: The signal's number.
    """

    def __init__(self, number: int) -> None:
        self.signal = int(number)
        super().__init__(signal.Signals(number).name)


class StopRequest:
    """A request to stop, and when it was made. The first signal asks; a second one, later, stops at once.

    Args:
        grace_seconds: Time to finish the step and write a checkpoint. A step that takes more than half of it is
            abandoned; the checkpoint is then that of the step before.
        on_request: Called once, with the signal's name.
        interrupts: Whether there is nothing to save yet, so that a signal raises `StopNow` where it arrives.
        has_echoes: Whether signals within two seconds are one; False where none can cost anything.

    Attributes:
        signal: The signal that asked, None as long as none did.
    """

    def __init__(
        self,
        grace_seconds: float,
        on_request: Callable[[str], None] | None = None,
        *,
        interrupts: bool = False,
        has_echoes: bool = True,
    ) -> None:
        self.grace_seconds, self.on_request, self.interrupts = grace_seconds, on_request, interrupts
        self._has_echoes = has_echoes
        self.signal: signal.Signals | None = None
        # Of this process; `signal` may be another rank's. Times are of the monotonic clock, which nobody sets.
        self._seen: set[int] = set()
        self._answered: float | None = None
        self._is_asked = self._is_told = False
        self._since = 0.0

    @property
    def requested(self) -> bool:
        """Whether to stop after this step."""
        return self.signal is not None

    def overdue(self) -> bool:
        """Return whether the step has to be abandoned for the checkpoint to be written in time."""
        # The other half of the time is for the checkpoint.
        return self.requested and time.monotonic() - self._since > self.grace_seconds / 2

    def hold(self) -> None:
        """From now on there is something to save: signals are requests.

        Raises:
            StopNow: If one came before, and a library swallowed the exception.
        """
        self.interrupts = False
        if self.signal is not None:
            raise StopNow(self.signal)

    def request(self, number: int) -> None:
        """Handle a signal.

        Raises:
            StopNow: If there is nothing to save.
            KeyboardInterrupt: If it is the second one that demands it.
        """
        now = time.monotonic()
        self.agree(number)
        is_echo = self._has_echoes and self._answered is not None and now - self._answered <= TOGETHER_SECONDS
        is_repeated = number in self._seen and number not in IMPATIENT
        self._seen.add(number)
        if is_echo or is_repeated:
            return
        self._answered = now
        if self.interrupts:
            raise StopNow(number)
        if number in IMPATIENT:
            if self._is_asked:
                raise KeyboardInterrupt
            self._is_asked = True
        if not self._is_told:
            self._is_told = True
            if self.on_request:
                self.on_request(signal.Signals(number).name)

    def agree(self, number: int) -> None:
        """Stop because another process of this run was asked to. A first signal in this process is still a request."""
        if not self.requested:
            self.signal, self._since = signal.Signals(number), time.monotonic()


@contextmanager
def answered(stop: StopRequest) -> Generator[StopRequest, None, None]:
    """Direct signals to ``stop`` during a block, and restore their handlers afterwards.

    Python handles signals in its main thread only: in other threads the block runs as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        stop.request(number)

    previous: dict[int, Any] = {number: signal.signal(number, handle) for number in SIGNALS if not _is_ignored(number)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _is_ignored(number: int) -> bool:
    # As `nohup` leaves it: its program is to outlive the terminal.
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN
