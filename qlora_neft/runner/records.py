"""The records of a run: what its folder says before, while and after it trains, and their copies in a mirror."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from peft import PeftModel

from ..adapter.continued import adapter_sha256
from ..base.lora import count_parameters, count_trainable
from ..data.prepare import PreparedData
from ..display.console import title
from ..display.plots import plot_lengths, plot_losses
from ..files import finite, sealed, sha256_of_text, write_json, write_text
from ..generation.answers import Answer
from ..run_folder.live import LIVE_FILE
from ..run_folder.metrics import MetricsFile, hardware, peak_memory, versions
from ..run_folder.mirror import Mirror
from ..run_folder.record import ANSWERS_FILE, RECIPE_FILE, RUN_FILE, SUMMARY_FILE, TRACKERS_FILE
from ..run_folder.resume import Beginning, write_run_file
from ..trainer import QLoRANeftTrainer
from .build import Run, report_of
from .measure import Measurement
from .plan import RunPlan, is_main_process

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUMMARY_VERSION = 1
METRICS_FILE, DATA_REPORT_FILE = "metrics.jsonl", "data_report.json"
# Mirrored with every checkpoint.
WRITTEN_EARLY = (RUN_FILE, RECIPE_FILE, DATA_REPORT_FILE, METRICS_FILE, LIVE_FILE, TRACKERS_FILE)
MIRROR_SECONDS = 600  # to wait at the end for what is still to be copied


# ---- Before training ----


def facts_of_run(run: Run) -> dict[str, Any]:
    """Return what is known before any weights are loaded; all of a dry run's summary."""
    return {
        "summary_version": SUMMARY_VERSION,
        "status": "dry run",
        "recipe": run.recipe.to_dict(),
        "seed": run.recipe.train.seed,
        "precision": precision_line(run),
        "plan": dataclasses.asdict(run.plan),
        "data": {name: run.data.report[name] for name in ("train", "eval", "sources", "warnings")},
        "versions": versions(),
        "hardware": hardware(run.policy.device).model_dump(),
        # transformers sets it for a base from the Hub, however the revision was named; a local folder has none.
        "base_commit": getattr(run.config, "_commit_hash", None),
        "identity": run.identity.model_dump(),
    }


def precision_line(run: Run) -> str:
    """Return how the run computes, in words."""
    line = str(run.policy)
    return line.replace("float32 LoRA", "float32 weights") if run.recipe.trains_all else line


def data_sha256(data: PreparedData) -> str:
    """Return the SHA-256 of what the training rows say and of the user's chat template, as hex."""
    text = data.report["train"]["sha256"] + (data.chat_template or "")
    return sha256_of_text(text)


def measured_on(run: Run) -> dict[str, Any]:
    """Return what a measurement depends on besides the model: the held-out rows, and how many are answered."""
    held_out = run.data.report["eval"]
    return {"rows": held_out and held_out["sha256"], "answers": run.recipe.machine.eval_answers}


def measured_before(run: Run, beginning: Beginning) -> Measurement | None:
    """Return what the run's first session measured, None if there was none or it measured on something else."""
    earlier = beginning.earlier
    if earlier is None or earlier.before is None or earlier.measured_on != measured_on(run):
        return None
    stored = earlier.before
    if stored.clean_train_loss is None:  # it was NaN
        return None
    answers = [Answer(answer.prompt, answer.reference, answer.text) for answer in stored.answers or []]
    return Measurement(stored.clean_train_loss, stored.held_out_loss, answers)


def about_run(run: Run, base_sha256: str, before: Measurement) -> dict[str, Any]:
    """Return what a run is: the content of ``run.json``, which the manifest of every checkpoint repeats."""
    about = {
        "recipe": run.recipe.to_dict(),
        "data_sha256": data_sha256(run.data),
        "base_sha256": base_sha256,
        **_began_from(run),
        "before": finite(dataclasses.asdict(before)),
        "measured_on": measured_on(run),
        "identity": run.identity.model_dump(),
    }
    return sealed(about)


def _began_from(run: Run) -> dict[str, str]:
    """Return the hash of the adapter that a run goes on from; nothing if it begins anew."""
    sha256 = adapter_sha256(run.recipe)
    return {} if sha256 is None else {"adapter_sha256": sha256}


def open_records(run: Run, beginning: Beginning, about: dict[str, Any], before: Measurement) -> MetricsFile:
    """Write what is known before training, and return the metrics file for what is logged."""
    output_dir, recipe = run.output_dir, run.recipe
    metrics = MetricsFile(output_dir / METRICS_FILE)
    if not is_main_process():
        return metrics
    step = beginning.checkpoint.step if beginning.checkpoint else None
    metrics.keep_up_to(step)  # what an interrupted run logged beyond its checkpoint will be logged again
    # First: a folder with run.json is a run that can be continued, one with recipe.yaml alone is refused.
    write_run_file(output_dir, about)
    write_text(output_dir / RECIPE_FILE, recipe.to_yaml(), synced=True)
    report = report_of(recipe, run.data, run.plan)
    write_json(output_dir / DATA_REPORT_FILE, report)
    plot_lengths(report, output_dir / "lengths.png", title(recipe))
    if step is None:  # a resumed run has this line already
        metrics.write(0, before.log())
    return metrics


# ---- While training ----


