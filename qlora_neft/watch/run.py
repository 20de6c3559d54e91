"""One run, read from its folder again and again: what it is doing, and its numbers. Nothing is written or locked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..run_folder.checkpoints import MANIFEST, step_folders
from ..run_folder.live import (
    EVALUATING,
    FINISHED,
    LIVE_FILE,
    MEASURING,
    PREPARING,
    TRAINING,
    LiveLine,
)
from ..run_folder.mirror_mark import MARK
from ..run_folder.record import RECIPE_FILE, RUN_FILE, SUMMARY_FILE
from .clock import Clock
from .lines import GrowingFile, number
from .pace import Pace, evaluation_seconds, pace_of

WAITING = "waiting"  # nothing is there yet
NOT_MOVING = "not moving"
UNDER_WAY = (PREPARING, TRAINING, EVALUATING, MEASURING)
METRICS_FILE = "metrics.jsonl"
QUIET_SECONDS = 180.0  # less silence than that means nothing
QUIET_STEPS = 5  # nor that of so many steps
QUIET_PREPARING = 3600.0  # a base may have to be downloaded
LOSSES = {"train": "loss", "clean": "clean_loss", "held_out": "eval_loss"}  # name here, and key of a log


@dataclass(frozen=True)
class Loss:
    """A loss in nats per token, and the step it was measured at."""

    step: int
    value: float


@dataclass(frozen=True)
class Snapshot:
    """What is known of a run at one moment.

    Attributes:
        folder: As it was named.
        state: ``waiting``, a phase of ``live.jsonl``, or ``not moving``.
        note: More about the state, empty if there is nothing to say.
        quiet_seconds: Since the run last wrote something; None if it never did.
        steps: Of the whole run.
        epochs: Of the whole run; both None if they are not known yet.
        losses: The latest by name: ``train`` (under noise), ``clean`` (without noise and dropout), ``held_out``.
        lowest_held_out: The lowest, and its step.
        pace: Speed and time left.
        memory: Peaks in bytes, by kind.
        checkpoint_step: Of the newest checkpoint, and ``checkpoint_seconds`` since it was written.
        kept_step: Whose weights a finished run's are.
        bad_steps: Steps skipped.
        is_mirror: Whether the folder is a mirror, which is as old as its last copy.
        problems: What could not be read, a line each.
        curves: All losses by name.
    """

    folder: str
    state: str
    note: str = ""
    quiet_seconds: float | None = None
    title: str = ""
    step: int = 0
    steps: int | None = None
    epoch: float | None = None
    epochs: float | None = None
    learning_rate: float | None = None
    losses: dict[str, Loss] = field(default_factory=dict)
    lowest_held_out: Loss | None = None
    tokens: int | None = None
    pace: Pace = field(default_factory=Pace)
    memory: dict[str, int] = field(default_factory=dict)
    checkpoint_step: int | None = None
    checkpoint_seconds: float | None = None
    kept_step: int | None = None
    bad_steps: int | None = None
    train_seconds: float | None = None
    is_mirror: bool = False
    problems: list[str] = field(default_factory=list)
    curves: dict[str, list[Loss]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the curves, as plain values."""
        content = {key: value for key, value in asdict(self).items() if key not in ("curves", "pace")}
        return {**content, **asdict(self.pace), "steps_per_minute": self.pace.steps_per_minute}


