"""Limits of a chat template, which comes with somebody else's tokenizer: what it may hold, and for how long it runs.

transformers renders templates in Jinja's sandbox, which keeps them from files and from Python, and not from running
without end or filling the memory. Three limits stand around every rendering: a check of the text, once for each
template, refuses what multiplies or pads without bound; a clock ends what takes seconds; and a ceiling on the memory of
this process ends what grows by other ways, such as a chain of variables of which each joins two of the last.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from functools import lru_cache
from types import FrameType

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

SECONDS = 10.0  # of one rendering; the slowest stock template takes a thousandth
MEMORY = 2**31  # bytes that this process may grow by during one; a conversation of 50 MB takes a tenth of it
MAX_TEXT = 1_000_000  # characters of a template; the longest stock one has 30,000
MAX_DEPTH = 100  # of one expression or block in another
MAX_COUNT = 10_000  # of repetitions, and of a width
MAX_LOOPS = 6  # one in another
EITHER_MARK = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
# What a template may count by; anything else that is multiplied may be a text, or be made large.
_WRITERS = ("lipsum", "strftime_now")
_WIDTHS = {"center", "ljust", "rjust", "zfill", "indent", "expandtabs", "lipsum", "batch", "slice", "format"}


class TemplateLimit(TemplateError):
    """A template that is not rendered, or not to its end."""


class _Late(TemplateLimit):
    """Raised from outside, by its class alone."""

    def __init__(self) -> None:
        super().__init__(f"it takes longer than {SECONDS:g} s")


@contextmanager
def limited(source: str) -> Generator[None, None, None]:
    """Render inside the block.

    Args:
        source: The template's text.

    Raises:
        TemplateLimit: If it is refused, or takes longer than `SECONDS`, too much memory, or recurses too deeply.
    """
    reason = refusal(source)
    if reason is not None:
        raise TemplateLimit(reason)
    try:
        with _ceiling.lowered(), _clock():
            yield
    except (RecursionError, MemoryError, OverflowError) as error:
        raise TemplateLimit(f"it goes beyond what a template may use ({type(error).__name__})") from error


@lru_cache(maxsize=64)
def refusal(source: str) -> str | None:
    """Return why a template is not rendered at all, None if it is."""
    if len(source) > MAX_TEXT:
        return f"it has {len(source):,} characters, at most {MAX_TEXT:,} are rendered"
    environment = ImmutableSandboxedEnvironment(extensions=[loopcontrols])
    try:
        # transformers' own marks of what is trained are an extension of Jinja, and compute nothing.
        return _refused(environment.parse(EITHER_MARK.sub("", source)), 0, 0)
    except RecursionError:
        return f"it is nested more than {MAX_DEPTH} deep"
    except TemplateError:
        return None  # the renderer says what is wrong with it


def _refused(node: nodes.Node, depth: int, loops: int) -> str | None:
    if depth > MAX_DEPTH:
        return f"it is nested more than {MAX_DEPTH} deep"
    loops += isinstance(node, nodes.For)
    if loops > MAX_LOOPS:
        return f"it has more than {MAX_LOOPS} loops in one another"
    reason = _wrong_here(node)
    if reason is not None:
        return f"line {node.lineno}: {reason}"
    return next((found for child in node.iter_child_nodes() if (found := _refused(child, depth + 1, loops))), None)


def _wrong_here(node: nodes.Node) -> str | None:
    if isinstance(node, nodes.Pow):
        return "it raises to a power"
    if isinstance(node, nodes.Mul) and not (_is_small(node.left) and _is_small(node.right)):
        return "it multiplies what may be a text, or large"
    if _doubles(node):
        return "it joins a text to itself, which doubles it"
    if isinstance(node, nodes.Mod) and isinstance(node.left, nodes.Const) and _has_width(str(node.left.value)):
        return "it pads to a width"
    if isinstance(node, nodes.Const) and type(node.value) is int and abs(node.value) > 10**9:
        return f"it holds the number {node.value}"
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) and node.node.name in _WRITERS:
        # strftime pads to a width: "%1000000000d".
        is_plain = all(isinstance(form, nodes.Const) and not _has_width(str(form.value)) for form in node.args)
        return None if is_plain and node.node.name == "strftime_now" else "it writes text of any length"
    name, on, arguments = _named(node)
    if name == "format":
        is_plain = isinstance(on, nodes.Const) and not _has_width(f"%{on.value}")
        return None if is_plain else "it pads to a width (format)"
    if name in _WIDTHS and not all(map(_is_small, arguments)):
        return f"it pads to a width ({name})"
    return None


def _named(node: nodes.Node) -> tuple[str | None, nodes.Node | None, list[nodes.Expr]]:
    """Return the name of a filter or method, what it is used on, and its arguments."""
    if isinstance(node, nodes.Filter):
        return node.name, node.node, node.args
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
        return node.node.attr, node.node.node, node.args
    return None, None, []


def _doubles(node: nodes.Node) -> bool:
    """Whether a variable is set to itself joined to itself: thirty rounds of a loop are a billion characters."""
    if not isinstance(node, nodes.Assign):
        return False
    own = _place(node.target)
    joined = [*node.node.find_all((nodes.Concat, nodes.Add))]
    joined += [node.node] if isinstance(node.node, nodes.Concat | nodes.Add) else []
    parts = [part for one in joined for part in (one.nodes if isinstance(one, nodes.Concat) else [one.left, one.right])]
    return own is not None and sum(_place(part) == own for part in parts) > 1


def _place(node: nodes.Node) -> tuple[str, str] | None:
    """Return the name of a variable and of its attribute; None for anything else."""
    if isinstance(node, nodes.Name):
        return node.name, ""
    if isinstance(node, nodes.NSRef):
        return node.name, node.attr
    is_attribute = isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name)
    return (node.node.name, node.attr) if is_attribute else None


def _is_small(node: nodes.Node) -> bool:
    """Whether a factor is a number that stays small: a small constant, a loop's index, a length."""
    if isinstance(node, nodes.Const):
        is_text = isinstance(node.value, str) and len(node.value) <= 100
        return is_text or (isinstance(node.value, int | float) and abs(node.value) <= MAX_COUNT)
    if isinstance(node, nodes.Filter):
        return node.name in ("length", "count")
    if isinstance(node, nodes.Getattr):
        return isinstance(node.node, nodes.Name) and node.node.name == "loop"
    if isinstance(node, nodes.Add | nodes.Sub):
        return _is_small(node.left) and _is_small(node.right)
    return isinstance(node, nodes.Neg | nodes.Pos) and _is_small(node.node)


