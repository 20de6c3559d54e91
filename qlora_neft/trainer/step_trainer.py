"""A trainer whose dataloader hands out whole optimizer steps, and which survives what can go wrong in one.

Out of memory: the step is split into smaller micro-batches and taken again. A request to stop that cannot wait: the
step is given up. A loss or gradient that is not finite: `FiniteStepsTrainer`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback

from ..errors import RunFailed, UserInputError
from ..fit.cards import GIB
from ..fit.choose import USABLE
from ..noise.streams import preserved_rng
from ..run_folder.stop import StopRequest
from ..steps.batch import MicroBatch, StepBatch, StepCollator
from ..steps.rows import StepLoader, StepRows, StepSampler, step_loader, step_order
from ..steps.sequences import IGNORE_INDEX
from .checkpointed_trainer import CheckpointedTrainer

ROWS_NAMED = 16  # rows of a bad step that are named


class FiniteStepsTrainer(CheckpointedTrainer):
    """No gradient that is not finite reaches the optimizer.

    Attributes:
        bad_steps: Steps skipped, in all.
        say: Told every decision, one line each.
    """

    bad_steps = 0
    say: Callable[[str], None] = staticmethod(logging.getLogger(__name__).warning)
    _bad_in_a_row = 0
    _loss_is_finite = True

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Upstream's norm; a step whose loss or gradient is not finite loses its gradient here, and is skipped.

        Under fp16 a gradient that overflows is the scaler's business, as long as the loss is finite: it skips the
        step by itself and lowers its scale.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if self._loss_is_finite and (self.args.fp16 or math.isfinite(float(norm))):
            self._bad_in_a_row = 0
            return norm
        self.bad_steps += 1
        self._bad_in_a_row += 1
        what = "gradient" if self._loss_is_finite else "loss"
        self.say(f"step {self.state.global_step + 1}: the {what} is not finite; the step is skipped")
        model.zero_grad(set_to_none=True)  # an optimizer passes over parameters without a gradient
        if self._bad_in_a_row >= self.args.max_bad_steps:
            raise RunFailed(self._diverged(what))
        return norm

    def _diverged(self, what: str) -> str:
        rows = self.rows_of_step(self.state.global_step)
        named = ", ".join(map(str, rows[:ROWS_NAMED])) + ", ..." * (len(rows) > ROWS_NAMED)
        return (
            f"the {what} was not finite in {self._bad_in_a_row} steps in a row, the last being step "
            f"{self.state.global_step + 1} (rows {named} of the training data). Look at these rows, lower "
            "train.learning_rate, or set machine.precision=fp32."
        )

    def rows_of_step(self, step: int) -> list[Any]:
        """The rows of the source that a step takes, where that is known; nothing is known here."""
        return []


@dataclass(frozen=True)
class Split:
    """Largest micro-batches.

    Attributes:
        rows: Sequences.
        tokens: Tokens, padding counted; None for no such limit.
        is_smaller: Whether it is not what the run began with.
    """

    rows: int
    tokens: int | None = None
    is_smaller: bool = False

    def __iter__(self) -> Iterator[int | None]:
        return iter((self.rows, self.tokens))

    def __str__(self) -> str:
        tokens = "" if self.tokens is None else f" and {self.tokens} tokens"
        return f"micro-batches of at most {self.rows} {'sequence' if self.rows == 1 else 'sequences'}{tokens}"

    def at_most(self, rows: int, tokens: int | None) -> Split:
        """The smaller of two, each way."""
        limits = [limit for limit in (self.tokens, tokens) if limit is not None]
        return Split(min(self.rows, rows), min(limits) if limits else None, is_smaller=True)


def smaller(split: Split, rows: int, tokens: int) -> Split:
    """Half of what did not fit.

    Args:
        split: The limits so far.
        rows: Sequences of the micro-batch that did not fit, more than one.
        tokens: Its tokens, padding counted.
    """
    return split.at_most(rows // 2, None if split.tokens is None else max(tokens // 2, 1))


def too_large(tokens: int, rows: int, error: str) -> str:
    """What to say when nothing smaller is left to try."""
    what = f"one sequence of {tokens} tokens" if rows <= 1 else f"a micro-batch of {rows} sequences"
    detail = error.strip().splitlines()[0] if error.strip() else "out of memory"
    return (
        f"out of memory: {what} does not fit on this device ({detail}). In this order: "
        "machine.activation_checkpointing=true, a lower data.max_length, optim paged_adamw_8bit, a lower lora.r, a "
        "smaller base. What was learned so far is in the newest checkpoint; machine settings may change on a resume."
    )


def check_labels(step: StepBatch, tokenizer: Any) -> None:
    """See that a step trains something, and that its end tokens are not masked as padding.

    A collator that masks every pad token (transformers' ``DataCollatorForLanguageModeling``) masks the end token as
    well where the two are one; a model so trained never stops.

    Args:
        step: The first step, collated.
        tokenizer: With ``pad_token_id`` and ``eos_token_id``.

    Raises:
        UserInputError: If there is no label at all, or pad is the end token and no end token has a label.
    """
    if step.num_trained_tokens() == 0:
        raise UserInputError(
            "train_dataset: the first optimizer step has no label, so nothing would be learned. Look at the labels: "
            "all are -100, or every response lies behind max_length."
        )
    end = getattr(tokenizer, "eos_token_id", None)
    if end is None or getattr(tokenizer, "pad_token_id", None) != end:
        return
    if any(_ends(micro.inputs, end) for micro in step) and not any(_trained_ends(m.inputs, end) for m in step):
        raise UserInputError(
            "data_collator: pad token and end token are one, and the collator masks both: the model would never learn "
            "to stop. Give the tokenizer another pad token, or leave data_collator to the trainer."
        )


def _ends(inputs: dict[str, Any], end: int) -> int:
    """End tokens that are no padding, the first token of a row left aside: it may be a begin token as well."""
    found = inputs["input_ids"].eq(end)
    if inputs.get("attention_mask") is not None and inputs["attention_mask"].shape == found.shape:
        found = found & inputs["attention_mask"].bool()
    return int(found[..., 1:].sum())


def _trained_ends(inputs: dict[str, Any], end: int) -> int:
    labels = inputs["labels"]
    return int((labels.eq(end) & labels.ne(IGNORE_INDEX))[..., 1:].sum())


class StepGivenUp(Exception):
    """The step under way was left, its gradients with it; everything before it stands."""


@contextmanager
def ungathered(accelerator: Any) -> Iterator[None]:
    """Let this one object's ``gather_for_metrics`` return what it is given, for the time of a block.

    Can go when TRL's `SFTTrainer.compute_loss` gathers what it counts once a step.
    """
    accelerator.gather_for_metrics = lambda values, *_, **__: values  # in front of the class's own
    try:
        yield
    finally:
        del accelerator.gather_for_metrics


class StepTrainer(FiniteStepsTrainer):
    """One dataloader batch is one optimizer step; `training_step` splits it into micro-batches.

    Attributes:
        split: Largest micro-batches so far found to fit.
        tokens_seen, trained_tokens_seen: Real tokens, and those with a label, on this rank.
        train_seconds: Spent in training so far, sessions before this one included.
        stop: Asked between micro-batches whether to give a step up.
    """

    split: Split
    tokens_seen = trained_tokens_seen = 0
    train_seconds = 0.0
    stop: StopRequest | None = None
    _began = 0.0
    _steps: StepSampler | None = None

    # ---- The steps ----

    def get_train_dataloader(self) -> DataLoader:
        """A dataloader whose batches are whole optimizer steps, as `StepBatch`."""
        plain = self.data_collator
        self.data_collator = StepCollator(plain, self.split.rows, self.split.tokens, self.padding_free)
        try:
            return self._step_loader() or super().get_train_dataloader()
        finally:
            self.data_collator = plain

    def _step_loader(self) -> StepLoader | None:
        """Steps whose rows do not depend on the number of ranks; None for a dataset that cannot be indexed."""
        if isinstance(self.train_dataset, IterableDataset) or not hasattr(self.train_dataset, "__getitem__"):
            return None
        dataset, collator, args = self.train_dataset, self.data_collator, self.args
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, description="Training")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="Training")
        order = step_order(self._get_train_sampler(dataset), dataset, args)
        ranks = args.world_size
        rows = args.effective_batch_size or self._train_batch_size * ranks
        self._steps = StepSampler(
            order, rows, args.process_index, ranks, drop_last=args.dataloader_drop_last, epoch_now=self._epoch
        )
        return step_loader(StepRows(dataset), self._steps, collator, args)

    def _epoch(self) -> int:
        """The epoch under way, counted from 0."""
        return self.state.global_step // max(len(self._steps or ()), 1)

    def rows_of_step(self, step: int) -> list[Any]:
        """The rows of the source that a step takes, by number where the dataset has them (``row``), else by index."""
        if self._steps is None:
            return []
        indices = self._steps.rows_of(*divmod(step, max(len(self._steps), 1)))
        has_numbers = "row" in getattr(self.train_dataset, "column_names", ())
        return [self.train_dataset[i]["row"] if has_numbers else i for i in indices]

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward through the micro-batches of one optimizer step; returns the step's loss."""
        step = inputs if isinstance(inputs, StepBatch) else StepBatch.of(inputs)
        if self.tokens_seen == 0:
            check_labels(step, self.processing_class)
        step = step.split_again(*self.split) if self.split.is_smaller else step
        loss = self._taken(model, step, num_items_in_batch)
        while loss is None:  # out of memory
            step = step.split_again(*self.split)
            loss = self._taken(model, step, num_items_in_batch)
        self.tokens_seen += step.num_tokens()
        self.trained_tokens_seen += step.num_trained_tokens()
        self._loss_is_finite = math.isfinite(loss.item())
        return loss

    def _taken(self, model: torch.nn.Module, step: StepBatch, num_items: Any) -> Tensor | None:
        """The loss of a step, or None if it did not fit: then nothing of it is left, and `split` is smaller."""
        if self.aux_loss_enabled:
            self.current_gradient_accumulation_steps = len(step)  # upstream averages a router loss over these
        offset, loss = self._first_ordinal(step), torch.zeros((), device=self.args.device)
        passes = self.passes()
        num_items = num_items if passes == 1 else num_items * passes
        for index, micro in enumerate(step):
            if self.stop and self.stop.overdue() and self.args.world_size == 1:
                raise StepGivenUp
            last = index == len(step) - 1
            try:
                for number in range(passes):
                    synced = self._gradient_sync(model, last=last and number == passes - 1)
                    with synced, self.randomness(micro, offset, index, number):
                        loss = loss + super().training_step(model, dict(micro.inputs), num_items)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not should_reduce_batch_size(error) and not isinstance(error, torch.OutOfMemoryError):
                    raise
                self._shrink(micro, model, error, last=last, splits=step.collator is not None)
                return None
        return loss

    def compute_loss(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """As upstream; what TRL counts beside the loss while training (entropy, accuracy, tokens) is this rank's own.

        TRL gathers it in every micro-batch, and ranks split a step into different numbers of them: they would wait
        for each other forever.
        """
        with ungathered(self.accelerator) if model.training and self.args.world_size > 1 else nullcontext():
            return super().compute_loss(model, *args, **kwargs)

    def _shrink(
        self, micro: MicroBatch, model: torch.nn.Module, error: RuntimeError, *, last: bool, splits: bool
    ) -> None:
        """Go on with micro-batches of half the size.

        Raises:
            RunFailed: If one sequence does not fit, or ranks that wait for each other cannot take the step again.
        """
        rows, tokens = micro.inputs["input_ids"].shape
        rows = rows if micro.spans is None else max(len(micro.spans), 1)  # flattened rows are one
        if rows <= 1 or not splits or (last and self.args.world_size > 1):
            raise RunFailed(too_large(tokens, rows, str(error))) from None
        self.split = smaller(self.split, rows, micro.inputs["input_ids"].numel())
        self.say(
            f"step {self.state.global_step + 1}: out of memory with {rows} sequences; going on with {self.split}. The "
            "step is taken again; effective batch, noise and loss are the same"
        )
        model.zero_grad(set_to_none=True)
        error.__traceback__ = None  # it holds the activations
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _gradient_sync(self, model: torch.nn.Module, *, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self.accelerator.no_sync(model)

    def passes(self) -> int:
        """Forward and backward passes over each micro-batch of the step under way; their mean is its gradient."""
        return 1

    @contextmanager
    def randomness(self, micro: MicroBatch, offset: int, index: int, number: int) -> Iterator[None]:
        """All that is random in a pass over a micro-batch; nothing of our own here."""
        yield

    def _first_ordinal(self, step: StepBatch) -> int:
        """Sequences of this step on lower ranks: ordinals count through the step as one process would."""
        if self.args.world_size == 1:
            return 0
        count = torch.tensor([step.num_sequences()], device=self.args.device)
        return int(self.accelerator.gather(count)[: self.args.process_index].sum())

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Trained tokens of the whole step, over all micro-batches and ranks: what every loss is divided by."""
        if not all(isinstance(batch, StepBatch) for batch in batch_samples):
            return super()._get_num_items_in_batch(batch_samples, device)
        count = torch.tensor(sum(step.num_trained_tokens() for step in batch_samples), device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count

    # ---- Interruption and resume ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as upstream does; global random streams are the same before and after."""
        self._began = time.monotonic()
        with preserved_rng():
            try:
                return super().train(*args, **kwargs)
            except StepGivenUp:
                self.model.zero_grad(set_to_none=True)
                self._save_checkpoint(self.model, None)
                return None
            finally:
                self.train_seconds += time.monotonic() - self._began

    def progress(self) -> dict[str, Any]:
        """Tokens seen, bad steps, and the split that fits."""
        return {
            "train_seconds": self.train_seconds + time.monotonic() - self._began,
            "tokens_seen": self.tokens_seen,
            "trained_tokens_seen": self.trained_tokens_seen,
            "bad_steps": self.bad_steps,
            "bad_in_a_row": self._bad_in_a_row,
            "split": list(self.split) if self.split.is_smaller else None,
        }

    def restore_progress(self, progress: dict[str, Any]) -> None:
        """Go on counting; a split found by running out of memory is kept unless this run's is smaller still."""
        self.train_seconds = progress["train_seconds"]
        self.tokens_seen, self.trained_tokens_seen = progress["tokens_seen"], progress["trained_tokens_seen"]
        self.bad_steps, self._bad_in_a_row = progress["bad_steps"], progress["bad_in_a_row"]
        if progress["split"]:
            self.split = self.split.at_most(*progress["split"])

    # ---- Upstream bookkeeping that reads a batch ----

    def floating_point_ops(self, inputs: Any) -> int:
        """Sum over the micro-batches of a step."""
        if isinstance(inputs, StepBatch):
            return sum(super(StepTrainer, self).floating_point_ops(micro.inputs) for micro in inputs)
        return super().floating_point_ops(inputs)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        for batch in (micro.inputs for micro in inputs) if isinstance(inputs, StepBatch) else [inputs]:
            super()._track_num_input_tokens(batch)


class MemoryProbe(TrainerCallback):
    """Reads the peak after the first step of a session; where it is too near the limit, micro-batches are halved once.

    The effective batch, the noise and the loss stay as they are.

    Args:
        trainer: Whose ``split`` it may change; its ``say`` is told.
        total: Bytes of the card.
        estimate: Bytes the planner expected, None if it was not asked.
        read_peak: Gives the peak so far, in bytes.
    """

    def __init__(self, trainer: Any, total: int, estimate: int | None, read_peak: Callable[[], int]) -> None:
        self.trainer, self.total, self.estimate, self.read_peak = trainer, total, estimate, read_peak
        self.measured: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read back, once."""
        if self.measured is not None:
            return
        self.measured = self.read_peak()
        expected = "" if self.estimate is None else f", {self.estimate / GIB:.2f} GiB expected"
        self.trainer.say(f"memory: {self.measured / GIB:.2f} GiB after the first step{expected}")
        split = self.trainer.split
        if self.measured > USABLE * self.total and split.rows > 1:
            self.trainer.split = smaller(split, split.rows, split.tokens or 0)
            self.trainer.say(
                f"memory: too near the limit of {self.total / GIB:.2f} GiB; going on with {self.trainer.split}"
            )


def cuda_probe(trainer: Any, estimate: int | None) -> MemoryProbe | None:
    """A probe of the trainer's GPU, None on a CPU."""
    device = trainer.args.device
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    total = torch.cuda.get_device_properties(device).total_memory
    return MemoryProbe(trainer, total, estimate, lambda: torch.cuda.max_memory_reserved(device))
