"""The story of a run, top to bottom: a recipe in, an adapter and its record out.

Every part below takes flat arguments and serves from a notebook alone; `unpack` hands them a recipe's values.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from ..base.config import check_base_config, check_context, check_vocabulary, load_tokenizer
from ..base.lora import count_parameters, count_trainable
from ..base.nf4 import base_fingerprint, frozen_fingerprints
from ..base.precision import PrecisionPolicy
from ..data.prepare import PreparedData
from ..display.console import (
    ProgressLines,
    RowsProgress,
    SpeedLine,
    data_lines,
    lines_after,
    make_console,
    noise_line,
    quiet_libraries,
    say,
    show_answers,
    show_result,
    title,
)
from ..display.plots import plot_lengths, plot_losses
from ..errors import RunFailed, RunInterrupted
from ..files import failing_with_the_disk, finite, write_json
from ..generation.answers import Answer
from ..recipe import Recipe
from ..run_folder.checkpoints import remove_leftovers, save_adapter
from ..run_folder.metrics import MetricsFile, hardware, peak_memory, versions
from ..run_folder.mirror import Mirror
from ..run_folder.resume import (
    Beginning,
    check_identity,
    claimed,
    disk_message,
    find_beginning,
    read_summary,
    restore_from_mirror,
    write_run_file,
)
from ..run_folder.stop import StopRequest, WhenToSave, answered
from ..trainer import QLoRANeftTrainer
from ..trainer.memory import cuda_probe
from .build import data_of, model_path, plan_of, policy_of, report_of, trainer_of
from .measure import ANSWERS_SHOWN, Measurement, measure
from .plan import RunPlan, is_main_process
from .push import CheckpointPusher, pushing, ready_to_push

MIRROR_SECONDS = 600  # at the end, for what is still to be copied
RECORDS = ("run.json", "recipe.yaml", "data_report.json", "metrics.jsonl")


def train_and_measure(
    recipe: Recipe,
    trainer: QLoRANeftTrainer,
    tokenizer: Any,
    data: PreparedData,
    plan: RunPlan,
    facts: dict[str, Any],
    beginning: Beginning,
    output_dir: Path,
    console: Console,
    started: float,
) -> dict[str, Any]:
    """Carry a run to its end, or to the checkpoint at which it is asked to stop.

    Returns:
        ``facts`` and what came of it: the content of ``summary.json``.

    Raises:
        UserInputError: If data or base are not those the run began with.
        RunFailed: If training fails.
        RunInterrupted: If a signal asked to stop.
    """
    frozen = frozen_fingerprints(trainer.model)
    identity = {"data_sha256": _data_sha256(data), "base_sha256": base_fingerprint(frozen)}
    check_identity(beginning.earlier, **identity)
    answers, stops = recipe.machine.eval_answers, data.stop_token_ids
    measured_on = {"rows": data.report["eval"] and data.report["eval"]["sha256"], "answers": answers}
    before = _measured_before(beginning, measured_on) or measure(trainer, tokenizer, data.eval, answers, stops)
    about = {"recipe": recipe.to_dict(), **identity, "before": _plain(before), "measured_on": measured_on}
    metrics = _open_records(recipe, data, plan, beginning, about, before, output_dir)
    decisions: list[str] = []
    trainer.say = _saying(console, decisions)
    trainer.checkpoint_about = about
    with _mirrored(recipe, output_dir, trainer) as mirror:
        _train(recipe, trainer, plan, console, metrics, beginning, output_dir)
        if frozen_fingerprints(trainer.model) != frozen:
            raise RunFailed("the frozen base changed during training; nothing was saved. Please report this.")
        tokenizer.chat_template = data.chat_template or tokenizer.chat_template
        if is_main_process():
            save_adapter(trainer.model, tokenizer, output_dir)  # first of all: what comes after may fail
        after = measure(trainer, tokenizer, data.eval, answers, stops)
        drawn = _close_records(recipe, metrics, trainer.state.global_step, after, output_dir)
        peak = peak_memory(trainer.args.device)
        summary = {
            **facts,
            "status": "done",
            "steps": trainer.state.global_step,
            "tokens_seen": trainer.tokens_seen,
            "trained_tokens_seen": trainer.trained_tokens_seen,
            "bad_steps": trainer.bad_steps,
            "decisions": decisions,
            "resumed_from_step": beginning.checkpoint.step if beginning.checkpoint else None,
            "parameters": count_parameters(trainer.model.get_base_model()) - count_trainable(trainer.model),
            "lora_parameters": count_trainable(trainer.model),
            "base_sha256": identity["base_sha256"],
            "base_unchanged": True,
            "before": finite(before.summary()),
            "after": finite(after.summary()),
            "train_seconds": round(trainer.train_seconds, 2),
            "wall_seconds": round(time.monotonic() - started, 2),
            "peak_memory": peak,
            "memory": _memory(plan, peak),
        }
        if is_main_process():
            write_json(output_dir / "answers.json", {"answers": [asdict(answer) for answer in after.answers]})
            write_json(output_dir / "summary.json", summary)
        if mirror is not None:
            mirror.files([path.name for path in output_dir.iterdir() if path.is_file()])
    show_result(console, before.summary(), after.summary())
    pairs = list(zip(before.answers, after.answers, strict=True))[:ANSWERS_SHOWN]
    show_answers(console, [(old.prompt, old.text, new.text, new.reference) for old, new in pairs])
    say(
        console,
        lines_after(output_dir, recipe.model.name_or_path, summary["steps"], trainer.train_seconds, drawn=drawn),
    )
    return summary


def _train(
    recipe: Recipe,
    trainer: QLoRANeftTrainer,
    plan: RunPlan,
    console: Console,
    metrics: MetricsFile,
    beginning: Beginning,
    output_dir: Path,
) -> None:
    machine, progress = recipe.machine, ProgressLines(console)
    stop = StopRequest(machine.grace_seconds, lambda name: say(console, [_stopping(name)]))
    minutes = None if machine.save_every_minutes == 0 else machine.save_every_minutes
    speed = SpeedLine(lambda: trainer.tokens_seen, lambda line: say(console, [line]))
    probe = cuda_probe(trainer, plan.memory_estimate and plan.memory_estimate["peak_bytes"])
    for callback in (WhenToSave(minutes, stop), metrics, progress, speed, *([probe] if probe else [])):
        trainer.add_callback(callback)
    trainer.stop = stop
    checkpoint = beginning.checkpoint
    if checkpoint:
        say(console, [f"going on from step {checkpoint.step}: {checkpoint.path}"])
    say(console, beginning.notes)
    try:
        with answered(stop):
            trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    finally:
        progress.close()
    if stop.signal is not None and trainer.state.global_step < trainer.state.max_steps:
        raise RunInterrupted(stop.signal, _how_to_go_on(trainer, output_dir))


def _open_records(
    recipe: Recipe,
    data: PreparedData,
    plan: RunPlan,
    beginning: Beginning,
    about: dict[str, Any],
    before: Measurement,
    output_dir: Path,
) -> MetricsFile:
    metrics = MetricsFile(output_dir / "metrics.jsonl")
    if not is_main_process():
        return metrics
    step = beginning.checkpoint.step if beginning.checkpoint else None
    metrics.keep_up_to(step)  # what a run that was cut off logged beyond its checkpoint is logged again
    write_run_file(output_dir, about)
    (output_dir / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    report = report_of(recipe, data, plan)
    write_json(output_dir / "data_report.json", report)
    plot_lengths(report, output_dir / "lengths.png", title(recipe.to_dict()))
    if step is None:
        metrics.write(0, before.log())
    return metrics


def _close_records(recipe: Recipe, metrics: MetricsFile, step: int, after: Measurement, output_dir: Path) -> bool:
    """Log the last measurement and draw the curves; whether they could be drawn."""
    if not is_main_process():
        return True
    metrics.write(step, after.log())
    return plot_losses(metrics.read(), output_dir / "loss.png", title(recipe.to_dict()))


@contextmanager
def _mirrored(recipe: Recipe, output_dir: Path, trainer: QLoRANeftTrainer) -> Iterator[Mirror | None]:
    """A second folder kept in step with the run's, also when it is cut off."""
    if recipe.machine.mirror_dir is None or not is_main_process():
        yield None
        return
    mirror = Mirror(output_dir, Path(recipe.machine.mirror_dir).expanduser(), trainer.say)

    def copy(checkpoint: Path) -> None:
        mirror.files(RECORDS)
        mirror.checkpoint(checkpoint)

    trainer.on_checkpoint = copy
    seconds = MIRROR_SECONDS
    try:
        yield mirror
    except KeyboardInterrupt:
        seconds = 0  # a second signal: at once
        raise
    finally:
        if not mirror.close(seconds):
            trainer.say(
                f"mirror {recipe.machine.mirror_dir}: not everything could be copied; the run's own folder is whole"
            )


