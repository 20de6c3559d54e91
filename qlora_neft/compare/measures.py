"""The measures that a sweep takes of a finished run, beyond the run's own summary.

A measure is a function from a run's folder to numbers by name. The numbers are kept in the folder's ``measures.json``
under the measure's name; the function may write further files. To add one, write the function, put it in `MEASURES`
and its name in `plan.MEASURES`, which loads no torch.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from ..adapter.load import Trained, load_trained
from ..data.prepare import PreparedData
from ..display.console import quiet_libraries
from ..errors import RunFailed, UserInputError
from ..evaluation.alpaca.answer import Answered, answer_instructions, held_out_references
from ..evaluation.alpaca.judge import judge_outputs
from ..evaluation.defaults import ANSWER_TOKENS, RECITED_ROWS, RECITED_TOKENS, REPETITION_PENALTY
from ..evaluation.losses import losses_by_row, losses_of_runs, prepare_for_losses
from ..evaluation.overfit import overfit_of_runs
from ..evaluation.runs import Machine
from ..evaluation.texts import chunk_of_run, measure_texts
from ..files import write_json
from ..generation.answers import Answer, greedy_answers, questions
from ..generation.decode import Decoding
from ..run_folder.record import ANSWERS_FILE, MADE, MEASURES_FILE
from ..runner.run_data import recipe_data
from .asking import Asking
from .folder import missing
from .plan import check_measures
from .records import ROW_LOSSES_FILE, read_run

ROWS_AT_A_TIME = 4  # where the recipe leaves it to auto; changes no number beyond rounding
NUM_SAMPLES = 8
MAX_ANSWER_TOKENS = 256  # of a sample answer, which is shown and not measured

Numbers = dict[str, Any]  # by name; under `MADE` how they were made


def measure_run(folder: Path, names: Sequence[str], asking: Asking | None = None) -> None:
    """Take the measures that a run lacks, each written as soon as it is known.

    Args:
        folder: The run's.
        names: From `plan.MEASURES`.
        asking: What they need to know.

    Raises:
        UserInputError: If a name is unknown, or the run cannot be measured.
        RunFailed: If a measure gives a number that is not finite.
    """
    check_measures(names)
    asking = asking or Asking()
    for name in missing(folder, names, asking):
        numbers = MEASURES[name](folder, asking)
        # A run that diverged gives NaN, which JSON cannot hold and no mean survives.
        wrong = {key: value for key, value in numbers.items() if key != MADE and not math.isfinite(value)}
        if wrong:
            raise RunFailed(f"{folder}: measure {name} gave {wrong}; nothing of it was kept.")
        # Read again, since some measures write the file themselves; under its name a measure is not taken twice.
        write_json(folder / MEASURES_FILE, {**read_run(folder).measures, name: numbers})


def held_out_rows(folder: Path, asking: Asking) -> Numbers:
    """Write the loss of every held-out row to ``row_losses.json``.

    Returns:
        Nothing: the rows' mean per trained token is the run's ``held_out_loss`` already.
    """
    trained, data = _loaded(folder)
    rows = _held_out(folder, data)
    prepare_for_losses(trained)
    found = list(losses_by_row(trained, rows, batch_size=ROWS_AT_A_TIME))
    # Sums and counts, not means: a bootstrap over rows weighs each row by its tokens.
    sums = [value for losses in found for value in losses.sums.tolist()]
    counts = [value for losses in found for value in losses.counts.tolist()]
    described = data.report["eval"]
    assert described is not None  # `_held_out` found rows
    write_json(folder / ROW_LOSSES_FILE, {"rows": described["sha256"], "sums": sums, "counts": counts})
    return {}


def sample_answers(folder: Path, asking: Asking) -> Numbers:
    """Write greedy answers to the first held-out prompts to ``answers.json``; return no numbers."""
    found = _answered(folder, NUM_SAMPLES)
    write_json(folder / ANSWERS_FILE, {"answers": [asdict(answer) for answer in found]})
    return {}


def whole_losses(folder: Path, asking: Asking) -> Numbers:
    """Measure losses on all training and held-out rows (NEFTune's Figure 4), as ``eval loss`` does."""
    losses_of_runs([str(folder)], {}, machine=_machine(folder))
    return read_run(folder).measures["loss"]


def recited(folder: Path, asking: Asking) -> Numbers:
    """Measure how far greedy answers repeat the first training rows (NEFTune's Figure 5), as ``eval overfit`` does."""
    decoding = Decoding(max_new_tokens=RECITED_TOKENS, repetition_penalty=REPETITION_PENALTY)
    overfit_of_runs([str(folder)], rows=RECITED_ROWS, decoding=decoding, machine=_machine(folder))
    return read_run(folder).measures["overfit"]


def text_of_answers(folder: Path, asking: Asking) -> Numbers:
    """Measure length and repetition of greedy answers (NEFTune's Table 4), as ``eval text`` does."""
    answered, chunk = _instructed(folder, asking), chunk_of_run(folder)
    found = measure_texts([row["output"] for row in answered.rows], chunk).main()
    # Repetition is None if every answer is shorter than the chunk.
    numbers = {name: value for name, value in found.items() if value is not None}
    return {**numbers, MADE: {**answered.made, "chunk": chunk}}


def win_rate(folder: Path, asking: Asking) -> Numbers:
    """Answer instructions and have the answers judged (NEFTune's Tables 1 to 3), as ``eval alpaca`` does."""
    if asking.judge is None:
        raise UserInputError("--judge: --measure alpaca needs one.")
    answered = _instructed(folder, asking)
    _release_memory()  # of the model that answered, before the judge is loaded
    if asking.reference is None and asking.is_on_held_out_rows:
        reference = held_out_references(str(folder), asking.rows)
    else:
        reference = None if asking.reference is None else Path(asking.reference)
    score = judge_outputs(
        asking.judge,
        answered.path,
        rows=answered.rows,
        reference=reference,
        annotator=asking.annotator,
        instructions=None if asking.instructions is None else Path(asking.instructions),
        machine=_machine(folder),
        made=answered.made,
        say=print,
    )
    return {**{key: value for key, value in score.measures().items() if value is not None}, MADE: dict(score.made)}


MEASURES: dict[str, Callable[[Path, Asking], Numbers]] = {
    "rows": held_out_rows,
    "answers": sample_answers,
    "loss": whole_losses,
    "overfit": recited,
    "text": text_of_answers,
    "alpaca": win_rate,
}


def _instructed(folder: Path, asking: Asking) -> Answered:
    return answer_instructions(
        str(folder),
        instructions=asking.instructions,
        rows=asking.rows,
        decoding=Decoding(max_new_tokens=ANSWER_TOKENS, repetition_penalty=REPETITION_PENALTY),
        machine=_machine(folder),
        say=print,
    )


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _machine(folder: Path) -> Machine:
    stated = read_run(folder).recipe["machine"]  # measured where and as it was trained
    rows = stated["per_device_eval_batch_size"]  # what is measured does not depend on it
    batch_size = ROWS_AT_A_TIME if rows == "auto" else rows
    return Machine(device=stated["device"], precision=stated["precision"], batch_size=batch_size)


def _loaded(folder: Path) -> tuple[Trained, PreparedData]:
    with quiet_libraries():
        machine = _machine(folder)
        trained = load_trained(folder, device=machine.device, precision=machine.precision)
        data = recipe_data(trained.folder, trained.tokenizer)
    return trained, data


def _held_out(folder: Path, data: PreparedData) -> Dataset:
    if data.eval is None:
        raise UserInputError(f"{folder}: the run has no held-out rows to measure on. Give data.eval_path.")
    return data.eval


def _answered(folder: Path, count: int) -> list[Answer]:
    trained, data = _loaded(folder)
    asked = questions(_held_out(folder, data), trained.tokenizer, count, data.stop_token_ids)
    if not asked:
        raise UserInputError(f"{trained.folder.source}: no held-out row has a prompt, so there is nothing to answer.")
    return greedy_answers(
        trained.model,
        trained.tokenizer,
        asked,
        max_new_tokens=MAX_ANSWER_TOKENS,
        batch_size=_machine(folder).batch_size,
        stop_token_ids=data.stop_token_ids,
    )
