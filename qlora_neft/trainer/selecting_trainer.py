"""A trainer that judges its weights by their held-out loss: it may keep the best, and end before the last step.

Which steps are judged is the caller's rule (`.selection`), not how often a machine evaluates. The best weights are
written to ``checkpoint-best`` as soon as they are known, whole or not at all, and every checkpoint holds them too, as
hard links where the disk has any: a resume has exactly those that its checkpoint knew.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..files import read_json, whole_folder
from ..run_folder.checkpoints import BEST, files_in
from ..run_folder.contents import PROGRESS
from .checkpointed_trainer import (
    CheckpointedTrainer,
    EndedEarly,
    EvaluationGivenUp,
    Progress,
    load_trained_weights,
    save_trained,
)
from .selection import Judgements, Rule, Selected, selected


class SelectingTrainer(CheckpointedTrainer):
    """A trainer whose evaluations may decide which weights it ends with.

    Args:
        kwargs: As in `CheckpointedTrainer`.

    Attributes:
        rule: What decides.
        judgements: What was judged so far.
        initial_loss: Held-out loss of the untrained model, if it is known; otherwise it is evaluated at step 0.

    Raises:
        ValueError: If the rule needs an evaluation set and there is none.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        args = self.args
        self.rule = Rule(args.keep, args.early_stopping_patience, args.selection_steps, args.early_stopping_threshold)
        self.judgements = Judgements()
        self.initial_loss: float | None = None
        self._evaluates_on_start = args.eval_on_start
        if not self.rule.decides:
            return
        if self.eval_dataset is None or isinstance(self.eval_dataset, dict):
            raise ValueError(
                "eval_dataset: keep='best' and early_stopping_patience go by the loss on one evaluation set. Give one, "
                "or leave both at their defaults."
            )
        self.add_callback(_WhenToJudge(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and end with the weights that the rule selects; those of the last step while it is interrupted."""
        found = super().train(*args, **kwargs)
        if self.is_over and self.rule.keeps_best and self.judgements.best_step != self.state.global_step:
            load_trained_weights(self.accelerator.unwrap_model(self.model), self._best)
        return found

    @property
    def is_over(self) -> bool:
        """Whether every step was taken, or patience ran out."""
        if not self.rule.decides:
            return super().is_over
        # The last step is judged before its run is over.
        judged = self.judgements.judged_step == self.state.global_step
        return judged and (self.judgements.stopped or super().is_over)

    @property
    def selected(self) -> Selected | None:
        """What the run ended with; None if nothing was to be decided."""
        return selected(self.rule, self.judgements, self.state.global_step, self.state.max_steps)

    @property
    def _best(self) -> Path:
        return self._output_dir / BEST

    # ---- Judging ----

    def begin_judging(self) -> None:
        """Judge the step that a session begins at, unless it was judged before."""
        step = self.state.global_step
        self.args.eval_on_start = self._evaluates_on_start
        if self.judgements.judged_step == step or not self.rule.is_due(step, self.state.max_steps):
            return
        if step == 0 and self.initial_loss is not None:
            self._judge(step, self.initial_loss)
        else:
            self.args.eval_on_start = True  # upstream then evaluates before the first step

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        at_start, self.args.eval_on_start = self.args.eval_on_start, False
        metrics = super()._evaluate(*args, **kwargs)
        step = self.state.global_step
        if self.judgements.judged_step != step and self.rule.is_due(step, self.state.max_steps):
            self._judge(step, metrics["eval_loss"])
            if at_start and self.judgements.stopped:
                raise EndedEarly  # upstream would take one step more
        return metrics

    def _judge(self, step: int, loss: float) -> None:
        """Judge a step, on all ranks alike; keep its weights if they are the best."""
        if self.args.world_size > 1:
            told = torch.tensor([loss], dtype=torch.float64, device=self.args.device)
            torch.distributed.broadcast(told, src=0)
            loss = told.item()
        is_best = self.judgements.judge(step, loss, self.rule)
        if is_best and self.rule.keeps_best:
            self._keep()
        if self.judgements.stopped:
            self.control.should_training_stop = self.control.should_save = True

    def _keep(self) -> None:
        if self.args.should_save:
            with self.saving("weights"):
                self._output_dir.mkdir(parents=True, exist_ok=True)
                with whole_folder(self._best, synced=True) as folder:
                    save_trained(self.accelerator.unwrap_model(self.model), folder)
                    self._describe(folder)
        self.accelerator.wait_for_everyone()

    # ---- Checkpoints ----

    def _write_into(self, folder: Path) -> None:
        super()._write_into(folder)
        if self.rule.keeps_best and self.judgements.best_step is not None:
            _link_files(self._best, folder / BEST)

    def _progress(self) -> Progress:
        found = super()._progress()
        if self.rule.decides:
            found["judgements"] = self.judgements.to_dict()
        return found

    def _restore_progress(self, checkpoint: Path) -> None:
        super()._restore_progress(checkpoint)
        if not self.rule.decides:
            return
        self.judgements = _judgements_in(checkpoint)
        if self.rule.keeps_best and self.judgements.best_step is not None:
            # Those that lie there may be of a later step, which is going to be taken again.
            if self.args.should_save:
                self._output_dir.mkdir(parents=True, exist_ok=True)
                with whole_folder(self._best, synced=True) as folder:
                    _link_files(checkpoint / BEST, folder)
            self.accelerator.wait_for_everyone()

    def _is_last(self, checkpoint: Path, step: int) -> bool:
        return super()._is_last(checkpoint, step) or (self.rule.decides and _judgements_in(checkpoint).stopped)

    def _take_over(self, checkpoint: Path) -> None:
        super()._take_over(checkpoint)
        # Saved before its evaluation, which was then cut off.
        step = self.state.global_step
        if self.rule.is_due(step, self.state.max_steps) and self.judgements.judged_step != step:
            try:
                self._judge(step, self.evaluate()["eval_loss"])
            except EvaluationGivenUp:
                return  # nothing is lost: the checkpoint is there


class _WhenToJudge(TrainerCallback):
    """Asks the trainer for the evaluations that its rule goes by."""

    def __init__(self, trainer: SelectingTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for the step that a session begins at."""
        self.trainer.begin_judging()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a step that is due. A request to stop, which is heard later, takes that back."""
        if self.trainer.rule.is_due(state.global_step, state.max_steps):
            control.should_evaluate = True


def _judgements_in(checkpoint: Path) -> Judgements:
    """Return what a checkpoint says of judgements; nothing in one that was written without a rule."""
    path = checkpoint / PROGRESS
    content = read_json(path).get("judgements") if path.exists() else None
    return Judgements() if content is None else Judgements.of(content)


def _link_files(source: Path, target: Path) -> None:
    """Give the files of a folder a second name, or copy them where the disk has no hard links."""
    target.mkdir(exist_ok=True)
    for name in files_in(source):
        try:
            os.link(source / name, target / name)
        except OSError:
            shutil.copyfile(source / name, target / name)
