"""A trainer whose checkpoints are whole or not there, and from which training goes on bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sized
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerState
from transformers.trainer_utils import EvalLoopOutput, get_last_checkpoint
from trl import SFTTrainer

from ..errors import RunFailed, UserInputError
from ..files import disk_problem
from ..noise.streams import preserved_rng
from ..run_folder.checkpoints import find_checkpoints, new_checkpoint, prune, read_checkpoint, save_adapter
from ..steps.losses import TokenMean, mean_token_loss
from ..steps.sequences import IGNORE_INDEX

_COLUMNS = ("input_ids", "labels", "seq_lengths")


class CleanEvaluationTrainer(SFTTrainer):
    """`SFTTrainer` whose evaluations depend on the model and the rows alone, and change nothing else."""

    _eval_loss: TokenMean | None = None  # of the evaluation that is running

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as upstream does, without noise; random streams stay where they were."""
        with preserved_rng():
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Upstream's loop, its loss averaged over tokens, so that the evaluation batch size cannot change it."""
        self._eval_loss = TokenMean()
        try:
            output = super().evaluation_loop(*args, **kwargs)
            prefix = kwargs.get("metric_key_prefix", "eval")
            if f"{prefix}_loss" in output.metrics:
                output.metrics[f"{prefix}_loss"] = self._eval_loss.value(self.accelerator)
        finally:
            self._eval_loss = None
        return output

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As upstream; an evaluation also counts each batch's loss by its tokens."""
        labels = inputs.get("labels")
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._eval_loss is not None and labels is not None:
            num_tokens = labels[..., 1:].ne(IGNORE_INDEX).sum()
            self._eval_loss.add(result[0] if return_outputs else result, num_tokens)
        return result

    def held_out_loss(self) -> float | None:
        """Mean loss per trained token on the evaluation set, without noise and without a log entry."""
        return self._mean_loss(self.eval_dataset)

    def clean_train_loss(self) -> float | None:
        """Mean loss per trained token on the first rows of the training set: no noise, no dropout.

        Training losses are measured under noise; the paper's effect (its Figure 4) shows only here. None for rows
        that are not tokenized before they are collated.
        """
        return self._mean_loss(self.train_dataset.take(min(self.args.clean_loss_rows, _num_rows(self.train_dataset))))

    def _mean_loss(self, rows: Iterable[dict[str, Any]]) -> float | None:
        features = [{key: row[key] for key in _COLUMNS if key in row} for row in rows]
        if not features or "input_ids" not in features[0]:
            return None
        size, device = self.args.per_device_eval_batch_size, self.args.device
        with preserved_rng(), self.accelerator.autocast():
            return mean_token_loss(self.model, features, self.data_collator, size, device)


def _num_rows(rows: Any) -> float:
    return len(rows) if isinstance(rows, Sized) else float("inf")


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