class WatchedRun:
    """A run's folder, which may not be there yet.

    Args:
        folder: As it was named.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metrics, self._live = GrowingFile(folder / METRICS_FILE), GrowingFile(folder / LIVE_FILE)
        self._records: dict[str, tuple[float, dict[str, Any]]] = {}  # by file: when it was written, and what it says

    def look(self, clock: Clock) -> Snapshot:
        """Read what is new, and return all that is known."""
        logged, ticked = self._metrics.refresh(), self._live.refresh()
        lines = [LiveLine.of(line) for line in self._live.lines if isinstance(line.get("phase"), str)]
        lines = [line for line in lines if number(getattr(line, "time", None)) is not None]
        last = lines[-1] if lines else None
        written = last.time if last else self._metrics.modified
        quiet = clock.age(str(self.folder), written, changed=logged or ticked)
        summary, run = self._record(SUMMARY_FILE), self._record(RUN_FILE)
        pace = pace_of(lines) if lines else _pace_of_checkpoints(self.folder)
        state, note = self._state(last, summary, lines, quiet, pace)
        curves = _curves(self._metrics.lines)
        held_out = curves["held_out"]
        checkpoint, checkpoint_age = self._checkpoint(clock)
        # A log may be newer than the last of the times, which are a second apart.
        step = max((line["step"] for line in (*self._metrics.lines[-1:], *self._live.lines[-1:])), default=0)
        is_over, selection = state == FINISHED, _mapping(summary.get("selection"))
        counters = _counters(self.folder, checkpoint)
        recipe = _mapping(run.get("recipe")) or _mapping(summary.get("recipe"))
        train = _mapping(recipe.get("train"))
        return Snapshot(
            folder=str(self.folder),
            state=state,
            note=note,
            quiet_seconds=quiet,
            title=_title(recipe),
            step=summary.get("steps", step) if is_over else step,
            steps=_first(
                summary.get("steps") if is_over else None,
                *(line.steps for line in reversed(lines)),
                counters.get("max_steps"),
            ),
            epoch=_latest(self._metrics.lines, "epoch"),
            epochs=None if number(train.get("max_steps")) else number(train.get("num_train_epochs")),
            learning_rate=_latest(self._metrics.lines, "learning_rate"),
            losses={name: found[-1] for name, found in curves.items() if found},
            lowest_held_out=min(held_out, key=lambda loss: loss.value) if held_out else None,
            tokens=_first(*(line.tokens for line in reversed(lines)), counters.get("tokens_seen")),
            pace=pace if state in (TRAINING, EVALUATING) else Pace(pace.seconds_per_step, pace.tokens_per_second),
            memory=_memory(lines, summary),
            checkpoint_step=checkpoint,
            checkpoint_seconds=checkpoint_age,
            kept_step=_count(selection.get("step")),
            bad_steps=_first(
                *(line.bad_steps for line in reversed(lines)), summary.get("bad_steps"), counters.get("bad_steps")
            ),
            train_seconds=number(summary.get("train_seconds")),
            is_mirror=(self.folder / MARK).is_file(),
            problems=[problem for problem in (self._metrics.problem, self._live.problem) if problem],
            curves=curves,
        )

    def _state(
        self, last: LiveLine | None, summary: Mapping[str, Any], lines: list[LiveLine], quiet: float | None, pace: Pace
    ) -> tuple[str, str]:
        if summary and (last is None or last.phase not in UNDER_WAY or self._is_older(SUMMARY_FILE)):
            stopped = _mapping(summary.get("selection")).get("stopped_early") is True
            return FINISHED, "stopped early" if stopped else ""
        if not self.folder.is_dir():
            return WAITING, "there is no such folder yet"
        if last is None and not (self.folder / RUN_FILE).exists():
            return WAITING, "nothing is written yet: rows are prepared, the base is loaded"
        if last is None:
            # Of a version that kept no live.jsonl: what is written tells how far it is, and nothing how it ended.
            phase, note = (TRAINING if self._metrics.lines else PREPARING), ""
        else:
            phase, note = last.phase, last.note or ""
        if phase in UNDER_WAY and quiet is not None and not (self.folder / MARK).is_file():
            expected = _longest_quiet(phase, pace, evaluation_seconds(lines))
            if quiet > expected:
                return NOT_MOVING, f"it was {phase}, and may have been killed"
        return phase, note

    def _is_older(self, record: str) -> bool:
        """Whether the live file is older than a record: both have times of one file system."""
        written = self._records.get(record)
        return written is not None and (self._live.modified or 0) <= written[0]

    def _record(self, name: str) -> dict[str, Any]:
        """Return what a record says; what cannot be read now says nothing, and is tried again."""
        path = self.folder / name
        try:
            if not path.is_file():
                self._records.pop(name, None)
                return {}
            modified = path.stat().st_mtime
            known = self._records.get(name)
            if known is None or known[0] != modified:
                content = json.loads(path.read_text(encoding="utf-8"))
                self._records[name] = (modified, _mapping(content))
        except (OSError, ValueError, RecursionError):
            pass
        return self._records.get(name, (0.0, {}))[1]

    def _checkpoint(self, clock: Clock) -> tuple[int | None, float | None]:
        """Return step and age of the newest checkpoint."""
        with suppress(OSError):
            for path in step_folders(self.folder):
                manifest = path / MANIFEST
                if manifest.is_file():  # a mirror may be copying
                    age = clock.age(str(path), manifest.stat().st_mtime, changed=False)
                    return int(path.name.rpartition("-")[2]), age
        return None, None


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, begun at least."""
    return any((folder / name).is_file() for name in (RUN_FILE, SUMMARY_FILE)) or (
        (folder / METRICS_FILE).is_file() and (folder / RECIPE_FILE).is_file()
    )


