"""Capability: lm-eval's tasks on an adapter and on its base alone, both on the same NF4 weights.

Jain et al. 2023, NEFTune, Figure 3 and "Effect on Capabilities", arXiv:2310.05914: tasks of the Open LLM Leaderboard
(ARC, HellaSwag, MMLU, TruthfulQA) by the LM Evaluation Harness. Needs the extra ``harness``.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import statistics
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired, cast

from typing_extensions import TypedDict

from ..adapter.folder import find_adapter
from ..adapter.load import Trained, load_trained
from ..display.console import quiet_libraries
from ..display.tables import Table
from ..errors import RunFailed, UserInputError, first_line
from ..paths import shown_path

# Examples before each question on the Open LLM Leaderboard, which the paper reports. Other tasks: lm-eval's default.
LEADERBOARD_SHOTS = {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc2": 0}
SIDES = ("base", "adapter")


class Measured(TypedDict):
    """A metric of one side, a share in [0, 1] or whatever the task's metric is."""

    value: float
    stderr: float | None


class Entry(TypedDict):
    """One metric of one task.

    ``part_of`` is the task's group. ``base`` and the differences (adapter - base, paired by question) are there if the
    base was measured.
    """

    task: str
    part_of: str | None
    metric: str
    num_fewshot: int | None
    questions: int
    base: NotRequired[Measured]
    adapter: Measured
    difference: NotRequired[float]
    difference_stderr: NotRequired[float | None]


class HarnessReport(TypedDict):
    """The JSON of ``eval harness``; ``adapter`` and ``base`` are names, ``lm_eval`` is a version."""

    adapter: str
    base: str
    lm_eval: str
    limit: int | None
    results: list[Entry]


