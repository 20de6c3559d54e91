"""A guard against training that learns nothing: one line with the likely cause, or an end where nothing can be learned.

It watches the first steps of a session, from values that are on the host already; the adapters' own weights are read
three times. A resumed session is watched anew. Its sums depend on no rank, so that all ranks end at the same step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import RunFailed, UserInputError
from .callbacks import Speaker
from .when_to_save import agreed

FIRST = 5  # steps after which nothing that moved is no accident
SOME = 10  # and after which a single adapter should have
EXACT_LOSSES = {"clean_loss": "clean loss", "eval_loss": "held-out loss"}  # as logged; without noise
NAMED = 4  # modules that a line names
FROZEN = (
    "model: no weight is trainable, so nothing can be learned. Load an adapter with is_trainable=True, or leave "
    "requires_grad of its weights on."
)


class Guarded(Speaker, Protocol):
    """The part of a trainer that `LearningGuard` reads.

    Attributes:
        last_loss: Of the step just taken, on this rank.
        last_norm: Of its gradient, of all ranks.
    """

    model: Any
    args: Any
    optimizer: Any
    accelerator: Any
    is_fsdp_enabled: bool
    last_loss: float
    last_norm: Tensor | float


class LearningGuard(TrainerCallback):
    """Looks whether the first steps of a session have a gradient, move the weights and change the loss.

    Args:
        trainer: The one that is watched.

    Raises:
        UserInputError: When training begins, if no weight is trainable or every learning rate is 0.
        RunFailed: After `FIRST` steps, if their gradient was exactly 0 or moved no weight.
    """

    def __init__(self, trainer: Guarded) -> None:
        self.trainer = trainer
        self._begin({}, 0.0)

    def _begin(self, weights: dict[str, float], peak: float) -> None:
        self._before, self._peak, self._rate = weights, peak, 0.0
        self._without_gradient = self._steps = 0  # steps that count: finite, and for the second at a rate worth it
        self._has_gradient = False
        self._losses: list[float] = []
        self._full_steps = 0  # at half the peak rate or more, so that something may be expected of them
        self._first: dict[str, tuple[int, float]] = {}  # losses without noise: their first, and the full steps before
        self._watches_weights, self._watches_exact_losses = bool(weights), True

    # ---- When ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at what is trainable and at the schedule, before a step is taken."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if not any(param.requires_grad for param in model.parameters()):
            raise UserInputError(FROZEN)
        peak = peak_rate(kwargs.get("lr_scheduler"), state.max_steps, _rate_of(self.trainer.optimizer))
        if peak == 0:
            self._say_or_end_at_rate_zero(args, state.max_steps)
        # FSDP keeps a part of each weight on each rank.
        self._begin({} if self.trainer.is_fsdp_enabled else squares(model), peak)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take down the learning rate of the step about to be taken."""
        self._rate = _rate_of(self.trainer.optimizer)
        self._full_steps += self._rate >= self._peak / 2 > 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at a step, while anything is still open."""
        # In warm-up, or at the end of a schedule, weights may well stand still.
        is_worth_it = self._watches_weights and self._rate >= self._peak / 2 > 0
        if self._has_gradient and len(self._losses) == SOME and not is_worth_it:
            return  # without a look at the norm, which may be on the device
        norm = float(self.trainer.last_norm)
        # A step that was skipped says nothing: its gradient was dropped, or overflowed in fp16.
        if not math.isfinite(norm) or self.trainer.accelerator.optimizer_step_was_skipped:
            return
        self._look_at_gradient(args, norm)
        self._look_at_loss()
        if is_worth_it:
            self._steps += 1
            if self._steps in (FIRST, SOME):
                self._look_at_weights()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Compare the losses without noise, each of the same rows, with their first measurement of the session."""
        for key, what in EXACT_LOSSES.items():
            loss = (logs or {}).get(key)
            if loss is None or not self._watches_exact_losses:
                continue
            before, first = self._first.setdefault(key, (self._full_steps, loss))
            if loss != first or loss == 0:
                self._watches_exact_losses = False
            elif (count := self._full_steps - before) >= SOME:
                self._watches_exact_losses = False
                self._say(
                    f"the {what} is {loss:g} to the last bit, at least {count} steps after it was first measured: what "
                    f"the model says has not changed. {self._too_small()}"
                )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say of a run with few steps what would have ended a longer one."""
        if self._without_gradient and not self._has_gradient:
            self._say(f"the gradient was exactly 0 in every step of this session. {self._unreached()}")

    # ---- What ----

    def _look_at_gradient(self, args: TrainingArguments, norm: float) -> None:
        if self._has_gradient or norm > 0:
            self._has_gradient = True
            return
        # A loss of 0 leaves nothing to learn, here or on the rank that has the step's labels.
        [is_positive] = agreed(args, int(self.trainer.last_loss > 0))
        self._without_gradient += is_positive
        if self._without_gradient == FIRST:
            raise RunFailed(
                f"nothing is learned: the gradient was exactly 0 in {FIRST} steps, at a loss of "
                f"{self.trainer.last_loss:.4g}. {self._unreached()}"
            )

    def _look_at_loss(self) -> None:
        if len(self._losses) == SOME:
            return
        self._losses.append(self.trainer.last_loss)
        if len(self._losses) == SOME and self._losses[0] != 0 and len(set(self._losses)) == 1:
            self._say(
                f"the loss is {self._losses[0]:g} to the last bit in each of {SOME} steps: all rows are the same and "
                f"nothing is learned from them, or the model pays no attention to its input. {self._too_small()}"
            )

    def _look_at_weights(self) -> None:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        now = squares(model)
        if not any(now[name] != before for name, before in self._before.items()):
            self._watches_weights = False
            what = f"no weight of the adapters has moved in {self._steps} steps"
            # What else is trained may be learning, such as a whole head.
            if any(param.requires_grad for name, param in model.named_parameters() if not _is_of_lora(name)):
                self._say(f"{what}. {self._standstill(model)}")
                return
            raise RunFailed(f"nothing is learned: {what}. {self._standstill(model)}")
        if self._steps < SOME:
            return
        self._watches_weights = False
        still = {name for name, value in now.items() if "_B." in name and value == 0}
        if still:
            frozen = any(name in still and not param.requires_grad for name, param in model.named_parameters())
            why = (
                "their weights are frozen (requires_grad)"
                if frozen
                else "the model has not called these layers, or the loss does not depend on them"
            )
            self._say(f"{len(still)} adapters have learned nothing in {SOME} steps ({_named(still)}): {why}")

    # ---- In words ----

    def _unreached(self) -> str:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        trained = [name for name, param in model.named_parameters() if param.requires_grad]
        fp16 = " Or gradients are too small for fp16: set machine.precision=fp32." if self.trainer.args.fp16 else ""
        return (
            f"The loss does not depend on what is trained ({_named(trained)}): the model does not call these layers, "
            f"or their output has no effect. Look at lora.target_modules.{fp16}"
        )

    def _standstill(self, model: nn.Module) -> str:
        adapters = {name: param for name, param in model.named_parameters() if name in self._before}
        if not any(param.requires_grad for param in adapters.values()):
            return "They are frozen: leave requires_grad of the adapters' weights on."
        held = {id(param) for group in self.trainer.optimizer.param_groups for param in group["params"]}
        if not any(id(param) in held for param in adapters.values()):
            return "The optimizer does not hold them: it was made before they were trainable, or of another model."
        return self._too_small()

    def _too_small(self) -> str:
        return f"train.learning_rate is likely too small, {self._peak:g} at its peak."

    def _say_or_end_at_rate_zero(self, args: TrainingArguments, max_steps: int) -> None:
        what = (
            f"the learning rate is 0 in every step (learning_rate {args.learning_rate:g}, {max_steps} steps, of them "
            f"warm-up {args.get_warmup_steps(max_steps)}): nothing can be learned"
        )
        if max_steps > 1:
            raise UserInputError(f"train.learning_rate: {what}. Raise it.")
        self._say(f"{what}; a warm-up begins at 0, and needs a second step")  # a trial of one step is a fair wish

    def _say(self, line: str) -> None:
        self.trainer.say(f"warning: {line}")


def peak_rate(scheduler: Any, max_steps: int, rate: float) -> float:
    """Return the largest learning rate that a schedule gives to any weight in any step of the run.

    Args:
        scheduler: As the trainer has it; of one that is no function of the step, nothing is known beyond ``rate``.
        max_steps: Of the whole run.
        rate: The largest rate now.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        return rate
    pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    steps = _some_steps(max_steps)
    return max((float(base) * max(factor(step) for step in steps) for base, factor in pairs), default=rate)


