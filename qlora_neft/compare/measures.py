"""What is measured of a finished run beyond its own summary.

A measure is a function from a run's folder to numbers by name. Its numbers are kept in the folder's ``measures.json``
under the measure's name; further files it may write itself. To add one: write the function and name it in `MEASURES`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..adapter.load import Trained, load_trained
from ..data.prepare import PreparedData
from ..display.console import quiet_libraries
from ..errors import RunFailed, UserInputError
from ..evaluation.runs import Machine, losses_of_runs, overfit_of_runs
from ..evaluation.texts import CUTOFFS, measure_texts
from ..files import write_json
from ..generation.answers import Answer, greedy_answers, questions
from ..generation.decode import Decoding
from ..recipe import Recipe
from ..runner.run_data import recipe_data
from ..steps.sequences import IGNORE_INDEX
from .records import ANSWERS_FILE, MEASURES_FILE, read_run
from .results import ROWS_FILE

Measure = Callable[[Path], dict[str, float]]


def _rows(folder: Path) -> dict[str, float]:

    return held_out_rows(folder)


def _answers(folder: Path) -> dict[str, float]:

    return sample_answers(folder)


def _overfit(folder: Path) -> dict[str, float]:

    return recited(folder)


def _text(folder: Path) -> dict[str, float]:

    return text_of_answers(folder)


def _loss(folder: Path) -> dict[str, float]:

    return whole_losses(folder)


MEASURES: dict[str, Measure] = {
    "rows": _rows,
    "answers": _answers,
    "loss": _loss,
    "overfit": _overfit,
    "text": _text,
}
ON_HELD_OUT = ("rows", "answers", "text")


def check_names(names: Sequence[str]) -> None:
    """Refuse a name that is no measure, before anything is trained.

    Raises:
        UserInputError: If there is one.
    """
    unknown = [name for name in names if name not in MEASURES]
    if unknown:
        raise UserInputError(
            f"--measure: must be names from {', '.join(MEASURES)}, with commas between them, got {', '.join(unknown)}."
        )
    if "overfit" in names:
        from ..evaluation.overfit import check_installed

        check_installed()


def check_held_out(names: Sequence[str], recipes: Sequence[Recipe]) -> None:
    """Refuse measures on held-out rows where a recipe has none.

    Raises:
        UserInputError: If there is such a recipe.
    """
    wanting = [name for name in names if name in ON_HELD_OUT]
    if wanting and not all(recipe.data.has_eval_rows for recipe in recipes):
        raise UserInputError(
            f"--measure: {', '.join(wanting)} needs held-out rows. Give data.eval_path, data.eval_split or "
            "data.eval_fraction, or leave it away."
        )


def missing(folder: Path, names: Sequence[str]) -> list[str]:
    """Measures that a run does not have yet."""
    return [name for name in names if name not in read_run(folder).measures]


def measure_run(folder: Path, names: Sequence[str]) -> None:
    """Measure what a run does not have yet, each written as soon as it is known.

    Raises:
        UserInputError: For an unknown name, or a run that cannot be measured.
        RunFailed: If a measure gives no finite number.
    """
    check_names(names)
    for name in missing(folder, names):
        numbers = MEASURES[name](folder)
        wrong = {key: value for key, value in numbers.items() if not math.isfinite(value)}
        if wrong:
            raise RunFailed(f"{folder}: measure {name} gave {wrong}; nothing of it was kept.")
        write_json(folder / MEASURES_FILE, {**read_run(folder).measures, name: numbers})


ROWS_AT_A_TIME = 4
ANSWERS, HELD_OUT_PROMPTS, TRAINING_PROMPTS = 8, 100, 100
MAX_ANSWER_TOKENS = 256


def held_out_rows(folder: Path) -> dict[str, float]:
    """Write the loss of every held-out row to ``row_losses.json``.

    Returns:
        No number of its own: their mean per trained token is the run's ``held_out_loss``.
    """
    trained, data = _loaded(folder)
    sums: list[float] = []
    counts: list[int] = []
    for losses, tokens in _row_losses(trained, data.eval):
        sums += losses.tolist()
        counts += tokens.tolist()
    write_json(folder / ROWS_FILE, {"rows": data.report["eval"]["sha256"], "sums": sums, "counts": counts})
    return {}


def sample_answers(folder: Path) -> dict[str, float]:
    """Write greedy answers to the first held-out prompts to ``answers.json``; no number of its own."""
    found = _answered(folder, ANSWERS)
    write_json(folder / ANSWERS_FILE, {"answers": [asdict(answer) for answer in found]})
    return {}


def text_of_answers(folder: Path) -> dict[str, float]:
    """Length and repetition of greedy answers to the first held-out prompts (NEFTune's Table 4)."""
    answers = _answered(folder, HELD_OUT_PROMPTS)
    found = measure_texts([answer.text for answer in answers], CUTOFFS["alpaca"]).main()
    return {name: value for name, value in found.items() if value is not None}


def recited(folder: Path) -> dict[str, float]:
    """How much of the first training rows greedy answers repeat (NEFTune's Figure 5), as ``eval overfit`` has it."""
    decoding = Decoding(max_new_tokens=MAX_ANSWER_TOKENS)
    overfit_of_runs([str(folder)], rows=TRAINING_PROMPTS, decoding=decoding, machine=_machine(folder))
    return read_run(folder).measures["overfit"]


def whole_losses(folder: Path) -> dict[str, float]:
    """Losses on all training and held-out rows (NEFTune's Figure 4), as ``eval loss`` has them."""
    losses_of_runs([str(folder)], {}, machine=_machine(folder))
    return read_run(folder).measures["loss"]


def _machine(folder: Path) -> Machine:
    stated = read_run(folder).recipe["machine"]
    rows = stated["per_device_eval_batch_size"]  # what is measured does not depend on it
    batch_size = ROWS_AT_A_TIME if rows == "auto" else rows
    return Machine(device=stated["device"], precision=stated["precision"], batch_size=batch_size)


def _loaded(folder: Path) -> tuple[Trained, PreparedData]:
    with quiet_libraries():
        machine = _machine(folder)
        trained = load_trained(folder, device=machine.device, precision=machine.precision)
        data = recipe_data(trained.folder, trained.tokenizer)
    if data.eval is None:
        raise UserInputError(f"{folder}: the run has no held-out rows to measure on. Give data.eval_path.")
    return trained, data


def _answered(folder: Path, count: int) -> list[Answer]:
    trained, data = _loaded(folder)
    asked = questions(data.eval, trained.tokenizer, count, data.stop_token_ids)
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


def _row_losses(trained: Trained, rows: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Summed negative log-likelihood in nats and number of trained tokens, (B,) each."""
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        part = [rows[i] for i in range(start, min(start + ROWS_AT_A_TIME, len(rows)))]
        ids, labels, mask = (
            tensor.to(trained.model.device)
            for tensor in (
                _padded([row["input_ids"] for row in part], 0),
                _padded([row["labels"] for row in part], IGNORE_INDEX),
                _padded([[1] * len(row["input_ids"]) for row in part], 0),
            )
        )
        with torch.no_grad():
            logits = trained.model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()  # (B, T - 1, V)
        targets = labels[:, 1:]  # (B, T - 1)
        losses = cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORE_INDEX)
        yield losses.double().sum(1), targets.ne(IGNORE_INDEX).sum(1)


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def main(arguments: list[str]) -> int:
    """Exit code 0, 1 for a failure, 2 for wrong input."""
    try:
        measure_run(Path(arguments[0]), arguments[1:])
    except (UserInputError, RunFailed) as error:
        is_input = isinstance(error, UserInputError)
        print(f"{'error' if is_input else 'failed'}: {error}", file=sys.stderr)
        return 2 if is_input else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