@contextmanager
def mirroring(run: Run, trainer: QLoRANeftTrainer) -> Generator[Mirror | None, None, None]:
    """Keep a second folder in step with the run's inside the block; also if the block is cut off."""
    mirror_dir = run.recipe.machine.mirror_dir
    if mirror_dir is None or not is_main_process():
        yield None
        return
    mirror = Mirror(run.output_dir, Path(mirror_dir).expanduser(), trainer.say)

    def copy(checkpoint: Path) -> None:
        mirror.files(WRITTEN_EARLY)
        mirror.checkpoint(checkpoint)

    trainer.on_checkpoint = copy
    seconds = MIRROR_SECONDS
    try:
        yield mirror
    except KeyboardInterrupt:
        seconds = 0  # a second signal: stop at once
        raise
    finally:  # also after a failure, which is when a second copy is needed
        if not mirror.close(seconds):
            trainer.say(f"mirror {mirror_dir}: not everything could be copied; the run's own folder is whole")


# ---- After training ----


def log_result(
    run: Run,
    metrics: MetricsFile,
    trainer: QLoRANeftTrainer,
    after: Measurement,
    tell: Callable[[int, dict[str, float]], None] = lambda step, logs: None,
) -> bool:
    """Log the last measurement, ``tell`` it to who else listens, and draw the curves; return whether they are drawn."""
    if not is_main_process():
        return True
    step, found = trainer.state.global_step, after.log()
    if (selected := trainer.selected) is not None:
        # Of weights that may be an earlier step's: under names of their own, or the curves would jump at their end.
        names = {"clean_loss": "kept_clean_loss", "eval_loss": "kept_eval_loss"}
        of_last = selected.step == step
        found = {key if of_last else names[key]: loss for key, loss in found.items()} | {"kept_step": selected.step}
    metrics.write(step, found)
    tell(step, found)
    metrics.keep_up_to(step)  # a result that is made again has the same last line a second time
    return plot_losses(metrics.read(), run.output_dir / "loss.png", title(run.recipe))


def summary_of(
    run: Run,
    trainer: QLoRANeftTrainer,
    beginning: Beginning,
    before: Measurement,
    after: Measurement,
    *,
    base_sha256: str,
    decisions: Sequence[str],
    files: Mapping[str, str],
) -> dict[str, Any]:
    """Return the content of ``summary.json``: what the run was and what came of it.

    Args:
        run: The run.
        trainer: Its trainer, done.
        beginning: Where its last session began.
        before, after: What was measured before and after training.
        base_sha256: Hash of the base's bytes, the same before and after; as loaded if every weight is trained.
        decisions: What was decided on the way, one line each.
        files: SHA-256 of the files of the result, by name.
    """
    peak = peak_memory(trainer.args.device)  # so late that the last measurement is in it
    num_trained = count_trainable(trainer.model)
    in_full = run.recipe.trains_all
    summary = {
        **facts_of_run(run),
        "status": "done",
        "steps": trainer.state.global_step,
        "tokens_seen": trainer.tokens_seen,
        "trained_tokens_seen": trainer.trained_tokens_seen,
        "bad_steps": trainer.bad_steps,
        "fast_path": trainer.fast_path_record(),
        "decisions": list(decisions),
        **({} if trainer.selected is None else {"selection": finite(dataclasses.asdict(trainer.selected))}),
        "resumed_from_step": beginning.checkpoint.step if beginning.checkpoint else None,
        "parameters": num_trained if in_full else _base_parameters(trainer),
        "lora_parameters": 0 if in_full else num_trained,
        "census": trainer.census.as_dict(),
        "base_sha256": base_sha256,
        **_began_from(run),
        "base_unchanged": None if in_full else True,  # otherwise the run has failed before
        "loss_check": finite(dataclasses.asdict(trainer.loss_check)),
        "before": finite(before.summary()),
        "after": finite(after.summary()),
        "train_seconds": round(trainer.train_seconds, 2),
        "wall_seconds": round(time.monotonic() - run.started, 2),
        "peak_memory": peak,
        "memory": _memory(run.plan, peak),
        "files": dict(files),
    }
    return sealed(summary)


def selection_lines(trainer: QLoRANeftTrainer) -> list[str]:
    """Say why a run ended and whose weights its result has; nothing where the last step's were not in question."""
    found = trainer.selected
    return [] if found is None else found.lines(trainer.state.global_step, trainer.rule.threshold)


def _base_parameters(trainer: QLoRANeftTrainer) -> int:
    assert isinstance(trainer.model, PeftModel)
    with_adapter = cast("PreTrainedModel", trainer.model.get_base_model())  # the base, its layers wrapped by PEFT
    return count_parameters(with_adapter) - count_trainable(trainer.model)


def _memory(plan: RunPlan, peak: dict[str, int]) -> dict[str, Any]:
    """Put estimate and measurement side by side; on a CPU the measurement includes Python and its libraries."""
    estimate = plan.memory_estimate
    return {
        "estimated_peak_bytes": estimate.peak_bytes if estimate else None,
        # Reserved, not allocated: what the allocator holds is what a card must have.
        "measured_peak_bytes": peak.get("cuda_reserved_bytes", peak["host_bytes"]),
        "terms": estimate.terms if estimate else None,
    }


def write_result(run: Run, after: Measurement, summary: dict[str, Any]) -> None:
    """Write answers and summary; a folder with a summary is a finished run."""
    if is_main_process():
        answers = {"answers": [dataclasses.asdict(answer) for answer in after.answers]}
        write_json(run.output_dir / ANSWERS_FILE, answers, synced=True)
        # Last: its presence says that all the others are there.
        write_json(run.output_dir / SUMMARY_FILE, summary, synced=True)
