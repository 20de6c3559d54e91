"""The story of a sweep: plan in, every run trained, results out; the same call continues where an earlier one ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..disks import check_writable, failing_with_the_disk
from ..errors import RunFailed, RunInterrupted
from ..run_folder.lock import run_lock
from ..runner.run import run
from .asking import Asking
from .folder import divergence_of, is_begun, is_done, is_trained, note_divergence, open_sweep
from .plan import PlannedRun, SweepPlan
from .queue import DIVERGED, Outcome, Runner, run_queue
from .records import read_run
from .results_file import DryRun, DryRunEntry, SweepResults
from .show import MARKDOWN_FILE, write_results
from .tables import name_of


class Display(Protocol):
    """Shows how a sweep goes."""

    def say(self, line: str, /) -> None:
        """Show a line that stays."""

    def progress(self, name: str, line: str, /) -> None:
        """Show what a run printed last; called from another thread."""


def sweep(
    plan: SweepPlan,
    output_dir: Path,
    runner: Runner,
    display: Display,
    *,
    measures: Sequence[str] = (),
    asking: Asking | None = None,
    parallel: int = 1,
    command: str = "the same command",
    notes: Sequence[str] = (),
) -> SweepResults:
    """Train every run of a plan that is not finished, and write down the results of all of them.

    Writes into ``output_dir``: ``sweep.json`` (the plan), ``recipes/``, ``logs/``, a folder for each run, and
    ``results.json``, ``sweep.md`` and ``sweep.png`` from the runs that are finished, even if others are not.

    Args:
        plan: From `plan_sweep`.
        output_dir: A new or empty folder, or this sweep's.
        runner: Trains a run and measures it.
        display: Shows how it goes.
        measures: Names of what ``runner`` measures after training.
        asking: What the measures need to know.
        parallel: Runs at a time.
        command: The command with which to continue.
        notes: Lines to show before the first run begins: what will decide, and on which rows.

    Returns:
        The content of ``results.json``.

    Raises:
        UserInputError: If the folder holds something else.
        RunFailed: If a run failed; the others are done.
        RunInterrupted: If a signal asked to stop; every run under way has written a checkpoint.
    """
    with held(output_dir):
        for line in notes:
            display.say(line)
        trained = train_missing(plan, output_dir, runner, display, measures=measures, asking=asking, parallel=parallel)
        results = write_results(plan, output_dir)  # also after a failure or a signal: what is finished is shown
    trained.check(f"results so far: {output_dir / MARKDOWN_FILE}", command)
    return results


@dataclass(frozen=True)
class Trained:
    """How the runs of a plan stand after a session.

    Attributes:
        finished: Runs that are finished.
        of: Runs of the plan.
        failed: Those that failed in this session.
        signal: The signal that asked to stop; None without one, and if all is finished all the same.
    """

    finished: int
    of: int
    failed: tuple[Outcome, ...] = ()
    signal: int | None = None

    def check(self, results: str, command: str) -> None:
        """Raise what kept runs from being finished.

        Args:
            results: Where the results of the others are.
            command: The command with which to continue.

        Raises:
            RunInterrupted: If a signal asked to stop.
            RunFailed: If a run failed.
        """
        state = f"{self.finished} of {self.of} runs are finished; {results}"
        if self.signal is not None:
            raise RunInterrupted(self.signal, f"{state}. To continue from the checkpoints:\n  {command}")
        if self.failed:
            lines = [f"  {outcome.name}: {outcome.reason}" for outcome in self.failed]
            raise RunFailed("\n".join([f"{state}. Failed:", *lines, "Once fixed, to continue:", f"  {command}"]))


def train_missing(
    plan: SweepPlan,
    output_dir: Path,
    runner: Runner,
    display: Display,
    *,
    measures: Sequence[str] = (),
    asking: Asking | None = None,
    parallel: int = 1,
    divergence_is_a_result: bool = False,
) -> Trained:
    """Write the plan down and train every run that is not finished; arguments as in `sweep`.

    Args:
        plan, output_dir, runner, display, measures, asking, parallel: As in `sweep`; the folder is `held`.
        divergence_is_a_result: Whether a run that diverged is finished: it is noted in its folder, not trained again.

    Raises:
        UserInputError: If the folder holds something else.
    """

    def is_over(name: str) -> bool:
        folder = output_dir / name
        return is_done(folder, measures, asking) or (divergence_is_a_result and divergence_of(folder) is not None)

    new, names = open_sweep(plan, output_dir), [run.name for run in plan.runs]
    todo = [name for name in names if not is_over(name)]
    if len(new) < len(names):
        grown = f", {len(new)} of them new" if new else ""
        display.say(f"going on: {len(names) - len(todo)} of {len(names)} runs are finished{grown}")
    outcomes, signal = _train(todo, names, output_dir, runner, display, parallel)
    failed = [outcome for outcome in outcomes if outcome.code]  # told at the end: the others were to be trained first
    if divergence_is_a_result:
        for outcome in failed:
            if outcome.code == DIVERGED:
                note_divergence(output_dir / outcome.name, outcome.reason)
        failed = [outcome for outcome in failed if outcome.code != DIVERGED]
    finished = sum(map(is_over, names))
    # A signal that came when all was done changes nothing.
    return Trained(finished, len(names), tuple(failed), signal if finished < len(names) else None)


def _disk_message(output_dir: Path) -> Callable[[str], str]:
    """Return a function from the cause of a disk failure to its message."""

    def message(cause: str) -> str:
        return (
            f"{str(output_dir)!r} cannot be written to ({cause}). Free space or fix the folder, and run the same "
            "command again: it goes on."
        )

    return message


@contextmanager
def held(output_dir: Path) -> Generator[None, None, None]:
    """Hold the folder for this sweep alone; remove it again if it was made for a sweep that was refused."""
    with failing_with_the_disk(_disk_message(output_dir)), _locked(output_dir):
        yield


@contextmanager
def _locked(output_dir: Path) -> Generator[None, None, None]:
    check_writable(output_dir, "--output-dir")
    is_new = not output_dir.exists()
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        with run_lock(output_dir):
            yield
    finally:
        if is_new and not any(output_dir.iterdir()):
            output_dir.rmdir()


def _train(
    todo: Sequence[str], names: Sequence[str], output_dir: Path, runner: Runner, display: Display, parallel: int
) -> tuple[list[Outcome], int | None]:
    def place(name: str) -> str:
        return f"{names.index(name) + 1}/{len(names)} {name}"

    def ended(outcome: Outcome) -> None:
        display.say(f"{place(outcome.name)}: {_result(output_dir, outcome)}")

    started = time.monotonic()
    found = run_queue(
        todo,
        runner,
        parallel=parallel,
        on_start=lambda name: display.say(f"{place(name)}: {_verb(output_dir / name)}"),
        on_line=display.progress,
        on_end=ended,
        on_stop=lambda name: display.say(f"{name}: waiting for the next checkpoint; once more stops at once"),
    )
    if todo:
        display.say(f"{len(todo)} runs, {time.monotonic() - started:.0f} s")
    return found


def _verb(folder: Path) -> str:
    if is_trained(folder):
        return "measures"
    return "goes on" if is_begun(folder) else "begins"


def _result(output_dir: Path, outcome: Outcome) -> str:
    if outcome.code:
        return f"not finished: {outcome.reason}"
    values = read_run(output_dir / outcome.name).values
    keys = [key for key in ("clean_train_loss", "held_out_loss") if key in values]
    losses = [f"{name_of(key).label} {values[key]:.4f}" for key in keys]
    return ", ".join([f"done in {outcome.seconds:.0f} s", *losses])


# ---- Dry run ----


def check_runs(plan: SweepPlan, output_dir: Path, notes: Sequence[str] = ()) -> DryRun:
    """Check the runs and count their tokens; nothing is written. Runs that differ in noise or seed are checked once.

    Returns:
        ``decides``, which is ``notes``; ``runs`` (``name``, ``steps``, ``tokens``, ``state``); and
        ``tokens``, the sum over the runs not finished.

    Raises:
        UserInputError: If one of them would be refused.
    """
    open_sweep(plan, output_dir, write=False)
    checked: dict[str, dict[str, Any]] = {}
    rows: list[DryRunEntry] = []
    for planned in plan.runs:
        key = _key(planned)
        if key not in checked:
            # A dry run prepares the data, which takes minutes: once for all runs that differ in noise or seed.
            checked[key] = run(planned.recipe, output_dir / planned.name, dry_run=True, quiet=True)
        steps, tokens = _size(planned, checked[key])
        state = _state(output_dir / planned.name)
        rows.append({"name": planned.name, "state": state, "steps": steps, "tokens": tokens})
    tokens = sum(row["tokens"] for row in rows if row["state"] != "finished")
    return {"decides": list(notes), "runs": rows, "tokens": tokens}


def _key(planned: PlannedRun) -> str:
    """Return everything in a run's recipe that its steps and tokens depend on."""
    recipe = planned.recipe.to_dict()
    recipe["train"] = {**recipe["train"], "seed": None}
    recipe["machine"] = {**recipe["machine"], "mirror_dir": None}
    return repr({**recipe, "neftune": None})


def _size(planned: PlannedRun, facts: dict[str, Any]) -> tuple[int, int]:
    """Return optimizer steps, and an estimate of the tokens in them from the mean length of the rows."""
    steps, rows = facts["plan"]["num_steps"], facts["data"]["train"]
    per_row = rows["tokens"] / max(rows["rows"], 1)
    # The last step of a run may be short of rows: never more than the epochs hold.
    most = rows["tokens"] * planned.recipe.train.num_train_epochs
    return steps, round(min(steps * planned.recipe.train.effective_batch_size * per_row, most))


def _state(folder: Path) -> str:
    if is_trained(folder):
        return "finished"
    return "begun" if is_begun(folder) else ""