def _some_steps(count: int) -> Iterable[int]:
    """Return all steps of a run, or of a long one as many as show its peak to a few percent."""
    return range(0, max(count, 1), max(count // 1000, 1))


def squares(model: nn.Module) -> dict[str, float]:
    """Return the sum of squares of every weight of the active LoRA adapters, with one wait for the device.

    In float64: it differs if as much as the last bit of one weight does, or nearly surely.
    """
    if not isinstance(model, PeftModel) or model.active_peft_config.is_prompt_learning:
        return {}
    active = set(model.active_adapters)
    found = {name: p for name, p in model.named_parameters() if _is_of_lora(name) and active & {*name.split(".")}}
    if not found:
        return {}
    device = next(iter(found.values())).device
    with torch.no_grad():
        sums = torch.stack([param.double().square().sum().to(device) for param in found.values()])
    return dict(zip(found, sums.tolist(), strict=True))


def _is_of_lora(name: str) -> bool:
    return ".lora_" in name


def _rate_of(optimizer: Any) -> float:
    return max((float(group["lr"]) for group in optimizer.param_groups if group["params"]), default=0.0)


def _named(names: Iterable[str]) -> str:
    """Name the modules that weights belong to."""
    modules = list(dict.fromkeys(name.removeprefix("base_model.model.").split(".lora_")[0] for name in sorted(names)))
    return ", ".join(modules[:NAMED]) + (f" and {len(modules) - NAMED} more" if len(modules) > NAMED else "")
