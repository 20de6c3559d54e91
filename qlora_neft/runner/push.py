"""Checkpoints on the Hub while training goes on: a run on a borrowed machine loses no more than it has not pushed.

Each is a whole adapter repository of its own, as `export` makes it, in one commit on a branch; no optimizer, no pickle.
Pushing is done in a background thread. A push that fails is reported and tried again; it never stops a run.
"""

from __future__ import annotations

import shlex
import tempfile
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..adapter.folder import AdapterFolder, find_adapter
from ..errors import RunFailed, UserInputError
from ..export.hub.base import ask_about_base, public_base
from ..export.hub.failures import Patience
from ..export.hub.folder import Export, build_folder, license_of
from ..export.hub.push import check_push, push_folder
from ..recipe import recipe_of_record

BRANCH = "checkpoints"
END_SECONDS = 600  # at the end, for what is still to be pushed


class CheckpointPusher(TrainerCallback):
    """Pushes checkpoints, one at a time, in a background thread. Of several that wait, only the last is pushed.

    Args:
        repo_id: On the Hub, with the branch `BRANCH`.
        every: Of how many checkpoints one is pushed.
        export: What of a checkpoint is published.
        say: Told once of each kind of failure, from the background thread.
        patience: How long one push goes on trying.
    """

    def __init__(
        self, repo_id: str, every: int, export: Export, say: Callable[[str], None], patience: Patience | None = None
    ) -> None:
        self.repo_id, self.every, self.export, self.say, self.patience = repo_id, every, export, say, patience
        self._changed = threading.Condition()  # guards the two below
        self._waiting: Path | None = None
        self._is_working = False
        self._num_saved = 0
        self._reported: set[str] = set()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Queue every n-th checkpoint."""
        self._num_saved += 1
        if self._num_saved % self.every == 0:
            self.push(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def push(self, checkpoint: Path) -> None:
        """Queue a checkpoint, which may vanish at any time: then a newer one is queued or about to be."""
        with self._changed:
            self._waiting = checkpoint
            self._start()

    def close(self, timeout: float | None = None) -> bool:
        """Wait until nothing is queued, after a last attempt at what could not be pushed before.

        Args:
            timeout: Seconds to wait at most.

        Returns:
            Whether everything is on the Hub.
        """
        with self._changed:
            self._start()
            self._changed.wait_for(lambda: not self._is_working, timeout)
            return not self._is_working and self._waiting is None

    def _start(self) -> None:
        if self._waiting is not None and not self._is_working:
            self._is_working = True
            # A daemon: a Hub that does not answer must not keep the process from ending.
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
        """Push what is queued; whether to look again. After a failure the next call starts anew."""
        with self._changed:
            checkpoint, self._waiting = self._waiting, None
        if checkpoint is None:
            return False
        try:
            self._push(checkpoint)
        except (UserInputError, RunFailed, OSError) as error:
            if not checkpoint.is_dir():
                return True  # removed while it was read, as older checkpoints are
            self._report(error)
            with self._changed:
                if self._waiting is None:
                    self._waiting = checkpoint
                    return False
        return True

    def _push(self, checkpoint: Path) -> None:
        step = checkpoint.name.removeprefix("checkpoint-")
        again = ["qlora-neft", "export", str(checkpoint), "--repo-id", self.repo_id, "--revision", BRANCH]
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

    def _say_of_try(self, line: str) -> None:
        """Waits between attempts are not told: a progress bar is on the screen, and training goes on anyway."""

    def _report(self, error: Exception) -> None:
        cause = error.__cause__ or error
        kind = f"{type(cause).__name__} {getattr(getattr(cause, 'response', None), 'status_code', '')}"
        if kind not in self._reported:
            self._reported.add(kind)
            what = str(error).split("\n")[0].removesuffix(" Then:")
            self.say(f"push to {self.repo_id}: {what}\nTraining goes on; the next checkpoint is tried again.")


def ready_to_push(
    repo_id: str,
    every: int,
    recipe: dict[str, Any],
    output_dir: Path,
    say: Callable[[str], None],
    patience: Patience | None = None,
) -> CheckpointPusher:
    """Make sure, before a weight is loaded, that checkpoints can be pushed; repository and branch are made if missing.

    Args:
        repo_id: ``machine.push_to``.
        every: ``machine.push_every``.
        recipe: `Recipe.to_dict`.
        output_dir: Of the run.
        say: Takes a line for the user.
        patience: How long to go on trying.

    Raises:
        UserInputError: If the token, the name or the account does not allow it, or the base is a local one.
        RunFailed: If the network did not come back.
    """
    try:
        base = public_base(AdapterFolder("machine.push_to", output_dir, {}, recipe_of_record(recipe)))
    except UserInputError as error:
        raise UserInputError(
            f"machine.push_to: the base {recipe['model']['name_or_path']!r} is a local one, and an adapter on the Hub "
            "needs one that others can load. Name it by its Hub id in model.name_or_path; or train without push_to, "
            "and publish the result with `qlora-neft export DIR --repo-id ID --base-id ID`."
        ) from error
    command = shlex.join(["qlora-neft", "train", str(output_dir / "recipe.yaml"), "--output-dir", str(output_dir)])
    check_push(repo_id, BRANCH, say=say, resume_command=command, patience=patience)
    license = license_of(None, ask_about_base(*base))
    say(f"checkpoints are pushed to {repo_id}, branch {BRANCH}" + (f", one of {every}" if every > 1 else ""))
    return CheckpointPusher(repo_id, every, Export(repo_id, base, None, license, True), say, patience)


@contextmanager
def pushing(pusher: CheckpointPusher | None, trainer: Any) -> Generator[None, None, None]:
    """Inside the block a trainer's checkpoints are pushed; at its end there is a bounded wait for the last one."""
    if pusher is None:
        yield
        return
    trainer.add_callback(pusher)
    pusher.say = lambda line: trainer.say(line)  # written down with what else happens
    seconds = END_SECONDS
    try:
        yield
    except KeyboardInterrupt:
        seconds = 0  # a second signal: at once
        raise
    finally:
        if not pusher.close(seconds):
            pusher.say(f"push to {pusher.repo_id}: not everything is there; the run's own folder is whole")
