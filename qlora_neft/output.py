"""Standard output and error whose reader may go away: `| head`, a killed `tee`, a closed terminal, a full disk.

Two ways to meet that. A verb that only prints ends, quietly, as other programs do. One that works for hours drops what
cannot be written and goes on.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from .errors import RunFailed

# A pipe that nobody reads, a terminal that is closed: nobody is there to be told.
_GONE = {errno.EPIPE, errno.EIO, errno.ESHUTDOWN, errno.ENXIO}

OnFailure = Callable[[str, OSError], None]


class LastingStream:
    """A text stream of which a write that fails is reported once; from then on it leads nowhere.

    Args:
        stream: Standard output or error.
        name: What to call it.
        on_failure: Called with name and error; it may raise.
    """

    def __init__(self, stream: TextIO, name: str, on_failure: OnFailure) -> None:
        self._stream, self._name, self._on_failure = stream, name, on_failure
        self._leads_nowhere = False

    @property
    def within(self) -> TextIO:
        """The stream itself."""
        return self._stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, or drop it."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts, or drop them."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write what is kept back, or drop it."""
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        if self._leads_nowhere:
            return
        try:
            action()
        except OSError as error:
            self._leads_nowhere = True
            _lead_nowhere(self._stream)
            self._on_failure(self._name, error)
        except RuntimeError as error:
            # A signal's handler may print while the line that it interrupted is being written; Python refuses that.
            if "reentrant" not in str(error):
                raise


def _lead_nowhere(stream: TextIO) -> None:
    """Connect a stream's descriptor to nothing, so that what is still buffered, and what C code prints, is dropped."""
    with suppress(OSError, ValueError, AttributeError):  # in a notebook or a test there is no descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def outliving_its_reader(note: Callable[[str], None]) -> Generator[None, None, None]:
    """Inside the block, what cannot be printed is dropped.

    Args:
        note: Called once with a sentence that says so.
    """
    noted = False

    def on_failure(name: str, error: OSError) -> None:
        nonlocal noted
        if not noted:
            noted = True
            note(f"{name} cannot be written to any more ({error.strerror}); what is printed from here on is dropped")

    with _streams(on_failure, on_failure):
        yield


@contextmanager
def ending_with_its_reader() -> Generator[None, None, None]:
    """Inside the block, the process ends when nobody reads its output; its messages on stderr are dropped.

    Raises:
        SystemExit: If standard output has no reader any more, with the code of a program that SIGPIPE ended.
        RunFailed: If it cannot be written to for another reason.
    """

    def on_failure(name: str, error: OSError) -> None:
        if error.errno in _GONE:
            raise SystemExit(128 + getattr(signal, "SIGPIPE", 13))
        raise RunFailed(f"{name} cannot be written to ({error.strerror}).")

    with _streams(on_failure, lambda name, error: None):
        yield


@contextmanager
def _streams(on_failure: OnFailure, on_failure_of_stderr: OnFailure) -> Generator[None, None, None]:
    earlier = sys.stdout, sys.stderr
    # None: a process may be started without them.
    if earlier[0] is not None:
        sys.stdout = _lasting(earlier[0], "standard output", on_failure)
    if earlier[1] is not None:
        sys.stderr = _lasting(earlier[1], "standard error", on_failure_of_stderr)
    try:
        yield
    finally:
        try:
            # Here rather than as Python ends, where a failure would be a line about an ignored exception.
            for stream in (sys.stderr, sys.stdout):
                if isinstance(stream, LastingStream):
                    stream.flush()
        finally:
            sys.stdout, sys.stderr = earlier


def _lasting(stream: TextIO, name: str, on_failure: OnFailure) -> TextIO:
    # Not around the stream of a block further out: that would hear of the failure first, and may end the process.
    if isinstance(stream, LastingStream):
        stream = stream.within
    return cast("TextIO", LastingStream(stream, name, on_failure))