def _memory(plan: RunPlan, peak: dict[str, int]) -> dict[str, Any]:
    """Estimate and measurement side by side; on a CPU the measurement holds Python and its libraries as well."""
    estimate = plan.memory_estimate or {"peak_bytes": None, "terms": None}
    measured = peak.get("cuda_reserved_bytes", peak["host_bytes"])
    return {"estimated_peak_bytes": estimate["peak_bytes"], "measured_peak_bytes": measured, "terms": estimate["terms"]}


def _measured_before(beginning: Beginning, measured_on: dict[str, Any]) -> Measurement | None:
    """What the run's first session measured, if it was on what is measured now."""
    earlier = beginning.earlier
    if earlier is None or earlier.before is None or earlier.measured_on != measured_on:
        return None
    stored = earlier.before
    if stored.clean_train_loss is None:  # it was NaN
        return None
    answers = [Answer(answer.prompt, answer.reference, answer.text) for answer in stored.answers or []]
    return Measurement(stored.clean_train_loss, stored.held_out_loss, answers)


def _plain(measurement: Measurement) -> dict[str, Any]:
    return finite(asdict(measurement))


def _data_sha256(data: PreparedData) -> str:
    text = data.report["train"]["sha256"] + (data.chat_template or "")
    return hashlib.sha256(text.encode()).hexdigest()


def _saying(console: Console, decisions: list[str]) -> Any:
    def tell(line: str) -> None:
        decisions.append(line)
        say(console, [line])

    return tell


def _stopping(name: str) -> str:
    return f"{name}: finishing this step and writing a checkpoint; once more stops at once"


def _how_to_go_on(trainer: QLoRANeftTrainer, output_dir: Path) -> str:
    state = trainer.state
    command = shlex.join(["qlora-neft", "train", str(output_dir / "recipe.yaml"), "--output-dir", str(output_dir)])
    return (
        f"stopped after step {state.global_step} of {state.max_steps}; the checkpoint is written. To go on:\n"
        f"  {command}"
    )


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
