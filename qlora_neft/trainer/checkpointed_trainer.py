"""A trainer that can be interrupted anywhere: its checkpoints are whole or absent, and a resume is bit for bit exact.

Besides what is trained (an adapter, or a whole model) and upstream's states a checkpoint holds ``progress.json``:
counters and the split that fits in memory. Random states are written for what others add, but nothing here depends on
them: noise, dropout and the order of rows are keyed by seed and step.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NotRequired

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerState
from transformers.trainer import SCALER_NAME
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTTrainer
from typing_extensions import TypedDict

from ..adapter.spelling import respelled
from ..disks import disk_problem
from ..errors import RunFailed, UserInputError
from ..files import read_json
from ..noise.streams import preserved_rng
from ..run_folder.checkpoints import find_checkpoints, new_checkpoint, prune, read_checkpoint, save_adapter
from ..run_folder.contents import PROGRESS, STATE, UNREADABLE, problems
from ..run_folder.stop import StopRequest
from .config import QLoRANeftConfig
from .memory import Split
from .when_to_save import is_asked_to_stop

TRAINABLE = "trainable.safetensors"  # of prompt and prefix tuning, beside the file that PEFT reads
KEEP = 2  # checkpoints, unless save_total_limit says otherwise


class StepGivenUp(Exception):
    """The step under way was abandoned together with its gradients; every step before it stands."""


class EvaluationGivenUp(Exception):
    """An evaluation under way was abandoned because the run was asked to stop; it changed nothing."""


class EndedEarly(Exception):
    """Training ended where a session began, before it took a step."""


class Progress(TypedDict):
    """Content of ``progress.json``: what a resume needs beyond upstream's state.

    ``split`` holds rows and tokens of the micro-batches found to fit, None if the run's own did. The other keys are the
    attributes of `CheckpointedTrainer`; ``bad_in_a_row`` counts the bad steps just before the checkpoint, and
    ``judgements`` is `selection.Judgements`, where a run is judged.
    """

    train_seconds: float
    tokens_seen: int
    trained_tokens_seen: int
    bad_steps: int
    bad_in_a_row: int
    split: tuple[int, int | None] | None
    judgements: NotRequired[dict[str, Any]]


class CheckpointedTrainer(SFTTrainer):
    """`SFTTrainer` with atomic checkpoints: trained weights, optimizer, scheduler, scaler, trainer and random states.

    Args:
        split: Largest micro-batches to begin with.
        kwargs: Passed on to `SFTTrainer`.

    Attributes:
        checkpoint_about: What a checkpoint's manifest says of its run; plain values.
        on_checkpoint: Called with the folder of each finished checkpoint.
        stop: Checked between micro-batches, where an overdue request gives the step up, and between the batches of an
            evaluation, which any request ends.
        say: Called with every decision taken during training, one line each.
        split: Largest micro-batches found to fit so far.
        tokens_seen: Real tokens trained on by this rank.
        trained_tokens_seen: Those of them that have a label.
        bad_steps: Steps skipped because their loss or gradient was not finite.
        train_seconds: Time spent in training, earlier sessions included.
    """

    args: QLoRANeftConfig
    model: PreTrainedModel | PeftModel
    say: Callable[[str], None] = staticmethod(logging.getLogger(__name__).warning)

    def __init__(self, *, split: Split, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.checkpoint_about: dict[str, Any] = {}
        self.on_checkpoint: Callable[[Path], None] | None = None
        self.stop: StopRequest | None = None
        self.split = split
        self.tokens_seen = self.trained_tokens_seen = 0
        self.bad_steps = self._bad_in_a_row = 0
        self.train_seconds = 0.0
        self._session_began = 0.0

    # ---- A session ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train as upstream does; ``True`` resumes from the newest sound checkpoint of ``output_dir``.

        Global random streams are the same before and after.

        Raises:
            UserInputError: If the checkpoint is damaged, or there is none.
        """
        self._session_began = time.monotonic()
        # Upstream seeds the global streams anew and draws from them; the caller's draws go on as if it had not.
        with preserved_rng():
            try:
                # Upstream would take the highest-numbered folder, damaged or not.
                if resume_from_checkpoint is True:
                    resume_from_checkpoint = self._newest_checkpoint()
                if resume_from_checkpoint:
                    checkpoint = read_checkpoint(Path(resume_from_checkpoint), problems)
                    # Upstream takes one step more, even if the checkpoint is that of the last step.
                    if self._is_last(checkpoint.path, checkpoint.step):
                        return self._take_over(checkpoint.path)
                return super().train(resume_from_checkpoint or None, trial, ignore_keys_for_eval)
            except (StepGivenUp, EvaluationGivenUp, EndedEarly):
                # The weights are those of the last whole step, and so is the checkpoint; the half gradient is dropped.
                self.model.zero_grad(set_to_none=True)
                self._save_checkpoint(self.model, None)
                return None
            finally:
                self.train_seconds += self._session_seconds()

    @property
    def _output_dir(self) -> Path:
        assert self.args.output_dir is not None, "TrainingArguments fills it in"
        return Path(self.args.output_dir)

    def _session_seconds(self) -> float:
        return time.monotonic() - self._session_began

    def _newest_checkpoint(self) -> str:
        found = find_checkpoints(self._output_dir, problems)
        for path, wrong in found.damaged:
            self.say(f"{path.name} is damaged and skipped: {'; '.join(wrong)}")
        if found.newest is None:
            damaged = get_last_checkpoint(self.args.output_dir)
            what = f"only damaged checkpoints, such as {damaged!r}" if damaged else "no checkpoint"
            raise UserInputError(
                f"resume_from_checkpoint: {self.args.output_dir!r} holds {what}. Start anew, or name another folder."
            )
        return str(found.newest.path)

    def _last_step(self) -> int:
        """Return the number of optimizer steps of the whole run."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        # A batch of the dataloader is an optimizer step, so accumulation does not enter here.
        return math.ceil(self.args.num_train_epochs * len(self.get_train_dataloader()))

    def _is_last(self, checkpoint: Path, step: int) -> bool:
        """Return whether a checkpoint of a step is one that no step follows."""
        return step >= self._last_step()

    @property
    def is_over(self) -> bool:
        """Whether no step is left to take."""
        return 0 < self.state.max_steps <= self.state.global_step

    def _take_over(self, checkpoint: Path) -> None:
        """Load a checkpoint of the last step, without training."""
        load_trained_weights(self.accelerator.unwrap_model(self.model), checkpoint)
        self.state = TrainerState.load_from_json(str(checkpoint / STATE))
        self._restore_progress(checkpoint)

    def check_stop(self) -> None:
        """End an evaluation if this run was asked to stop; called between batches, by all ranks alike.

        Raises:
            EvaluationGivenUp: If it was.
        """
        if is_asked_to_stop(self.stop, self.args):
            raise EvaluationGivenUp

    # ---- Writing ----

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Save before the evaluation of the last step, which may be cut off; upstream saves after it."""
        is_last = self.state.global_step >= self.state.max_steps
        if is_last and self.control.should_save and not self.args.load_best_model_at_end:  # which waits for the loss
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        return super()._evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Replaces upstream's, which writes into the final folder, so that a crash leaves half a checkpoint."""
        self.store_flos()  # a collective operation: every rank takes part
        if self.args.should_save:
            with self.saving("checkpoint"):
                self._write_checkpoint(self._output_dir)
        # No rank leaves, and so ends the process group, while another still writes.
        self.accelerator.wait_for_everyone()

    @contextmanager
    def saving(self, what: str) -> Generator[None, None, None]:
        """Say what failed, and what is sound, if the disk fails inside the block; ``what`` is being written."""
        try:
            yield
        # torch.save reports a full disk as a RuntimeError, safetensors as an error of its own.
        except (OSError, RuntimeError, SafetensorError) as error:
            cause = disk_problem(error) or (isinstance(error, OSError) and (error.strerror or str(error)))
            if not cause:
                raise
            raise RunFailed(self._cannot_save(what, cause)) from error

    def _write_checkpoint(self, output_dir: Path) -> None:
        step = self.state.global_step
        with new_checkpoint(output_dir, step, self.checkpoint_about) as folder:
            self._write_into(folder)
        # Outside the manifest: nothing here needs the random states, so a checkpoint without them is sound.
        self._save_rng_state(str(output_dir / f"checkpoint-{step}"))
        # Only now that the new one is whole: a crash leaves at least one sound checkpoint.
        prune(output_dir, self.args.save_total_limit or KEEP, step)
        if self.on_checkpoint:
            self.on_checkpoint(output_dir / f"checkpoint-{step}")

    def _write_into(self, folder: Path) -> None:
        """Write the files of a checkpoint."""
        save_trained(self.accelerator.unwrap_model(self.model), folder)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._describe(folder)

    def _describe(self, folder: Path) -> None:
        """Write down beside weights which step they are of."""
        self.state.save_to_json(str(folder / STATE))
        (folder / PROGRESS).write_text(json.dumps(self._progress()), encoding="utf-8")

    def _progress(self) -> Progress:
        return {
            "train_seconds": self.train_seconds + self._session_seconds(),
            "tokens_seen": self.tokens_seen,
            "trained_tokens_seen": self.trained_tokens_seen,
            "bad_steps": self.bad_steps,
            "bad_in_a_row": self._bad_in_a_row,
            # Without a shortage of memory a resumed run may choose its micro-batches anew.
            "split": (self.split.rows, self.split.tokens) if self.split.is_smaller else None,
        }

    def _cannot_save(self, what: str, cause: str) -> str:
        newest = find_checkpoints(self._output_dir).newest
        state = f"The checkpoint of step {newest.step} is sound" if newest else "There is no earlier checkpoint"
        return (
            f"the {what} of step {self.state.global_step} cannot be written to {self.args.output_dir!r} "
            f"({cause}). {state}. Free space or fix the folder, and run the same command again."
        )

    # ---- Reading ----

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Log, evaluate and save as often as this run's arguments say; upstream takes the interrupted run's."""
        position = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        return position

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load what is trained alone: every tensor of it, in the dtype it was trained in."""
        load_trained_weights(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._restore_progress(Path(checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Load the gradient scaler if both sessions have one: the number format may change between them."""
        if checkpoint is None:
            return
        is_saved, scaler = (Path(checkpoint) / SCALER_NAME).is_file(), self.accelerator.scaler
        if is_saved and scaler is None:
            self.say("the checkpoint was written in fp16; its gradient scaler is of no use here and is skipped")
        elif is_saved:
            super()._load_scaler(checkpoint)
        elif scaler is not None:
            self.say("the checkpoint was not written in fp16; a new gradient scaler finds its scale in a few steps")

    def _restore_progress(self, checkpoint: Path) -> None:
        """Go on counting; a split found by running out of memory is kept unless this run's is smaller still."""
        if not (checkpoint / PROGRESS).exists():
            return
        progress: Progress = read_json(checkpoint / PROGRESS)
        self.train_seconds = progress["train_seconds"]
        self.tokens_seen, self.trained_tokens_seen = progress["tokens_seen"], progress["trained_tokens_seen"]
        self.bad_steps, self._bad_in_a_row = progress["bad_steps"], progress["bad_in_a_row"]
        if progress["split"]:
            self.split = self.split.at_most(*progress["split"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load upstream's random states for what others add; a missing or damaged file does not matter."""
        with suppress(*UNREADABLE):
            super()._load_rng_state(checkpoint)


# ---- Trained weights ----


def save_trained(model: nn.Module, folder: Path) -> None:
    """Write what is trained into a checkpoint, so that `load_trained_weights` gives back the same bits.

    Args:
        model: With an adapter of any kind, or trained in full.
        folder: The checkpoint's.
    """
    assert isinstance(model, (PreTrainedModel, PeftModel)), "SFTTrainer takes no other"
    save_adapter(model, None, folder)
    if _is_prompt_learning(model):
        # PEFT writes the vectors that a prompt encoder makes, from which it cannot be trained on.
        tensors = {name: param.detach().contiguous() for name, param in _trainable(model).items()}
        save_file(tensors, folder / TRAINABLE, metadata={"format": "pt"})


def load_trained_weights(model: nn.Module, folder: Path) -> None:
    """Load what `save_trained` wrote into a model of the same kind: every tensor, in the dtype it was trained in.

    Raises:
        UserInputError: If the weights belong to another model or adapter.
    """
    if not isinstance(model, PeftModel):
        _load_full(model, folder)
    elif _is_prompt_learning(model):
        _check_same(folder, load_file(folder / TRAINABLE), _trainable(model))
        model.load_state_dict(load_file(folder / TRAINABLE), strict=False)
    else:
        load_adapter_weights(model, folder)


def load_adapter_weights(model: nn.Module, folder: Path) -> None:
    """Load saved adapter weights into a model that has the same adapter.

    Raises:
        UserInputError: If they belong to another adapter.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise UserInputError(f"{folder}: holds a model that was trained in full, and this one trains an adapter.")
    saved = load_file(file)
    # PEFT loads with strict=False, which passes over names that do not match without a word.
    _check_same(folder, saved, get_peft_model_state_dict(model))
    set_peft_model_state_dict(model, respelled(model, saved) if isinstance(model, PeftModel) else saved)


def _load_full(model: nn.Module, folder: Path) -> None:
    """Load a whole model by transformers' own rules: its files may name and cut the weights in another way."""
    assert isinstance(model, PreTrainedModel), "SFTTrainer takes no other"
    if not (folder / "config.json").is_file():
        raise UserInputError(f"{folder}: holds an adapter, and this model is trained in full.")
    # In float32, which holds every value of the narrower dtypes; copied into each parameter's own.
    saved = type(model).from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).state_dict()
    own = model.state_dict()
    _check_same(folder, saved, own)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def _is_prompt_learning(model: nn.Module) -> bool:
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def _check_same(folder: Path, saved: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    if {n: t.shape for n, t in saved.items()} == {n: t.shape for n, t in expected.items()}:
        return
    raise UserInputError(f"{folder}: its adapter has other layers or another rank. Resume with the recipe it is from.")
