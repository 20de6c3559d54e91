"""Checkpoints pushed to the Hub during training, so that a run on a borrowed machine loses little if that vanishes.

Each is a whole adapter repository, as `export` makes it, in one commit on a branch; no optimizer state, no pickle.
A background thread pushes. A push that fails is reported and tried again; it never stops a run.
"""

from __future__ import annotations

import shlex
import tempfile
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adapter.folder import AdapterFolder, find_adapter
from ..errors import RunFailed, UserInputError
from ..export.hub.base import ask_about_base, public_base
from ..export.hub.failures import Patience
from ..export.hub.folder import Export, build_folder, license_of
from ..export.hub.push import check_push, push_folder
from ..files import read_record
from ..recipe import Recipe
from ..run_folder.checkpoints import BEST, PREFIX
from ..run_folder.contents import STATE
from .build import command_to_continue

BRANCH = "checkpoints"
END_SECONDS = 600  # to wait at the end for what is still to be pushed


class CheckpointPusher(TrainerCallback):
    """Pushes checkpoints one at a time in a background thread; of several that wait, only the last.

    Args:
        repo_id: A repository on the Hub that has the branch `BRANCH`.
        every: Push every n-th checkpoint.
        export: What is published of a checkpoint.
        say: Called once for each kind of failure, from the background thread.
        patience: How long one push keeps trying.
    """

    # The trainer's thread calls `on_save`; `_work` runs in one background thread, started while something waits and
    # gone once nothing does, so that there is never a second push to the same branch.

    def __init__(
        self, repo_id: str, every: int, export: Export, say: Callable[[str], None], patience: Patience | None = None
    ) -> None:
        self.repo_id, self.every, self.export, self.say, self.patience = repo_id, every, export, say, patience
        self._changed = threading.Condition()  # guards the next two
        self._waiting: Path | None = None
        self._is_working = False
        self._num_saved = 0
        self._reported: set[str] = set()
        self._pushed: str | None = None  # the step on the Hub

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Queue every n-th checkpoint."""
        assert args.output_dir is not None  # TrainingArguments fills it in
        self._num_saved += 1
        if self._num_saved % self.every == 0:
            self.push(_best(args) or Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Queue the best weights: the last step is judged after its checkpoint was queued."""
        if (best := _best(args)) is not None:
            self.push(best)

    def push(self, checkpoint: Path) -> None:
        """Queue a checkpoint. It may vanish at any time: then a newer one is queued or about to be."""
        with self._changed:
            self._waiting = checkpoint  # replaces an older one: who resumes wants the newest only
            self._start()

    def close(self, timeout: float | None = None) -> bool:
        """Wait until nothing is queued, after a last attempt at what could not be pushed before.

        Args:
            timeout: Maximum seconds to wait; None for no limit.

        Returns:
            Whether everything is on the Hub.
        """
        with self._changed:
            self._start()  # what failed before still waits, and no thread is at it
            self._changed.wait_for(lambda: not self._is_working, timeout)
            return not self._is_working and self._waiting is None

    def _start(self) -> None:
        if self._waiting is not None and not self._is_working:
            self._is_working = True
            # A daemon, since a Hub that does not answer must not keep the process from ending.
            threading.Thread(target=self._work, name="push", daemon=True).start()

    # ---- In the background ----

    def _work(self) -> None:
        try:
            while self._push_next():
                pass
        finally:
            with self._changed:
                self._is_working = False
                self._changed.notify_all()

    def _push_next(self) -> bool:
        """Push what is queued and return whether to look again; after a failure, `push` and `close` try it again."""
        with self._changed:
            checkpoint, self._waiting = self._waiting, None
        if checkpoint is None:
            return False
        try:
            self._push(checkpoint)
        except (UserInputError, RunFailed, OSError) as error:
            if not checkpoint.is_dir():
                return True  # removed while it was read, as old checkpoints are
            self._report(error)
            with self._changed:
                # Keep it for the next attempt, unless a newer one came meanwhile: then go on with that.
                if self._waiting is None:
                    self._waiting = checkpoint
                    return False
        return True

    def _push(self, checkpoint: Path) -> None:
        step = step_of(checkpoint)
        if step == self._pushed:  # still the best
            return
        again = ["qlora-neft", "export", str(checkpoint), "--repo-id", self.repo_id, "--revision", BRANCH]
        # Built outside the run's folder: nothing half made may lie there if the machine vanishes.
        with tempfile.TemporaryDirectory(prefix="qlora_neft-push-") as temporary:
            folder = Path(temporary) / "folder"
            build_folder(find_adapter(checkpoint), folder, self.export)
            push_folder(
                folder,
                self.repo_id,
                revision=BRANCH,
                message=f"step {step}",
                say=self._say_of_try,
                resume_command=shlex.join(again),
                patience=self.patience,
            )
        self._pushed = step

    def _say_of_try(self, line: str) -> None:
        """Say nothing of waits between attempts: a progress bar is on the screen, and training goes on anyway."""

    def _report(self, error: Exception) -> None:
        cause = error.__cause__ or error
        # By kind, not by text: request ids and times differ from one attempt to the next.
        kind = f"{type(cause).__name__} {getattr(getattr(cause, 'response', None), 'status_code', '')}"
        if kind not in self._reported:
            self._reported.add(kind)
            what = str(error).split("\n")[0].removesuffix(" Then:")
            self.say(f"push to {self.repo_id}: {what}\nTraining goes on; the next checkpoint is tried again.")


