"""Measures that need the trained model: it is loaded on its base, with the data its recipe names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..data import PreparedData
from ..decoding import Decoding
from ..decoding.answers import Answer, greedy_answers, questions
from ..display.quiet import quiet_libraries
from ..errors import UserInputError
from ..evaluation.text_measures import CUTOFFS, measure_texts
from ..files.json_file import write_json
from ..inspection.eval_runs import Machine, losses_of_runs, overfit_of_runs, recipe_data
from ..run_report.record import ANSWERS_FILE, read_run
from ..run_report.row_losses import ROWS_FILE
from ..steps.batch import IGNORE_INDEX
from ..trained import Trained, load_trained

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