def _has_width(form: str) -> bool:
    """Whether a format, of ``strftime`` or ``%``, pads to more than a few characters."""
    digits = "".join(character if character.isdigit() else " " for character in form)
    # A width may also come from outside the format, as in "%*d" and "{:{}}".
    return "%" in form and (any(len(run) > 2 for run in digits.split()) or "*" in form or ":{" in form)


_has_alarm = False  # whether a block of `many_renderings` has the signal, and so every clock within it


@contextmanager
def many_renderings() -> Generator[None, None, None]:
    """Take the alarm's signal for a block of renderings: to take it for each costs more than what the clock does."""
    global _has_alarm
    if _has_alarm or not _can_tell_time():
        yield
        return

    def late(signum: int, frame: FrameType | None) -> None:
        raise _Late

    # The program around us may have set the timer for an end of its own: it goes on where it stood.
    elsewhere = signal.setitimer(signal.ITIMER_REAL, 0)
    before = signal.signal(signal.SIGALRM, late)
    _has_alarm = True
    try:
        yield
    finally:
        _has_alarm = False
        signal.signal(signal.SIGALRM, before)
        if elsewhere[0]:
            signal.setitimer(signal.ITIMER_REAL, *elsewhere)


@contextmanager
def _clock() -> Generator[None, None, None]:
    """End the block by an exception after `SECONDS`."""
    if not _can_tell_time():
        with _clock_of_thread():
            yield
    elif not _has_alarm:
        with many_renderings(), _clock():
            yield
    else:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _can_tell_time() -> bool:
    """Whether signals come to this thread, as they do to a process's main one alone."""
    return threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")


@contextmanager
def _clock_of_thread() -> Generator[None, None, None]:
    """As `_clock`, where signals do not come: Python raises an exception in a thread when another one asks it to."""
    own, lock, is_over = threading.get_ident(), threading.Lock(), False

    def late() -> None:
        with lock:
            if not is_over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(own), ctypes.py_object(_Late))

    timer = threading.Timer(SECONDS, late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            is_over = True
        timer.cancel()


class _Ceiling:
    """Lets no allocation of this process go far beyond what it has, as long as a template is rendered in any thread.

    Linux alone heeds such a limit. What other threads allocate meanwhile counts too, which is why it is generous.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._before: tuple[int, int] | None = None  # -1 is a limit, too: none
        self._size, self._asked = 0, -1.0

    @contextmanager
    def lowered(self) -> Generator[None, None, None]:
        """Lower it for a block, unless it is lower already."""
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._lower()
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if resource is not None and not self._inside and self._before is not None:
                    resource.setrlimit(resource.RLIMIT_AS, self._before)

    def _lower(self) -> None:
        self._before = None
        if resource is None:
            return
        # Asking how large the process is takes a tenth as long as rendering a short row: not for every row.
        if time.monotonic() - self._asked > 0.005:
            self._size, self._asked = _address_space(), time.monotonic()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        ceiling = self._size + MEMORY
        if self._size and (soft == resource.RLIM_INFINITY or ceiling < soft):
            resource.setrlimit(resource.RLIMIT_AS, (ceiling, hard))
            self._before = soft, hard


def _address_space() -> int:
    """Return the bytes of address space that this process has; 0 where it cannot be known."""
    try:
        descriptor = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:  # no Linux
        return 0
    try:
        return int(os.read(descriptor, 200).split()[0]) * os.sysconf("SC_PAGESIZE")
    finally:
        os.close(descriptor)


_ceiling = _Ceiling()
