"""Trackers beside a run: they hear what it logs, go on with it after a resume, and never stop it."""

from __future__ import annotations

import io
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...errors import first_line
from ...files import read_json, write_json
from ...recipe.machine import Tracker
from ...run_folder.record import TRACKERS_FILE
from ...run_folder.resume import Beginning
from ...trainer import QLoRANeftTrainer
from ..build import Run
from ..plan import is_main_process
from .callbacks import CALLBACKS, End, Tracked, TrackerCallback
from .environment import environment, first_error_of, only_errors_of, unless_set
from .told import OnlyWeights, ToldArguments, config_of, numbers_of

# In force while a run is tracked, unless the user has set them: reports about the use of the trackers themselves, and
# how long MLflow's client keeps trying a server that is not there (else four minutes a request).
VARIABLES = {
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
LOGGERS = ("mlflow.store.db.utils", "mlflow.tracking.fluent", "alembic")  # every table made for a new store
# MLflow's thread, which sends what is logged: one error for each log while its server is away.
SENDER: tuple[Tracker, str] = ("mlflow", "mlflow.utils.async_logging.async_logging_queue")


class Tracking(TrainerCallback):
    """The trackers of a run, as one callback of its trainer. One that fails is dropped, with one line.

    Args:
        trainer: The run's.

    Attributes:
        unsent: The first error of `SENDER`, filled in by its thread.
    """

    def __init__(self, trainer: QLoRANeftTrainer) -> None:
        self._trainer = trainer
        self._active: dict[Tracker, Any] = {}
        self.unsent: list[str] = []
        self._has_said_unsent = False

    def begin(self, tracker: Tracker, run: Tracked) -> None:
        """Begin a tracked run."""
        with self._surviving(tracker, "cannot begin"):
            callback: TrackerCallback = CALLBACKS[tracker]()
            self._active[tracker] = callback
            where = callback.begin(run, replace(self._trainer.state, global_step=run.step or 0))
        if tracker in self._active:
            self._trainer.say(f"{tracker}: {'going on with' if run.known else 'new'} run: {where}")

    def ids(self) -> dict[str, dict[str, str]]:
        """Return what a later session needs to go on with the tracked runs."""
        found = {}
        for tracker, callback in self._each():
            with self._surviving(tracker, "cannot tell its run"):
                found[str(tracker)] = callback.ids()
        return found

    def log(self, step: int, logs: Mapping[str, Any]) -> None:
        """Tell every tracker what was measured at a step."""
        self._tell(replace(self._trainer.state, global_step=step), logs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Tell every tracker what the trainer logs."""
        self._tell(state, logs or {})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Pass on that a checkpoint is there: some upload it, if a variable of theirs asks for it."""
        for tracker, callback in self._each():
            with self._surviving(tracker, "has failed at a checkpoint"):
                callback.on_save(args, state, control, **kwargs)

    def end(self, how: End) -> None:
        """End every tracked run."""
        trainer = self._trainer
        for tracker, callback in self._each():
            if how == "done":  # uploads the model, if a variable asks for it
                with self._surviving(tracker, "has failed at the end"):
                    # TensorBoard's and trackio's would close what `end` closes.
                    if tracker == "wandb":
                        callback.on_train_end(
                            trainer.args,
                            trainer.state,
                            trainer.control,
                            model=trainer.model,
                            processing_class=trainer.processing_class,
                        )
            with self._surviving(tracker, "cannot end its run"):
                callback.end(how)
        self._active = {}
        self._say_unsent()

    def _tell(self, state: TrainerState, logs: Mapping[str, Any]) -> None:
        numbers = numbers_of(logs)
        for tracker, callback in self._each() if numbers else ():
            with self._surviving(tracker, "has failed"):
                # A copy each: upstream's may add to it.
                callback.on_log(self._trainer.args, state, self._trainer.control, logs=dict(numbers))
        self._say_unsent()

    def _say_unsent(self) -> None:
        """Say once that a tracker cannot send, from this thread; it goes on trying with what is logged later."""
        if not self.unsent or self._has_said_unsent:
            return
        self._has_said_unsent = True
        detail = self.unsent[0].rpartition("Exception: ")[2].removesuffix(".")
        self._trainer.say(
            f"{SENDER[0]} cannot send what is logged ({detail}). Training goes on, and so do attempts to send; this is "
            "said once."
        )

    def _each(self) -> list[tuple[Tracker, Any]]:
        return list(self._active.items())

    @contextmanager
    def _surviving(self, tracker: Tracker, what: str) -> Generator[None, None, None]:
        """Drop a tracker that raises, whatever it raises: what is watched must not depend on who watches."""
        try:
            with redirect_stdout(io.StringIO()):  # trackio prints; stdout is for programs
                yield
        except Exception as error:  # noqa: BLE001  # a signal's exceptions pass
            failed = self._active.pop(tracker, None)
            detail = f"{type(error).__name__}: {first_line(error)}".removesuffix(".")
            self._trainer.say(f"{tracker} {what} ({detail}). Training goes on without it.")
            if failed is not None:
                with suppress(Exception), redirect_stdout(io.StringIO()):
                    failed.end("failed")


@contextmanager
def tracking(run: Run, trainer: QLoRANeftTrainer, beginning: Beginning) -> Generator[Tracking, None, None]:
    """Report to the trackers of a run inside the block.

    Args:
        run: The run; its machine section names the trackers.
        trainer: Its trainer, which gets a callback.
        beginning: Where the session begins.
    """
    trackers, found = run.recipe.machine.trackers, Tracking(trainer)
    if not trackers or not is_main_process():
        yield found
        return
    with ExitStack() as stack:
        stack.enter_context(environment(unless_set(VARIABLES)))
        stack.enter_context(only_errors_of(LOGGERS))
        found.unsent = stack.enter_context(first_error_of(SENDER[1]))
        how: End = "failed"
        try:
            _begin_all(found, run, trainer, beginning)
            trainer.add_callback(found)
            yield found
            how = "done"
        except (KeyboardInterrupt, Exception) as error:
            # Asked to stop: the run will go on. The trainer's own errors for that are no failures either.
            stopped = trainer.stop is not None and trainer.stop.requested
            how = "stopped" if stopped or isinstance(error, KeyboardInterrupt) else "failed"
            raise
        finally:
            trainer.remove_callback(found)
            found.end(how)


def _begin_all(found: Tracking, run: Run, trainer: QLoRANeftTrainer, beginning: Beginning) -> None:
    known = _known(run.output_dir, trainer)
    name = run.output_dir.resolve().name
    told = ToldArguments(name, config_of(run))
    for tracker in run.recipe.machine.trackers:
        found.begin(
            tracker,
            Tracked(
                name=name,
                group=run.group,
                folder=run.output_dir,
                group_folder=run.output_dir if run.group is None else run.output_dir.parent,
                told=told,
                weights=OnlyWeights(trainer.model),
                known=known.get(tracker, {}),
                step=beginning.checkpoint.step if beginning.checkpoint else None,
            ),
        )
    # Those that were left out this time are kept: a later session may report to them again.
    write_json(run.output_dir / TRACKERS_FILE, {**known, **found.ids()}, synced=True)


def _known(output_dir: Path, trainer: QLoRANeftTrainer) -> dict[str, dict[str, str]]:
    """Return what earlier sessions wrote down; a file that is no such record is passed over, with a line."""
    path = output_dir / TRACKERS_FILE
    if not path.exists():
        return {}
    try:
        found = read_json(path)
    except (OSError, ValueError):
        found = None
    if isinstance(found, dict) and all(
        isinstance(ids, dict) and all(isinstance(value, str) for value in ids.values()) for ids in found.values()
    ):
        return found
    trainer.say(f"{TRACKERS_FILE} cannot be read: new tracked runs begin")
    return {}