def _best(args: TrainingArguments) -> Path | None:
    """Return the folder of the best weights, if those are what the run will end with."""
    assert args.output_dir is not None  # TrainingArguments fills it in
    folder = Path(args.output_dir) / BEST
    return folder if getattr(args, "keep", "last") == "best" and folder.is_dir() else None


def step_of(folder: Path) -> str:
    """Return the step whose weights a checkpoint's folder, or that of the best weights, holds."""
    named = folder.name.removeprefix(PREFIX)
    return named if folder.name != BEST else str(read_record(folder / STATE)["global_step"])


def ready_to_push(
    recipe: Recipe, output_dir: Path, say: Callable[[str], None], patience: Patience | None = None
) -> CheckpointPusher | None:
    """Check that checkpoints can be pushed, and create repository and branch if they are missing.

    Args:
        recipe: The run's recipe; its machine section says where to, and how often.
        output_dir: The run's folder.
        say: Takes a line for the user.
        patience: How long one push keeps trying.

    Returns:
        What pushes the checkpoints; None if the recipe names no repository.

    Raises:
        UserInputError: If the token, the name or the account does not allow it, or the base is local.
        RunFailed: If the network does not come back.
    """
    repo_id, every = recipe.machine.push_to, recipe.machine.push_every
    if repo_id is None:
        return None
    try:
        # Nothing is trained yet, so the folder is made up from the recipe.
        base = public_base(AdapterFolder("machine.push_to", output_dir, {}, recipe))
    except UserInputError as error:
        raise UserInputError(
            f"machine.push_to: the base {recipe.model.name_or_path!r} is a local one, and an adapter on the Hub "
            "needs one that others can load. Name it by its Hub id in model.name_or_path; or train without push_to, "
            "and publish the result with `qlora-neft export DIR --repo-id ID --base-id ID`."
        ) from error
    check_push(repo_id, BRANCH, say=say, resume_command=command_to_continue(output_dir), patience=patience)
    license = license_of(None, ask_about_base(*base))
    say(f"checkpoints are pushed to {repo_id}, branch {BRANCH}" + (f", one of {every}" if every > 1 else ""))
    return CheckpointPusher(repo_id, every, Export(repo_id, base, None, license, True), say, patience)


@contextmanager
def pushing(pusher: CheckpointPusher | None, trainer: Any) -> Generator[None, None, None]:
    """Push a trainer's checkpoints inside the block, and wait at its end for the last one, within bounds."""
    if pusher is None:
        yield
        return
    trainer.add_callback(pusher)
    pusher.say = lambda line: trainer.say(line)  # so that the run records it
    seconds = END_SECONDS
    try:
        yield
    except KeyboardInterrupt:
        seconds = 0  # a second signal: stop at once
        raise
    finally:
        if not pusher.close(seconds):
            pusher.say(f"push to {pusher.repo_id}: not everything is there; the run's own folder is whole")
