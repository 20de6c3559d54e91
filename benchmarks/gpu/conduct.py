"""Run the sessions one after the other, within a budget of time, and keep what each leaves. No torch.

A session that crashes or hangs costs its own results and nothing else. What is done is never done again, unless code,
packages or device have changed.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .parts import part_path, read_parts, write_part
from .plan import Session

IDENTITY = "identity"  # the part that says what the others were measured on and with
PATIENCE = 3  # a session that takes so many times as long as expected is ended ...
AT_LEAST = 120  # ... but not within so many seconds
TESTS_SHARE = 0.25  # of the budget


@dataclass(frozen=True)
class Options:
    """What the command was asked for.

    Attributes:
        output: Folder of table, plots and raw file.
        state: Folder of the results of single sessions.
        minutes: Budget.
        tiny: Whether to rehearse with tiny models on a CPU.
        unsloth: Interpreter of an environment that has Unsloth.
        tests: What pytest is given.
    """

    output: Path
    state: Path
    minutes: float
    tiny: bool = False
    unsloth: str | None = None
    tests: tuple[str, ...] = ("tests/gpu",)

    @property
    def device(self) -> str:
        """The device of every session."""
        return "cpu" if self.tiny else "cuda"


@dataclass(frozen=True)
class Outcome:
    """How a session ended.

    Attributes:
        problem: Empty if it left all its results.
        seconds: That it took.
    """

    problem: str
    seconds: float


@dataclass
class Progress:
    """What came of the sessions of one call.

    Attributes:
        failed: Problem of each result that is missing, by name.
        skipped: Results there was no time for.
    """

    failed: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


# Runs a session within so many seconds; the one that probably comes next may be made ready meanwhile.
Launch = Callable[[Session, Options, float, Session | None], Outcome]


def conduct(
    sessions: Iterable[Session],
    options: Options,
    launch: Launch,
    *,
    after_each: Callable[[Progress], None] = lambda progress: None,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
    clock: Callable[[], float] = time.monotonic,
) -> Progress:
    """Run what is missing, in order, as far as time allows.

    Args:
        sessions: Everything that is to be measured.
        options: Where, and how long.
        launch: Runs one session.
        after_each: Called after every session, so that a call that is cut off has written its report.
        say: Told one line per session.
        clock: Seconds.
    """
    progress, deadline = Progress(), clock() + 60 * options.minutes
    took: dict[tuple[str, ...], float] = {}
    listed = [(session, _missing(session, options)) for session in sessions]
    for index, (session, todo) in enumerate(listed):
        if todo is None:
            say(f"done before: {', '.join(session.keys)}")
            continue
        expected = _expected(todo, took)
        left = deadline - clock()
        if expected > left:
            say(f"no time left for {', '.join(todo.keys)}: {expected:.0f} s expected, {max(left, 0):.0f} s left")
            progress.skipped += todo.keys
            continue
        upcoming = next((later for _, later in listed[index + 1 :] if later is not None), None)
        outcome = launch(todo, options, min(left, _limit(todo, expected, options)), upcoming)
        if not outcome.problem:
            took[_kind(todo)] = outcome.seconds
        for key in todo.keys:
            if not part_path(options.state, key).exists():
                progress.failed[key] = outcome.problem or "it ended without a result"
        say(f"{'failed' if outcome.problem else 'done'} in {outcome.seconds:.0f} s: {', '.join(todo.keys)}")
        after_each(progress)
        if todo.kind == "probe" and outcome.problem:  # without a device there is nothing to try
            break
    return progress


def _missing(session: Session, options: Options) -> Session | None:
    """Return the part of a session that has left no result yet; None if all of it has."""
    keys = {key for key in session.keys if not part_path(options.state, key).exists()}
    if not keys:
        return None
    return session.of(keys) if session.runs else session


def _expected(session: Session, took: Mapping[tuple[str, ...], float]) -> float:
    """Return the seconds that a session will take: as long as the last time, or as its like, or as was guessed.

    The slow extras of the first time are included.
    """
    alike = [seconds for kind, seconds in took.items() if session.runs and _work(kind) == _work(_kind(session))]
    return took.get(_kind(session), max(alike, default=session.expected))


def _work(kind: tuple[str, ...]) -> list[str]:
    """Return a kind of session without the name of its arm."""
    return [run.partition(" ")[2] for run in kind]


def _kind(session: Session) -> tuple[str, ...]:
    return tuple(f"{run.arm} {run.base} {run.lengths} {run.cap_gib}" for run in session.runs) or session.keys


def _limit(session: Session, expected: float, options: Options) -> float:
    if session.kind == "tests":
        return TESTS_SHARE * 60 * options.minutes
    return max(PATIENCE * expected, AT_LEAST)


# ---- What results were measured with ----


def keep_what_belongs(state: Path, raw: dict[str, Any], identity: dict[str, Any]) -> int:
    """Put aside results of other code, packages or devices; take over those of an earlier raw file.

    Args:
        state: Folder of the results.
        raw: Content of a raw file, empty without one.
        identity: See `machine.identity`.

    Returns:
        The number of results that are there.
    """
    parts = read_parts(state)
    if parts and parts.get(IDENTITY) != identity:
        mark = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
        (state / "parts").rename(state / f"parts-of-another-{mark}")
        parts = {}
    kept = raw.get("parts", {}) if raw.get(IDENTITY) == identity else {}
    for name, part in kept.items():
        # What these have left beside their parts, gradients and a checkpoint, is not in a raw file.
        if name not in parts and not name.startswith(("reference", "base")):
            write_part(state, name, part)
    write_part(state, IDENTITY, identity)
    return len(read_parts(state)) - 1
