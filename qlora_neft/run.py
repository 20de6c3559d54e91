"""The story of a run, top to bottom: a recipe in, an adapter and its record out.

Every part below takes flat arguments and serves from a notebook alone; `unpack` hands them a recipe's values.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from .adapter import save_adapter
from .console import ProgressLines, make_console, say, show_answers, show_result
from .data import PreparedData
from .errors import RunFailed
from .json_file import finite, write_json
from .length_plot import plot_lengths
from .lora import count_parameters, count_trainable
from .loss_plot import plot_losses
from .measure import measure
from .output_dir import check_output_dir
from .plan import RunPlan
from .precision import PrecisionPolicy
from .quantization import (
    base_fingerprint,
    check_base_config,
    check_context,
    check_vocabulary,
    frozen_fingerprints,
)
from .quiet import quiet_libraries
from .recipe import Recipe
from .rows_progress import RowsProgress
from .run_lines import data_lines, lines_after, noise_line
from .run_record import MetricsFile, hardware, peak_memory, versions
from .tokenizer import load_tokenizer
from .trainer import QLoRANeftTrainer
from .unpack import data_of, model_path, plan_of, policy_of, report_of
from .unpack_trainer import trainer_of

SUMMARY_VERSION = 1


def run(
    recipe: Recipe,
    output_dir: str | Path,
    *,
    dry_run: bool = False,
    quiet: bool = False,
    trainer_class: type[QLoRANeftTrainer] = QLoRANeftTrainer,
) -> dict[str, Any]:
    """Train what a recipe states, and write down what came of it.

    Writes into ``output_dir``: the adapter, the tokenizer, ``recipe.yaml``, ``data_report.json``, ``metrics.jsonl``,
    ``summary.json``, ``lengths.png`` and ``loss.png``.

    Args:
        recipe: What is learned, from `load_recipe`.
        output_dir: A new or empty folder.
        dry_run: Stop before the weights are loaded: model configuration, data and plan are checked and shown.
        quiet: Print human lines on stderr.
        trainer_class: A subclass to train with, for experiments.

    Returns:
        The content of ``summary.json``.

    Raises:
        UserInputError: If the recipe's model, data or this machine cannot carry out what it states.
        RunFailed: If the base changed during training, which would be a bug worth reporting.
    """
    started, output_dir, console = time.monotonic(), Path(output_dir), make_console(quiet=quiet)
    with quiet_libraries():
        check_output_dir(output_dir)
        policy = policy_of(recipe)
        config = check_base_config(model_path(recipe), revision=recipe.model.revision)
        check_context(config, recipe.data.max_length)
        tokenizer = load_tokenizer(model_path(recipe), revision=recipe.model.revision)
        data = data_of(recipe, tokenizer, progress=RowsProgress(console))
        check_vocabulary(config, data.largest_token_id)
        plan = plan_of(recipe, policy, data)
        say(console, _lines_before(recipe, policy, data, plan))
        if dry_run:
            return _dry_run_summary(recipe, policy, data, plan)

        trainer = trainer_of(trainer_class, recipe, policy, plan, tokenizer, data, output_dir)
        frozen = frozen_fingerprints(trainer.model)
        before = measure(trainer, tokenizer, data.eval, recipe.machine.eval_answers, data.stop_token_ids)

        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        _write_data_report(recipe, data, plan, output_dir)
        metrics = MetricsFile(output_dir / "metrics.jsonl")
        metrics.write(0, before.log())
        train_seconds = _train(trainer, console, metrics)

        if frozen_fingerprints(trainer.model) != frozen:
            raise RunFailed("the frozen base changed during training; nothing was saved. Please report this.")
        tokenizer.chat_template = data.chat_template or tokenizer.chat_template
        save_adapter(trainer.model, tokenizer, output_dir)  # first of all: what comes after may fail

        after = measure(trainer, tokenizer, data.eval, recipe.machine.eval_answers, data.stop_token_ids)
        metrics.write(trainer.state.global_step, after.log())
        drawn = plot_losses(metrics.read(), output_dir / "loss.png", _title(recipe))
        summary = {
            **_dry_run_summary(recipe, policy, data, plan),
            "status": "done",
            "steps": trainer.state.global_step,
            "tokens_seen": trainer.tokens_seen,
            "trained_tokens_seen": trainer.trained_tokens_seen,
            "parameters": count_parameters(trainer.model.get_base_model()) - count_trainable(trainer.model),
            "lora_parameters": count_trainable(trainer.model),
            "base_sha256": base_fingerprint(frozen),
            "base_unchanged": True,
            "before": finite(before.summary()),
            "after": finite(after.summary()),
            "train_seconds": round(train_seconds, 2),
            "wall_seconds": round(time.monotonic() - started, 2),
            "peak_memory": peak_memory(policy.device),
        }
        write_json(output_dir / "summary.json", summary)
        show_result(console, before.summary(), after.summary())
        show_answers(console, before.answers, after.answers)
        say(console, lines_after(output_dir, summary["steps"], train_seconds, drawn=drawn))
        return summary


def _train(trainer: QLoRANeftTrainer, console: Console, metrics: MetricsFile) -> float:
    progress, start = ProgressLines(console), time.monotonic()
    trainer.add_callback(metrics)
    trainer.add_callback(progress)
    try:
        trainer.train()
    finally:
        progress.close()
    return time.monotonic() - start


def _write_data_report(recipe: Recipe, data: PreparedData, plan: RunPlan, output_dir: Path) -> None:
    report = report_of(recipe, data, plan)
    write_json(output_dir / "data_report.json", report)
    plot_lengths(report, output_dir / "lengths.png", _title(recipe))


def _dry_run_summary(recipe: Recipe, policy: PrecisionPolicy, data: PreparedData, plan: RunPlan) -> dict[str, Any]:
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


def _title(recipe: Recipe) -> str:
    alpha = recipe.neftune.noise_alpha if recipe.neftune else 0
    return f"{recipe.model.name_or_path} on {recipe.data.path}, alpha {alpha:g}"
