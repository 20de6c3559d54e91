"""One optimizer step, from its rows to its gradient: micro-batches, noise, dropout, loss, and what can go wrong.

The dataloader hands out whole optimizer steps (`StepBatch`); `StepTrainer.training_step` takes one, micro-batch by
micro-batch. The micro-batches are made in `qlora_neft.steps.batch`, the noise in `qlora_neft.noise.neftune`; forward
pass and loss are TRL's.

A step that runs out of memory is split into smaller micro-batches and taken again. One that a stop request cannot wait
for is given up. One whose loss or gradient is not finite is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any, cast

import datasets
import torch
from accelerate.utils.memory import should_reduce_batch_size
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ..errors import Diverged, RunFailed
from ..fused.attention import FlattenedAttention
from ..fused.expert_dropout import key_expert_dropout
from ..fused.under_way import UnderWay
from ..noise.freelb import Perturbation
from ..noise.neftune import NEFTuneNoise, NoiseStatistics, alpha_at, expected_norm, lookup_scale, noisy_embeddings
from ..noise.streams import keyed_rng, stream_key
from ..steps import LOSS_WEIGHTS
from ..steps.batch import MicroBatch, StepBatch, StepCollator, check_labels
from ..steps.rows import StepLoader, StepRows, StepSampler, step_loader, step_order
from ..steps.sequences import find_sequences
from .checkpointed_trainer import StepGivenUp
from .loss_trainer import LossTrainer
from .memory import too_large
from .router_loss import RouterLoss

ROWS_NAMED = 16  # rows of a bad step that an error message names


class StepTrainer(LossTrainer):
    """A trainer for which one dataloader batch is one optimizer step, with NEFTune noise in every step.

    Args:
        kwargs: As in `LossTrainer`.

    Attributes:
        under_way: The micro-batch of the pass under way.
        attention: How the model attends over flattened batches.
        router_loss: The load-balancing loss of a mixture of experts; None without one.
        last_loss: Of the step just taken, on this rank.
        last_norm: Of its gradient; NaN if the step was skipped.
    """

    # Upstream's unions of datasets and collators have no operation in common.
    train_dataset: Any
    eval_dataset: Any
    data_collator: Callable[[list], Any]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Upstream's own hook stays off: it scales by the padded width (huggingface/transformers#34659).
        self.neftune_noise_alpha = None
        self.loss_is_scaled_for_ga = True  # every micro-batch is divided by the tokens of the whole step
        self.under_way = UnderWay()
        key_expert_dropout(self.model, self.under_way)
        self.attention = FlattenedAttention(self.model)
        self.router_loss: RouterLoss | None = None
        self._steps: StepSampler | None = None
        self._loss_is_finite = True
        self.last_loss: float = 0.0
        self.last_norm: Tensor | float = 0.0
        self._noise_statistics = NoiseStatistics()
        self._perturbation: Perturbation | None = None  # FreeLB's, of the micro-batch under way
        self._adversarial_norms: list[Tensor] = []

    # ---- The step ----

    def training_step(
        self, model: nn.Module, inputs: StepBatch | dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward through the micro-batches of one optimizer step; return the step's loss."""
        step = inputs if isinstance(inputs, StepBatch) else StepBatch.of(inputs, self.args.loss_mean)
        self.under_way.passes += 1
        # Once a run: a resumed one passed it in its first session.
        if self.tokens_seen == 0:
            check_labels(step, self.processing_class)
        if self.split.is_smaller:  # the dataloader still splits steps as the run began
            step = step.split_again(self.split.rows, self.split.tokens)
        loss = self._accumulate(model, step, num_items_in_batch)
        while loss is None:  # out of memory
            step = step.split_again(self.split.rows, self.split.tokens)
            loss = self._accumulate(model, step, num_items_in_batch)
        self.tokens_seen += step.num_tokens()
        self.trained_tokens_seen += step.num_trained_tokens()
        # Acted upon in `_get_grad_norm`, which upstream calls next.
        self.last_loss = self.read_metrics(loss)
        self._loss_is_finite = self._on_all_ranks(math.isfinite(self.last_loss))
        return loss

    def _on_all_ranks(self, is_so: bool) -> bool:
        """Whether something is so on every rank: a step that one of them dropped alone would part their weights."""
        if self.args.world_size == 1:
            return is_so
        agreed = torch.tensor(int(is_so), device=self.args.device)
        return int(self.accelerator.reduce(agreed, reduction="sum")) == self.args.world_size

    def _accumulate(self, model: nn.Module, step: StepBatch, num_items: Tensor | int | None) -> Tensor | None:
        """Accumulate the gradient of a step and return its loss; None if it did not fit.

        If it did not fit, nothing of it is left and `split` is smaller.
        """
        # A sum, not a mean: TRL divides each micro-batch's loss by the trained tokens of the whole step.
        first_ordinal, loss = self._first_ordinal(step), torch.zeros((), device=self.args.device)
        self.step_metrics.clear()  # an attempt that did not fit has left some
        passes = self._num_passes()
        if passes > 1:  # the gradient is the mean of the passes
            assert num_items is not None, "a StepBatch is always counted"
            num_items = num_items * passes
        if self.router_loss and not self._count_routes(self.router_loss, model, step, first_ordinal):
            return None
        for index, micro in enumerate(step):
            # One rank cannot give up alone: the others would wait for its gradients forever.
            if self.stop and self.stop.overdue() and self.args.world_size == 1:
                raise StepGivenUp
            is_last = index == len(step) - 1
            try:
                for number in range(passes):
                    synced = self._gradient_sync(model, now=is_last and number == passes - 1)
                    by_sequence = self.attention.over(micro.inputs)
                    with synced, self.randomness(micro, first_ordinal, index, number), by_sequence as inputs:
                        loss = loss + super().training_step(model, inputs, num_items)
                    self.count_tokens(micro)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                # accelerate knows the messages of cuDNN and of the CPU's allocator as well.
                if not should_reduce_batch_size(error) and not isinstance(error, torch.OutOfMemoryError):
                    raise
                self._shrink(micro, model, error, is_last=is_last, splits=step.collator is not None)
                return None
        return loss

    def _count_routes(self, router_loss: RouterLoss, model: nn.Module, step: StepBatch, first_ordinal: int) -> bool:
        """Count how often each expert is chosen in a step, before its first backward pass; return whether it fits.

        The pass sees the noise and the dropout of the real one, so that it finds the same choices.
        """
        router_loss.begin()
        unwrapped = self.accelerator.unwrap_model(model)
        base = unwrapped.get_base_model() if isinstance(unwrapped, PeftModel) else unwrapped
        for index, micro in enumerate(step):
            rest = ("labels", LOSS_WEIGHTS)
            inputs = {key: value for key, value in self._prepare_inputs(dict(micro.inputs)).items() if key not in rest}
            try:
                with (
                    torch.no_grad(),
                    self.compute_loss_context_manager(),
                    self.randomness(micro, first_ordinal, index, 0),
                    self.attention.over(inputs) as by_sequence,
                    router_loss.captured() as logits,
                ):
                    base.base_model(**by_sequence, use_cache=False)  # without the head: its logits are of no use
            except RuntimeError as error:
                if not should_reduce_batch_size(error) and not isinstance(error, torch.OutOfMemoryError):
                    raise
                self._shrink(micro, model, error, is_last=index == len(step) - 1, splits=step.collator is not None)
                return False
            router_loss.count(logits, inputs.get("attention_mask"))
        if self.args.world_size > 1:
            router_loss.gather(self.accelerator)
        return True

    @contextmanager
    def randomness(self, micro: MicroBatch, first_ordinal: int, index: int, number: int) -> Generator[None, None, None]:
        """Apply everything random in one pass: its noise, and its dropout, which is the same in every pass.

        Args:
            micro: The micro-batch.
            first_ordinal: Ordinal of this rank's first sequence in the step.
            index: Index of the micro-batch in this rank's part of the step.
            number: Index of the pass over it.
        """
        dropout = stream_key("dropout", self.args.seed, self.state.global_step, self.args.process_index, index)
        spans = None if micro.spans is None else [span.shifted(first_ordinal) for span in micro.spans]
        shape = micro.inputs["input_ids"].shape  # (B, T)
        under_way = self.under_way.of(spans, shape, self.args.seed, self.state.global_step)
        noise = self._noise_of_pass(micro, first_ordinal, number)
        # The embedding runs outside the checkpointed blocks: recomputing activations draws no noise a second time.
        with under_way, noisy_embeddings(self._embedding(), noise), keyed_rng(dropout, self.args.device):
            yield

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute TRL's loss; its training metrics (entropy, accuracy, tokens) are this rank's own.

        TRL gathers them in every micro-batch: the host waits for the device several times, and ranks, which split a
        step into different numbers of micro-batches, would wait for each other forever.
        """
        if self.router_loss is None or not model.training:
            return self.token_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.router_loss.captured() as logits:
            loss = self.token_loss(model, inputs, return_outputs, num_items_in_batch)
        # Ranks average their gradients, and this is a sum over all of them; several passes share it.
        scale = self.args.world_size / self._num_passes()
        return loss + scale * self.router_loss.of(logits, inputs.get("attention_mask"))

    def _gradient_sync(self, model: nn.Module, *, now: bool) -> AbstractContextManager:
        """Average the gradients of all ranks only after the last backward pass of a step."""
        return nullcontext() if now else self.accelerator.no_sync(model)

    def _first_ordinal(self, step: StepBatch) -> int:
        """Count the step's sequences on lower ranks, so that ordinals run through the step as in one process."""
        if self.args.world_size == 1:
            return 0
        count = torch.tensor([step.num_sequences()], device=self.args.device)
        return int(self.accelerator.gather(count)[: self.args.process_index].sum())

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        """Add up the trained tokens of the whole step by their weights: every micro-batch's loss is divided by that."""
        if not all(isinstance(batch, StepBatch) for batch in batch_samples):
            return super()._get_num_items_in_batch(batch_samples, device)
        count = torch.tensor(sum(step.total_weight() for step in batch_samples), device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count

    # ---- Its noise ----

    def _alpha(self, step: int) -> float:
        args = self.args
        alpha, final_alpha = args.neftune_noise_alpha or 0.0, args.neftune_final_alpha
        return alpha_at(step, self.state.max_steps, alpha, final_alpha, args.neftune_schedule)

    def _noise(self, micro: MicroBatch, first_ordinal: int, sign: float = 1.0) -> NEFTuneNoise | None:
        """Return NEFTune's noise for a micro-batch, None where there is none."""
        alpha = self._alpha(self.state.global_step)
        # Alpha 0 registers no hook at all, so that it is bit for bit the run without NEFTune.
        if alpha == 0 or micro.spans == []:  # no span: a row that only keeps this rank in step with the others
            return None
        # Unknown boundaries raise here: they are harmless until there is noise to scale.
        spans = find_sequences(micro.inputs) if micro.spans is None else micro.spans
        return NEFTuneNoise(
            spans=[span.shifted(first_ordinal) for span in spans],
            alpha=alpha,
            seed=self.args.seed,
            step=self.state.global_step,
            distribution=self.args.neftune_distribution,
            sign=sign,
            scale=self._lookup_scale,
            statistics=self._noise_statistics if self._next_step_is_logged() else None,
        )

    def _num_passes(self) -> int:
        """Return the number of passes over each micro-batch: FreeLB's or SymNoise's where there is noise, else one."""
        if not self._alpha(self.state.global_step):
            return 1
        return 2 if self.args.neftune_symmetric else self.args.neftune_adversarial_steps

    def _noise_of_pass(self, micro: MicroBatch, first_ordinal: int, number: int) -> NEFTuneNoise | Perturbation | None:
        """Return the noise of a pass: NEFTune's.

        SymNoise's second pass mirrors it. Under FreeLB the first pass draws it, and each later one moves it up.
        """
        passes = self._num_passes()
        if self.args.neftune_symmetric:
            return self._noise(micro, first_ordinal, sign=-1.0 if number else 1.0)
        if passes == 1:
            return self._noise(micro, first_ordinal)
        if number == 0:
            noise, step_size = self._noise(micro, first_ordinal), self.args.neftune_adversarial_step_size
            assert step_size is not None, "QLoRANeftConfig requires it with more than one pass"
            self._perturbation = None if noise is None else Perturbation(noise, step_size)
        elif self._perturbation is not None:
            self._perturbation.ascend()
            if number == passes - 1 and self._next_step_is_logged():
                self._adversarial_norms += self._perturbation.norms()
        return self._perturbation

    def _embedding(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model).get_input_embeddings()

    @cached_property
    def _lookup_scale(self) -> float:
        return lookup_scale(self._embedding())

    def _next_step_is_logged(self) -> bool:
        """Whether norms are worth measuring: they are logged for the steps whose loss is."""
        every = max(int(self.state.logging_steps or 1), 1)
        return (self.state.global_step + 1) % every == 0 or self.state.global_step == 0

    def _noise_log(self) -> dict[str, float]:
        """Return the log entries on the noise measured since the last call."""
        means, self._noise_statistics = self._noise_statistics.means(), NoiseStatistics()
        norms, self._adversarial_norms = self._adversarial_norms, []
        if means is None:
            return {}
        alpha = self._alpha(self.state.global_step - 1)  # of the step just taken
        return {
            "neftune_alpha": alpha,
            "neftune_expected_norm": expected_norm(alpha, self.args.neftune_distribution),
            "neftune_norm": means[0],
            "neftune_noise_to_embedding": means[1],
            **({"neftune_adversarial_norm": torch.stack(norms).mean().item()} if norms else {}),
        }

    # ---- Out of memory ----

    def _shrink(self, micro: MicroBatch, model: nn.Module, error: RuntimeError, *, is_last: bool, splits: bool) -> None:
        """Halve the micro-batches and drop the gradients of the step, so that it can be taken again.

        Raises:
            RunFailed: If one sequence does not fit, or ranks that wait for each other cannot take the step again.
        """
        rows, tokens = micro.inputs["input_ids"].shape  # (B, T)
        rows = rows if micro.spans is None else max(len(micro.spans), 1)  # flattened rows are one row of the tensor
        # In the last micro-batch the ranks exchange gradients: the others wait for this one's and cannot go back.
        if rows <= 1 or not splits or (is_last and self.args.world_size > 1):
            raise RunFailed(too_large(tokens, rows, str(error))) from None
        self.split = self.split.half_of(rows, micro.inputs["input_ids"].numel())
        self.say(
            f"step {self.state.global_step + 1}: out of memory with {rows} sequences; going on with {self.split}. The "
            "step is taken again; effective batch, noise and loss are the same"
        )
        model.zero_grad(set_to_none=True)
        error.__traceback__ = None  # its frames hold the activations
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # ---- Not finite ----

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float:
        """Compute the gradient norm; a step whose loss or gradient is not finite loses its gradient and is skipped.

        Under fp16 a gradient that overflows is left to the scaler as long as the loss is finite: it skips the step by
        itself and lowers its scale.
        """
        # Upstream asks between the backward pass and the optimizer's step: the last chance to drop a gradient.
        norm = self.last_norm = super()._get_grad_norm(model, grad_norm)
        if self._loss_is_finite and (self.args.fp16 or math.isfinite(float(norm))):
            self._bad_in_a_row = 0
            return norm
        self.last_norm = math.nan  # nothing of this step is applied
        self.bad_steps += 1
        self._bad_in_a_row += 1
        what = "gradient" if self._loss_is_finite else "loss"
        self.say(f"step {self.state.global_step + 1}: the {what} is not finite; the step is skipped")
        model.zero_grad(set_to_none=True)  # an optimizer passes over parameters without a gradient
        if self._bad_in_a_row >= self.args.max_bad_steps:
            raise Diverged(self._diverged(what))
        return norm

    def _diverged(self, what: str) -> str:
        rows = self.rows_of_step(self.state.global_step)
        named = ", ".join(map(str, rows[:ROWS_NAMED])) + ", ..." * (len(rows) > ROWS_NAMED)
        return (
            f"the {what} was not finite in {self._bad_in_a_row} steps in a row, the last being step "
            f"{self.state.global_step + 1} (rows {named} of the training data). Look at these rows, lower "
            "train.learning_rate, or set machine.precision=fp32."
        )

    # ---- Its rows ----

    def get_train_dataloader(self) -> DataLoader:
        """Return a dataloader whose batches are whole optimizer steps, as `StepBatch`."""
        # Upstream builds its dataloader from the attribute; evaluation must find the plain collator there again.
        plain = self.data_collator
        self.data_collator = StepCollator(
            plain, self.split.rows, self.split.tokens, self.padding_free, self.args.loss_mean
        )
        try:
            return self._step_loader() or super().get_train_dataloader()
        finally:
            self.data_collator = plain

    def _step_loader(self) -> StepLoader | None:
        """Return steps whose rows do not depend on the number of ranks; None if the dataset cannot be indexed."""
        if isinstance(self.train_dataset, IterableDataset) or not hasattr(self.train_dataset, "__getitem__"):
            return None
        dataset, collator, args = self.train_dataset, self.data_collator, self.args
        if isinstance(dataset, datasets.Dataset):
            # As upstream does for its own dataloader, which this one replaces.
            dataset = cast(Any, self._remove_unused_columns(dataset, description="Training"))
        else:
            collator = self._get_collator_with_removed_columns(collator, description="Training")
        sampler = self._get_train_sampler(dataset)
        assert sampler is not None, "upstream samples every dataset that has a length"
        order = step_order(sampler, dataset, args)
        ranks = args.world_size
        rows = args.effective_batch_size or self._train_batch_size * ranks
        self._steps = StepSampler(
            order, rows, args.process_index, ranks, drop_last=args.dataloader_drop_last, epoch_now=self._epoch
        )
        return step_loader(StepRows(dataset), self._steps, collator, args)

    def _epoch(self) -> int:
        """Return the epoch under way, counted from 0."""
        return self.state.global_step // max(len(self._steps or ()), 1)

    def rows_of_step(self, step: int) -> list[int]:
        """Return a step's rows: the dataset's ``row`` numbers where it has them, else indices; empty if unknown."""
        if self._steps is None:
            return []
        indices = self._steps.rows_of(*divmod(step, max(len(self._steps), 1)))
        has_numbers = "row" in getattr(self.train_dataset, "column_names", ())
        return [self.train_dataset[i]["row"] if has_numbers else i for i in indices]

    # ---- Upstream bookkeeping that reads a batch ----

    def floating_point_ops(self, inputs: StepBatch | dict[str, Any]) -> int:
        """Add up the micro-batches of a step."""
        if isinstance(inputs, StepBatch):
            return sum(super(StepTrainer, self).floating_point_ops(micro.inputs) for micro in inputs)
        return super().floating_point_ops(inputs)

    def _track_num_input_tokens(self, inputs: StepBatch | dict[str, Any]) -> None:
        for batch in (micro.inputs for micro in inputs) if isinstance(inputs, StepBatch) else [inputs]:
            super()._track_num_input_tokens(batch)
