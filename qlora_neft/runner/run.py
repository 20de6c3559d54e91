"""The story of a run, top to bottom: a recipe in, an adapter (or a whole model) and its records out.

Every part it calls takes its own section of the recipe, and serves from a notebook alone.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from ..adapter.continued import adapter_sha256, resolved
from ..adapter.folder import find_adapter
from ..base.config import check_base_config, check_context, check_vocabulary, load_tokenizer
from ..base.nf4 import base_fingerprint, frozen_fingerprints
from ..disks import failing_with_the_disk
from ..display.console import (
    RowsProgress,
    data_lines,
    lines_after,
    lines_after_in_full,
    make_console,
    noise_line,
    quiet_libraries,
    say,
    show_answers,
    show_result,
)
from ..display.progress import ProgressLines, SpeedLine
from ..errors import RunFailed, RunInterrupted
from ..export.abilities import facts_of as facts_of_adapter
from ..files import SEAL, sealed, sha256_of_file, whole_files
from ..output import outliving_its_reader
from ..recipe import Recipe
from ..run_folder.checkpoints import forget_best, remove_leftovers, save_adapter
from ..run_folder.finished import read_run_file, read_summary, set_aside
from ..run_folder.identity import check_base, check_tokens, check_weights
from ..run_folder.live import FINISHED, MEASURING, LiveFile
from ..run_folder.live_record import LiveRecord, told_how_it_ends
from ..run_folder.metrics import MetricsFile
from ..run_folder.notes import RunNotes
from ..run_folder.resume import (
    Beginning,
    claimed,
    disk_message,
    find_beginning,
    restore_from_mirror,
    stopped_early,
    write_run_file,
)
from ..run_folder.stop import StopNow, StopRequest, answered
from ..trainer import QLoRANeftTrainer
from ..trainer.checkpointed_trainer import EvaluationGivenUp
from ..trainer.memory import cuda_probe
from ..trainer.router_loss import check_router_loss
from ..trainer.when_to_save import WhenToSave
from .build import Run, command_to_continue, data_of, model_path, policy_of
from .build_trainer import trainer_of
from .identity import base_identity, moment_of, run_identity, with_first_ranks_date
from .measure import ANSWERS_SHOWN, Measurement, measure
from .plan import is_main_process, plan_of
from .push import pushing, ready_to_push
from .records import (
    about_run,
    data_sha256,
    facts_of_run,
    log_result,
    measured_before,
    mirroring,
    open_records,
    precision_line,
    selection_lines,
    summary_of,
    write_result,
)
from .rehearsal import rehearse
from .trackers.ready import check_trackers
from .trackers.tracking import tracking


def run(
    recipe: Recipe,
    output_dir: str | Path,
    *,
    resume: str = "auto",
    dry_run: bool = False,
    quiet: bool = False,
    group: str | None = None,
    trainer_class: type[QLoRANeftTrainer] = QLoRANeftTrainer,
) -> dict[str, Any]:
    """Train what a recipe states and record the result, continuing where an earlier call was interrupted.

    Writes into ``output_dir``: the adapter, or the model of a recipe without one, the tokenizer, ``recipe.yaml``,
    ``run.json``, ``data_report.json``, ``metrics.jsonl``, ``summary.json``, ``answers.json``, ``lengths.png``,
    ``loss.png`` and checkpoints.

    Args:
        recipe: What is learned, from `load_recipe`.
        output_dir: A new or empty folder, or that of this recipe's run.
        resume: ``"auto"`` continues the run that the folder holds, if any; ``"never"`` refuses to; a folder names the
            run or the checkpoint to continue from.
        dry_run: Whether to stop before the weights are loaded: model, adapters and arguments are built without them,
            data and plan checked and shown.
        quiet: Whether to print lines for people on stderr, leaving stdout to programs.
        group: What trackers put the run under, such as the name of its sweep.
        trainer_class: A subclass to train with, for experiments.

    Returns:
        The content of ``summary.json``.

    Raises:
        UserInputError: If the recipe's model or data are unusable, or this machine cannot do what it states.
        RunFailed: If training fails. The newest checkpoint is sound, and the same call continues from it.
        RunInterrupted: If a signal asked to stop; likewise.
    """
    started, output_dir, main = time.monotonic(), Path(output_dir), is_main_process()
    console = make_console(quiet=quiet, silent=not main)
    stop, notes = StopRequest(recipe.machine.grace_seconds, interrupts=True), RunNotes(output_dir, is_kept=main)
    with quiet_libraries(), outliving_its_reader(notes), answered(stop), _interrupted_early(stop, output_dir):
        recipe = resolved(recipe)  # base and LoRA settings of the adapter it goes on from
        # ---- Is there anything to do? ----
        if main and not dry_run:
            mirror_dir = recipe.machine.mirror_dir
            restore_from_mirror(mirror_dir, output_dir, recipe, lambda line: say(console, [line]))
        beginning = find_beginning(output_dir, recipe, resume)
        if beginning.finished and not beginning.moved:
            return _finished(output_dir, beginning, console)
        if main:
            check_trackers(recipe.machine.trackers)
        # Before rows are prepared and weights loaded, so that a wrong token costs no time.
        pusher = ready_to_push(recipe, output_dir, lambda line: say(console, [line])) if main and not dry_run else None

        # ---- Decide everything that needs no weights: a mistake should cost seconds, not a download ----
        policy = policy_of(recipe)
        config = check_base_config(model_path(recipe), revision=recipe.model.revision)
        check_context(config, recipe.data.max_length)
        check_router_loss(config, recipe.train.router_aux_loss_coef)
        tokenizer = load_tokenizer(model_path(recipe), revision=recipe.model.revision)
        identity = base_identity(recipe, config, tokenizer)
        # Before rows are prepared by them, since what has changed may also spoil the rows.
        check_base(beginning.earlier, identity)
        # A resume on another day writes the date of the run's beginning.
        data = data_of(recipe, tokenizer, progress=RowsProgress(console), now=moment_of(beginning.earlier))
        identity = run_identity(identity, data, recipe)
        check_tokens(beginning.earlier, identity, data_sha256(data))
        if beginning.finished:  # its files lie elsewhere, and say the same
            return _finished(output_dir, beginning, console)
        check_vocabulary(config, data.largest_token_id)
        plan = plan_of(recipe, policy, data, config)
        decided = Run(recipe, output_dir, console, started, policy, config, tokenizer, data, plan, identity, group)
        decided = with_first_ranks_date(rehearse(decided))
        say(console, _lines_before(decided))
        if dry_run:
            return facts_of_run(decided)

        # ---- Train. Every rank does, but one process alone holds the folder and writes ----
        with failing_with_the_disk(disk_message(output_dir)), claimed(output_dir) if main else nullcontext():
            if main:
                remove_leftovers(output_dir)  # of a session that was killed while it wrote
            beginning = find_beginning(output_dir, recipe, resume)  # again: now the folder is ours alone
            if beginning.finished:  # by another process in the meantime
                return _finished(output_dir, beginning, console)
            check_base(beginning.earlier, decided.identity)
            check_tokens(beginning.earlier, decided.identity, data_sha256(decided.data))
            live = LiveFile(output_dir, is_kept=main)
            with told_how_it_ends(live):
                trainer = trainer_of(decided, trainer_class)
                with pushing(pusher, trainer):
                    summary = _train_and_measure(decided, trainer, beginning, stop, notes, live)
            if main:
                forget_best(output_dir)  # they are the result now, and pushed
            return summary


def _train_and_measure(
    run: Run,
    trainer: QLoRANeftTrainer,
    beginning: Beginning,
    stop: StopRequest,
    notes: RunNotes,
    live: LiveFile,
) -> dict[str, Any]:
    """Carry a run to its end, or to the checkpoint at which it is asked to stop, and return its summary."""
    model = trainer.model
    in_full = run.recipe.trains_all
    say(run.console, [trainer.census.line()])
    # Taken before and compared after: that the base stays frozen is promised, so it is checked on every run.
    frozen = frozen_fingerprints(model)
    # Of a model that is trained in full nothing is frozen; the weights it begins from are its base.
    base_sha256 = base_fingerprint(frozen_fingerprints(model, and_trained=True) if in_full else frozen)
    check_weights(beginning.earlier, base_sha256, adapter_sha256(run.recipe))
    # The trainer loads a checkpoint only in train(), so this measures the untrained model in a resumed run too.
    before = measured_before(run, beginning) or measure(run, trainer)
    about = about_run(run, base_sha256, before)
    metrics = open_records(run, beginning, about, before)
    live.open(beginning.step)  # and no earlier: a resume that is refused changes nothing
    notes.open()  # only now, since a folder that holds anything before run.json is no run's
    decisions: list[str] = []

    def decided(line: str) -> None:
        decisions.append(line)
        say(run.console, [line])

    trainer.say, trainer.checkpoint_about, trainer.initial_loss = decided, about, before.held_out_loss
    trackers = tracking(run, trainer, beginning)
    with mirroring(run, trainer) as mirror, _interrupted(run, trainer, stop), trackers as tracked:
        if beginning.checkpoint is None:
            tracked.log(0, before.log())
        _train(run, trainer, beginning, metrics, stop, live)
        live.write(MEASURING, trainer.state.global_step)
        if frozen_fingerprints(model) != frozen:
            raise RunFailed("the frozen base changed during training; nothing was saved. Please report this.")
        # The model leaves with the template it was trained in; the base's own would format prompts differently.
        run.tokenizer.chat_template = run.data.chat_template or run.tokenizer.chat_template
        if in_full:  # the trainer switches the cache off, which would be saved
            model.config.use_cache = getattr(run.config.get_text_config(), "use_cache", True)
        # First: what comes after may fail, or be cut off. The checkpoint of the last step is there as well.
        files = _save_result(run, trainer, beginning) if is_main_process() else {}
        after = measure(run, trainer)
        drawn = log_result(run, metrics, trainer, after, tracked.log)
        known = {"base_sha256": base_sha256, "decisions": decisions, "files": files}
        summary = summary_of(run, trainer, beginning, before, after, **known)
        write_result(run, after, summary)
        live.write(FINISHED, trainer.state.global_step)
        if mirror is not None:  # the results, which were not there when the last checkpoint was copied
            mirror.files([path.name for path in run.output_dir.iterdir() if path.is_file()])
    _show(run, before, after)
    say(run.console, selection_lines(trainer))
    seconds = trainer.train_seconds
    base, steps = run.recipe.model.name_or_path, summary["steps"]
    if in_full:
        say(run.console, lines_after_in_full(run.output_dir, steps, seconds, drawn=drawn))
    else:
        say(run.console, lines_after(run.output_dir, base, steps, seconds, drawn=drawn, **_next_steps(run)))
    return summary


def _save_result(run: Run, trainer: QLoRANeftTrainer, beginning: Beginning) -> dict[str, str]:
    """Write what was trained, all of it on the disk before any file gets its name; return the hashes of the files."""
    for name in set_aside(run.output_dir, beginning.changed):
        trainer.say(f"a file of the result that was changed since is kept as {name}")
    with whole_files(run.output_dir) as draft:
        save_adapter(trainer.model, run.tokenizer, draft, revision=run.recipe.model.revision, say=trainer.say)
        return {path.name: sha256_of_file(path) for path in sorted(draft.iterdir())}


def _train(
    run: Run,
    trainer: QLoRANeftTrainer,
    beginning: Beginning,
    metrics: MetricsFile,
    stop: StopRequest,
    live: LiveFile,
) -> None:
    """Train to the last step.

    Raises:
        EvaluationGivenUp: If a signal asked to stop; the checkpoint is written.
    """
    machine, console, checkpoint = run.recipe.machine, run.console, beginning.checkpoint
    progress = ProgressLines(console)
    estimate = run.plan.memory_estimate
    callbacks = [
        WhenToSave(machine.save_every_minutes or None, stop),  # 0: not by the clock
        metrics,
        LiveRecord(live, lambda: {"tokens": trainer.tokens_seen, "bad_steps": trainer.bad_steps}),
        progress,
        SpeedLine(lambda: trainer.tokens_seen, lambda line: say(console, [line])),
        cuda_probe(trainer, estimate.peak_bytes if estimate else None),
    ]
    for callback in callbacks:
        if callback is not None:
            trainer.add_callback(callback)
    trainer.stop = stop
    if checkpoint:
        say(console, [f"going on from step {checkpoint.step}: {checkpoint.path}"])
    say(console, [*beginning.notes, *_moved(beginning)])
    stop.on_request = lambda name: say(console, [f"{name}: {_stopping(trainer)}"])
    stop.hold()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    finally:
        progress.close()
    trainer.check_stop()


# ---- Signals ----


@contextmanager
def _interrupted_early(stop: StopRequest, output_dir: Path) -> Generator[None, None, None]:
    """Say how to go on if a signal ends what had nothing to save."""
    try:
        yield
    # Exception: some libraries turn what interrupts them into an error of their own.
    except (StopNow, Exception) as error:
        if stop.signal is None or not (stop.interrupts or isinstance(error, StopNow)):
            raise
        raise RunInterrupted(stop.signal, stopped_early(output_dir)) from error


@contextmanager
def _interrupted(run: Run, trainer: QLoRANeftTrainer, stop: StopRequest) -> Generator[None, None, None]:
    """Say how to go on if a request ends training, or a measurement after it."""
    try:
        yield
    except EvaluationGivenUp:
        assert stop.signal is not None  # only a request gives it up
        raise RunInterrupted(stop.signal, _how_to_go_on(run, trainer)) from None


# ---- Lines for the user ----


def _next_steps(run: Run) -> dict[str, bool]:
    """Return what `lines_after` must know of the adapter."""
    if not is_main_process():
        return {"merges": False}
    facts = facts_of_adapter(find_adapter(run.output_dir))
    merges = facts.abilities is None or facts.abilities.merge is None
    return {"merges": merges, "of_text_part": facts.is_of_text_part}


def _moved(beginning: Beginning) -> list[str]:
    """Return what lies elsewhere now, after its content was compared."""
    return [f"{line}; the content is the same" for line in beginning.moved]


def _finished(output_dir: Path, beginning: Beginning, console: Console) -> dict[str, Any]:
    say(console, [*beginning.notes, *_moved(beginning)])
    if is_main_process() and beginning.earlier is not None and read_run_file(output_dir) is None:
        write_run_file(output_dir, sealed(beginning.earlier.model_dump(exclude_unset=True, exclude={SEAL})))
    if any(line.startswith("model.") for line in beginning.moved):
        say(console, ["the base's configuration and tokenizer were compared, its weights were not read again"])
    say(console, [f"{output_dir}: this run is finished; nothing is left to do"])
    return read_summary(output_dir)


def _lines_before(run: Run) -> list[str]:
    recipe = run.recipe
    return [
        f"model: {recipe.model.name_or_path}, {_what_is_trained(recipe)}",
        precision_line(run),
        noise_line(recipe.neftune),
        *data_lines(run.data.report),
        *run.plan.notes,
        f"{run.plan.num_steps} optimizer steps of {recipe.train.effective_batch_size} sequences",
    ]


def _what_is_trained(recipe: Recipe) -> str:
    if recipe.trains_all:
        return "not quantized, every weight trained in float32"
    base = "a base that is not quantized" if recipe.quantization is None else "NF4 base"
    lora, ratio = recipe.adapter, recipe.train.loraplus_lr_ratio
    scaled = f", scaled by {lora.scale:g} (rank-stabilized)" if lora.use_rslora else ""
    faster = f", B at {ratio:g} times the learning rate (LoRA+)" if ratio is not None and ratio > 1 else ""
    return f"{base}, LoRA r {lora.r}{scaled}{faster}{_going_on(recipe)}"


def _going_on(recipe: Recipe) -> str:
    return "" if recipe.model.adapter is None else f", going on from {recipe.model.adapter}"


def _show(run: Run, before: Measurement, after: Measurement) -> None:
    """Show what training changed: losses, and a few answers."""
    show_result(run.console, before.summary(), after.summary())
    pairs = list(zip(before.answers, after.answers, strict=True))[:ANSWERS_SHOWN]
    show_answers(run.console, [(old.prompt, old.text, new.text, new.reference) for old, new in pairs])


def _stopping(trainer: QLoRANeftTrainer) -> str:
    what = "giving the measurement up" if trainer.is_over else "finishing this step and writing a checkpoint"
    return f"{what}; once more stops at once"


def _how_to_go_on(run: Run, trainer: QLoRANeftTrainer) -> str:
    step, steps = trainer.state.global_step, trainer.state.max_steps
    done = f"stopped after step {step} of {steps}; the checkpoint is written"
    if trainer.is_over or step >= steps:
        last = f"the last of {steps} steps" if step >= steps else f"step {step} of {steps}, the last"
        done = f"stopped after {last}; the checkpoint is written, and only the measurement is left"
    return f"{done}. To go on:\n  {command_to_continue(run.output_dir)}"