def _longest_quiet(phase: str, pace: Pace, evaluation: float | None) -> float:
    """Return how long a run that is well may write nothing."""
    if phase in (PREPARING, MEASURING):
        return QUIET_PREPARING
    usual = evaluation if phase == EVALUATING else pace.seconds_per_step
    return max(QUIET_SECONDS, QUIET_STEPS * (usual or 0))


def _curves(lines: list[dict[str, Any]]) -> dict[str, list[Loss]]:
    found: dict[str, list[Loss]] = {name: [] for name in LOSSES}
    for line in lines:
        for name, key in LOSSES.items():
            value = number(line.get(key))
            if value is not None:
                found[name].append(Loss(line["step"], value))
    return found


def _latest(lines: list[dict[str, Any]], key: str) -> float | None:
    return next((value for line in reversed(lines) if (value := number(line.get(key))) is not None), None)


def _first(*values: Any) -> int | None:
    """Return the first that is a count."""
    return next((value for value in values if _count(value) is not None), None)


def _memory(lines: list[LiveLine], summary: Mapping[str, Any]) -> dict[str, int]:
    kinds = ("host_bytes", "cuda_allocated_bytes", "cuda_reserved_bytes")
    measured = next((line for line in reversed(lines) if line.host_bytes is not None), None)
    whole = _mapping(summary.get("peak_memory"))
    found = {kind: whole.get(kind, getattr(measured, kind, None)) for kind in kinds}
    return {kind: value for kind, value in found.items() if isinstance(value, int)}


def _title(recipe: Mapping[str, Any]) -> str:
    name = _mapping(recipe.get("model")).get("name_or_path")
    return str(name) if name else ""


def _counters(folder: Path, step: int | None) -> dict[str, int]:
    """Return what a checkpoint has counted: of use where there is no ``live.jsonl``."""
    if step is None or (folder / LIVE_FILE).exists():
        return {}
    found = {}
    for name in ("progress.json", "trainer_state.json"):
        with suppress(OSError, ValueError, RecursionError):
            found |= _mapping(json.loads((folder / f"checkpoint-{step}" / name).read_text(encoding="utf-8")))
    return {
        key: value
        for key, value in found.items()
        if key in ("tokens_seen", "bad_steps", "max_steps") and _count(value) is not None
    }


def _pace_of_checkpoints(folder: Path) -> Pace:
    """Return the speed between two checkpoints, of a run without ``live.jsonl``; evaluations are in it."""
    counted = []
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        for path in step_folders(folder)[:2]:
            progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))
            counted.append((int(path.name.rpartition("-")[2]), progress["train_seconds"], progress["tokens_seen"]))
    if len(counted) < 2:
        return Pace()
    steps, seconds, tokens = (new - old for new, old in zip(*counted, strict=True))
    return Pace(seconds / steps, tokens / seconds) if steps > 0 and seconds > 0 else Pace()


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None
