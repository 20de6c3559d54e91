"""The story of a run, top to bottom: a recipe in, an adapter and its record out.

Every part below takes flat arguments and serves from a notebook alone; `unpack` hands them a recipe's values.
"""

from __future__ import annotations

import dataclasses
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from .base_config import check_base_config, check_context, check_vocabulary
from .data import PreparedData
from .display.console import make_console, say
from .display.quiet import quiet_libraries
from .display.rows_progress import RowsProgress
from .display.run_lines import data_lines, noise_line
from .files.disk_errors import failing_with_the_disk
from .precision import PrecisionPolicy
from .recipe import Recipe
from .run_folder.checkpoint_files import remove_leftovers
from .run_folder.output_folder import claimed, disk_message, read_summary, restore_from_mirror
from .run_folder.record import hardware, versions
from .run_folder.resume import find_beginning
from .running.plan import RunPlan
from .running.processes import is_main_process
from .running.push_while_training import CheckpointPusher, pushing, ready_to_push
from .running.session import train_and_measure
from .running.unpack import data_of, model_path, plan_of, policy_of
from .running.unpack_trainer import trainer_of
from .tokenizer import load_tokenizer
from .trainer import QLoRANeftTrainer

SUMMARY_VERSION = 1


def run(
    recipe: Recipe,
    output_dir: str | Path,
    *,
    resume: str = "auto",
    dry_run: bool = False,
    quiet: bool = False,
    trainer_class: type[QLoRANeftTrainer] = QLoRANeftTrainer,
) -> dict[str, Any]:
    """Train what a recipe states, and write down what came of it; go on where an earlier call was cut off.

    Writes into ``output_dir``: the adapter, the tokenizer, ``recipe.yaml``, ``run.json``, ``data_report.json``,
    ``metrics.jsonl``, ``summary.json``, ``lengths.png``, ``loss.png`` and checkpoints.

    Args:
        recipe: What is learned, from `load_recipe`.
        output_dir: A new or empty folder, or that of this recipe's run.
        resume: ``"auto"`` goes on with a run that the folder holds, ``"never"`` refuses to, a folder names the run or
            the checkpoint to go on from.
        dry_run: Stop before the weights are loaded: model configuration, data and plan are checked and shown.
        quiet: Print human lines on stderr.
        trainer_class: A subclass to train with, for experiments.

    Returns:
        The content of ``summary.json``.

    Raises:
        UserInputError: If the recipe's model, data or this machine cannot carry out what it states.
        RunFailed: If training fails; the newest checkpoint is sound, and the same call goes on from it.
        RunInterrupted: If a signal asked to stop; the same.
    """
    started, output_dir = time.monotonic(), Path(output_dir)
    main, console = is_main_process(), make_console(quiet=quiet, silent=not is_main_process())
    with quiet_libraries():
        if main and not dry_run:
            restore_from_mirror(
                recipe.machine.mirror_dir, output_dir, recipe.to_dict(), lambda line: say(console, [line])
            )
        beginning = find_beginning(output_dir, recipe.to_dict(), resume)
        if beginning.finished:
            return _finished(output_dir, console)
        # Before rows are prepared and weights loaded: a wrong token costs nothing.
        pusher = pusher_of(recipe, output_dir, console) if main and not dry_run else None
        policy = policy_of(recipe)
        config = check_base_config(model_path(recipe), revision=recipe.model.revision)
        check_context(config, recipe.data.max_length)
        tokenizer = load_tokenizer(model_path(recipe), revision=recipe.model.revision)
        data = data_of(recipe, tokenizer, progress=RowsProgress(console))
        check_vocabulary(config, data.largest_token_id)
        plan = plan_of(recipe, policy, data, config)
        say(console, _lines_before(recipe, policy, data, plan))
        facts = _facts(recipe, policy, data, plan) | {"base_commit": getattr(config, "_commit_hash", None)}
        if dry_run:
            return facts
        with failing_with_the_disk(disk_message(output_dir)), claimed(output_dir) if main else nullcontext():
            if main:
                remove_leftovers(output_dir)
            beginning = find_beginning(output_dir, recipe.to_dict(), resume)  # again: now it is ours alone
            if beginning.finished:  # by another process, meanwhile
                return _finished(output_dir, console)
            trainer = trainer_of(trainer_class, recipe, policy, plan, tokenizer, data, output_dir)
            with pushing(pusher, trainer):
                return train_and_measure(
                    recipe, trainer, tokenizer, data, plan, facts, beginning, output_dir, console, started
                )


def pusher_of(recipe: Recipe, output_dir: Path, console: Console) -> CheckpointPusher | None:
    """What pushes checkpoints to the Hub, ready to; None where none is asked for."""
    machine = recipe.machine
    if machine.push_to is None:
        return None
    return ready_to_push(
        machine.push_to, machine.push_every, recipe.to_dict(), output_dir, lambda line: say(console, [line])
    )


def _finished(output_dir: Path, console: Console) -> dict[str, Any]:
    say(console, [f"{output_dir}: this run is finished; nothing is left to do"])
    return read_summary(output_dir)


def _facts(recipe: Recipe, policy: PrecisionPolicy, data: PreparedData, plan: RunPlan) -> dict[str, Any]:
    """What is known before a weight is loaded; all of a dry run's summary."""
    return {
        "summary_version": SUMMARY_VERSION,
        "status": "dry run",
        "recipe": recipe.to_dict(),
        "seed": recipe.train.seed,
        "precision": str(policy),
        "plan": dataclasses.asdict(plan),
        "data": {name: data.report[name] for name in ("train", "eval", "sources", "warnings")},
        "versions": versions(),
        "hardware": hardware(policy.device),
    }


def _lines_before(recipe: Recipe, policy: PrecisionPolicy, data: PreparedData, plan: RunPlan) -> list[str]:
    noise = None if recipe.neftune is None else recipe.neftune.model_dump()
    return [
        f"model: {recipe.model.name_or_path}, NF4 base, LoRA r {recipe.lora.r}",
        str(policy),
        noise_line(noise),
        *data_lines(data.report),
        *plan.notes,
        f"{plan.num_steps} optimizer steps of {recipe.train.effective_batch_size} sequences",
    ]