def evaluate_adapter(
    source: str | Path,
    *,
    tasks: Sequence[str],
    num_fewshot: int | None = None,
    limit: int | None = None,
    include_path: Path | None = None,
    base_alone: bool = True,
    batch_size: int = 8,
    base: str | None = None,
    revision: str | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> HarnessReport:
    """Measure an adapter, and its base alone, on tasks of lm-eval.

    Args:
        source: As in `find_adapter`.
        tasks: Names of tasks, groups or tags.
        num_fewshot: Examples before each question. Default: `LEADERBOARD_SHOTS`. Tasks that fix 0 keep 0.
        limit: Maximum number of questions of each task.
        include_path: Folder with more task files.
        base_alone: Also measure the base without the adapter.
        batch_size: Requests at a time.
        base, revision, device, precision: As in `load_trained`.

    Returns:
        The report, with one entry per task and metric.

    Raises:
        UserInputError: If lm-eval is missing, a task is unknown, or the adapter cannot be loaded.
        RunFailed: If the data of a task cannot be read.
    """
    # A missing extra, a wrong folder and an unknown task are told before a model is loaded.
    lm_eval = _import()
    folder = find_adapter(source, revision=revision, base=base)
    manager = _task_manager(tasks, include_path)
    with quiet_libraries(), _quiet_lm_eval():
        trained = load_trained(folder, device=device, precision=precision)
        measured = {"adapter": _measured(trained, tasks, manager, num_fewshot, limit, batch_size)}
        if base_alone:  # on the same NF4 weights, the adapter switched off: the difference is the adapter's alone
            with trained.base_alone():
                measured["base"] = _measured(trained, tasks, manager, num_fewshot, limit, batch_size)
    return {
        "adapter": str(source),
        "base": shown_path(trained.folder.base),
        "lm_eval": lm_eval.__version__,
        "limit": limit,
        "results": side_by_side(measured),
    }


def side_by_side(measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Entry]:
    """Return the entries of `evaluate_adapter`.

    Args:
        measured: What lm-eval returned for ``adapter`` and, if it was measured, ``base``.
    """
    return [
        _entry(task, key, {side: found[i] for side, found in measured.items()})
        for i, result in enumerate(measured["adapter"])
        for task, metrics in result["results"].items()
        for key in metrics
        if _is_metric(key, metrics)
    ]


def _is_metric(key: str, metrics: Mapping[str, Any]) -> bool:
    # lm-eval's keys are "metric,filter" and "metric_stderr,filter", beside others such as "alias".
    return "," in key and "_stderr," not in key and isinstance(metrics[key], (int, float))


def _entry(task: str, key: str, results: Mapping[str, Mapping[str, Any]]) -> Entry:
    metric, filter_name = key.split(",", 1)
    adapter = results["adapter"]
    samples = {side: _per_question(task, metric, filter_name, result) for side, result in results.items()}
    leaves = _leaves(task, adapter)  # a group has no questions or shots of its own
    # Filled in the order of the JSON, where the base, which may not be measured, stands before the adapter.
    entry: dict[str, Any] = {
        "task": task,
        "part_of": next((name for name, below in adapter.get("group_subtasks", {}).items() if task in below), None),
        "metric": metric if filter_name == "none" else f"{metric} ({filter_name})",
        "num_fewshot": adapter["n-shot"].get(leaves[0]),
        "questions": sum(adapter["n-samples"][leaf]["effective"] for leaf in leaves),
    }
    for side in SIDES:
        if side in results:
            found = results[side]["results"][task]
            stderr = found.get(f"{metric}_stderr,{filter_name}")
            # Without a standard error lm-eval writes the text "N/A".
            entry[side] = {"value": found[key], "stderr": stderr if isinstance(stderr, float) else None}
    if "base" in entry:
        entry["difference"] = entry["adapter"]["value"] - entry["base"]["value"]
        entry["difference_stderr"] = paired_stderr(samples["adapter"], samples["base"], entry["difference"])
    return cast("Entry", entry)


def paired_stderr(a: Sequence[float], b: Sequence[float], difference: float) -> float | None:
    """Return the standard error of the mean difference between two measurements of the same questions.

    Args:
        a, b: Values by question, in the same order.
        difference: Of the two metrics.

    Returns:
        None if ``difference`` is not the mean over questions (a metric of another kind), or for fewer than two.
    """
    # Paired: most of the variance between questions is common to both sides and cancels.
    if len(a) != len(b) or len(a) < 2:
        return None
    differences = [x - y for x, y in zip(a, b, strict=True)]
    # Perplexities, F1 over a corpus and weighted groups are no plain means: a pairing by question would be wrong.
    if not math.isclose(statistics.fmean(differences), difference, abs_tol=1e-9):
        return None
    return statistics.stdev(differences) / math.sqrt(len(differences))


def _leaves(task: str, result: Mapping[str, Any]) -> list[str]:
    """Return the tasks in a group, through groups of groups; for a task, itself."""
    below = result.get("group_subtasks", {}).get(task) or []
    return [leaf for name in below for leaf in _leaves(name, result)] if below else [task]


def _per_question(task: str, metric: str, filter_name: str, result: Mapping[str, Any]) -> list[float]:
    """Return a metric's values in the order of questions; empty if it has none, or they are not numbers."""
    samples = [one for leaf in _leaves(task, result) for one in result["samples"].get(leaf, ())]
    # lm-eval lists each question once per filter.
    values = [one.get(metric) for one in samples if one["filter"] == filter_name]
    return [float(value) for value in values] if all(isinstance(value, (int, float)) for value in values) else []


def _import() -> Any:
    # Not try/except: an ImportError inside an installed lm-eval is another fault and must not be called missing.
    if importlib.util.find_spec("lm_eval") is None:
        raise UserInputError("eval harness: lm-eval is missing. Install the extra: pip install 'qlora-neft[harness]'")
    import lm_eval

    return lm_eval


def _task_manager(tasks: Sequence[str], include_path: Path | None) -> Any:
    """Find lm-eval's own tasks and those of a folder, and check that all names are known."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise UserInputError(f"--include-path: no folder at {str(include_path)!r}. Name the folder of your task files.")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown or not tasks:
        raise UserInputError(
            f"--tasks: lm-eval has no task {', '.join(unknown) or 'without a name'}. `lm-eval ls tasks` lists them; "
            "for tasks of your own, name their folder with --include-path."
        )
    return manager


def _measured(
    trained: Trained, tasks: Sequence[str], manager: Any, num_fewshot: int | None, limit: int | None, batch_size: int
) -> list[dict[str, Any]]:
    """Run lm-eval once for each number of examples; return what it returns."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # A loaded model is taken as it is; from a name lm-eval would load the base itself, in 16 bits.
    model = HFLM(pretrained=trained.model, tokenizer=trained.tokenizer, batch_size=batch_size)
    results = []
    for shots, names in _by_shots(tasks, num_fewshot).items():
        try:
            found = simple_evaluate(
                model, tasks=names, num_fewshot=shots, limit=limit, task_manager=manager, log_samples=True
            )
        except OSError as error:  # a missing data set, or the network
            raise RunFailed(f"{', '.join(names)}: the data of a task cannot be read. ({first_line(error)})") from error
        results.append(found)
    return results


def _by_shots(tasks: Sequence[str], num_fewshot: int | None) -> dict[int | None, list[str]]:
    """Group tasks by their number of examples; None: lm-eval's own."""
    groups: dict[int | None, list[str]] = {}
    for name in dict.fromkeys(tasks):  # each once, in the order given
        shots = LEADERBOARD_SHOTS.get(name) if num_fewshot is None else num_fewshot
        groups.setdefault(shots, []).append(name)
    return groups


@contextmanager
def _quiet_lm_eval() -> Generator[None, None, None]:
    """Silence lm-eval's warnings about what is intended here: a loaded model, and other numbers of examples."""
    logger = logging.getLogger("lm_eval")  # the parent of all its loggers
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def lines(report: HarnessReport) -> str:
    """Return a report as a table, in percent; a group is shown without its parts."""
    has_base = any("base" in entry for entry in report["results"])
    sides = SIDES if has_base else ("adapter",)
    rows = []
    for entry in report["results"]:
        if entry["part_of"] is not None:  # MMLU alone has 57 parts; the JSON has them
            continue
        cells = [entry["task"], entry["metric"], str(entry["num_fewshot"]), f"{entry['questions']:,}"]
        cells += [_shown(entry[side]["value"], entry[side]["stderr"]) for side in sides]
        if has_base:
            cells.append(_shown(entry["difference"], entry["difference_stderr"], "+"))
        rows.append(cells)
    heading = ("task", "metric", "shots", "n", *sides, *(["difference"] if has_base else []))
    note = "in percent; ± is one standard error" + (", of the difference paired by question" if has_base else "")
    limit = "" if report["limit"] is None else f"; the first {report['limit']} questions of each task only"
    return f"{Table(heading, rows).plain()}\n{note}{limit}"


def _shown(value: float, stderr: float | None, sign: str = "") -> str:
    return f"{100 * value:{sign}.2f}" + ("" if stderr is None else f" ± {100 * stderr:.2f}")
