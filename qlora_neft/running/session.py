"""One session of a run: measure, train from where it stands, measure, write down. A run may take several."""

from __future__ import annotations

import hashlib
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from ..data import PreparedData
from ..decoding.answers import Answer
from ..display.console import ProgressLines, say, show_answers, show_result
from ..display.length_plot import plot_lengths
from ..display.loss_plot import plot_losses
from ..display.run_lines import lines_after, title
from ..display.speed_line import SpeedLine
from ..errors import RunFailed, RunInterrupted
from ..files.json_file import finite, write_json
from ..lora import count_parameters, count_trainable
from ..quantization import base_fingerprint, frozen_fingerprints
from ..recipe import Recipe
from ..run_folder.adapter import save_adapter
from ..run_folder.mirror import Mirror
from ..run_folder.record import MetricsFile, peak_memory
from ..run_folder.resume import Beginning, check_identity, write_run_file
from ..run_folder.stop_request import StopRequest, answered
from ..run_folder.when_to_save import WhenToSave
from ..trainer import QLoRANeftTrainer
from ..trainer.memory_probe import cuda_probe
from .measure import Measurement, measure
from .plan import RunPlan
from .processes import is_main_process
from .unpack import report_of

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
    check_identity(beginning.earlier, identity)
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
    show_answers(console, before.answers, after.answers)
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
    earlier = beginning.earlier or {}
    stored = earlier.get("before")
    if stored is None or earlier.get("measured_on") != measured_on:
        return None
    return Measurement(**{**stored, "answers": [Answer(**answer) for answer in stored["answers"]]})


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
