"""A trainer whose checkpoints are whole or not there, and from which training goes on bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from ..errors import RunFailed, UserInputError
from ..files.disk_errors import disk_problem
from ..run_folder.adapter import save_adapter
from ..run_folder.checkpoint_files import find_checkpoints, new_checkpoint, prune, read_checkpoint
from .clean_evaluation import CleanEvaluationTrainer

PROGRESS = "progress.json"
KEEP = 2  # checkpoints, where the arguments do not say


class CheckpointedTrainer(CleanEvaluationTrainer):
    """`SFTTrainer` with atomic checkpoints: adapter, optimizer, scheduler, scaler, trainer state, random states.

    Attributes:
        checkpoint_about: What a checkpoint's manifest says of the run it is from; plain values.
        on_checkpoint: Told the folder of each finished checkpoint.
    """

    checkpoint_about: dict[str, Any]
    on_checkpoint: Callable[[Path], None] | None = None

    def progress(self) -> dict[str, Any]:
        """What a resumed run has to know beyond upstream's state; plain values."""
        return {}

    def restore_progress(self, progress: dict[str, Any]) -> None:
        """Go on from `progress`."""

    # ---- Writing ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """In place of upstream's, which writes into the final folder, so that a crash leaves half a checkpoint."""
        self.store_flos()  # of all ranks
        if self.args.should_save:
            try:
                self._write_checkpoint(Path(self.args.output_dir))
            except (OSError, RuntimeError, SafetensorError) as error:
                cause = disk_problem(error) or (isinstance(error, OSError) and (error.strerror or str(error)))
                if not cause:
                    raise
                raise RunFailed(self._cannot_save(cause)) from error
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, output_dir: Path) -> None:
        step = self.state.global_step
        with new_checkpoint(output_dir, step, getattr(self, "checkpoint_about", {})) as folder:
            save_adapter(self.accelerator.unwrap_model(self.model), None, folder)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self.state.save_to_json(str(folder / "trainer_state.json"))
            (folder / PROGRESS).write_text(json.dumps(self.progress()), encoding="utf-8")
        # Not in the manifest: noise, dropout and order need no random state, so a checkpoint without one is sound.
        self._save_rng_state(str(output_dir / f"checkpoint-{step}"))
        prune(output_dir, self.args.save_total_limit or KEEP)
        if self.on_checkpoint:
            self.on_checkpoint(output_dir / f"checkpoint-{step}")

    def _cannot_save(self, cause: str) -> str:
        newest = find_checkpoints(Path(self.args.output_dir)).newest
        state = f"The checkpoint of step {newest.step} is sound" if newest else "There is no earlier checkpoint"
        return (
            f"the checkpoint of step {self.state.global_step} cannot be written to {self.args.output_dir!r} "
            f"({cause}). {state}. Free space or mend the folder, and run the same command again."
        )

    # ---- Reading ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train as upstream does; ``True`` resumes from the newest sound checkpoint of ``output_dir``.

        Raises:
            UserInputError: If the checkpoint is damaged, or there is none.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._newest()
        if resume_from_checkpoint:
            checkpoint = read_checkpoint(Path(resume_from_checkpoint))
            if checkpoint.step >= self._last_step():
                return self._take_over(checkpoint.path)
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def _last_step(self) -> int:
        """Optimizer steps of the whole run."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return math.ceil(self.args.num_train_epochs * len(self.get_train_dataloader()))

    def _take_over(self, checkpoint: Path) -> None:
        """Stand where a checkpoint of the last step stands: upstream would take one step more."""
        load_adapter_weights(self.accelerator.unwrap_model(self.model), checkpoint)
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if (checkpoint / PROGRESS).exists():
            self.restore_progress(json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8")))

    def _newest(self) -> str:
        found = find_checkpoints(Path(self.args.output_dir))
        if found.newest is None:
            damaged = get_last_checkpoint(self.args.output_dir)
            what = f"only damaged checkpoints, such as {damaged!r}" if damaged else "no checkpoint"
            raise UserInputError(
                f"resume_from_checkpoint: {self.args.output_dir!r} holds {what}. Start anew, or name another folder."
            )
        return str(found.newest.path)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Upstream's; log, evaluate and save as often as this run's arguments say, not as the resumed one's did."""
        position = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        return position

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The adapter alone; every tensor of it, in the dtype it was trained in."""
        model = self.accelerator.unwrap_model(model or self.model)
        load_adapter_weights(model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (Path(checkpoint) / PROGRESS).exists():
            self.restore_progress(json.loads((Path(checkpoint) / PROGRESS).read_text(encoding="utf-8")))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Upstream's, for what others add of their own; a file that is missing or damaged is passed over."""
        with suppress(OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError):
            super()._load_rng_state(checkpoint)


def load_adapter_weights(model: Any, folder: Path) -> None:
    """Put saved adapter weights into a model that has the same adapter.

    Raises:
        UserInputError: If they are of another adapter.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    saved = load_file(folder / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(model)
    if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in expected.items()}:
        raise UserInputError(
            f"{folder}: its adapter has other layers or another rank. Resume with the recipe it is from."
        )
    set_peft_model_state_dict(model, saved)
