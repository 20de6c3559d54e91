"""One run of a sweep, from its recipe to its measures, in a process of its own.

``python -m qlora_neft.compare.one_run FOLDER RECIPE [ASKING] [MEASURE...]`` trains the run unless it is trained, then
takes the measures that it lacks. One process does both: starting one costs more than a small run, most of it imports.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..disks import told_of_disk
from ..display.terminal import echo
from ..errors import Diverged, RunFailed, RunInterrupted, UserInputError
from ..imports import imports_that_stay
from ..output import outliving_its_reader
from ..processes import end_with_starter
from ..run_folder.stop import StopNow, StopRequest, answered
from .asking import Asking
from .folder import is_trained
from .queue import DIVERGED

if TYPE_CHECKING:
    from ..recipe import Recipe


def train_and_measure(folder: Path, recipe: Path, names: Sequence[str], asking: Asking | None = None) -> None:
    """Train a run if it is not trained, and take the measures that it lacks.

    Args:
        folder: The run's.
        recipe: The file it is trained from.
        names: Measures, from `plan.MEASURES`.
        asking: What they need to know.

    Raises:
        UserInputError: If the recipe cannot be carried out, a name is unknown, or the run cannot be measured.
        RunFailed: If training fails, or a measure gives a number that is not finite.
        RunInterrupted: If a signal asked training to stop; nothing is measured then.
    """
    # Imported here, so that an interruption while they load is answered by `main` as well.
    with imports_that_stay():
        from ..recipe import load_recipe
        from ..runner.run import run

    if not is_trained(folder):
        group = folder.resolve().parent.name
        if "rows" in names:
            _train_and_keep_rows(run, load_recipe(recipe), folder, group)
        else:
            run(load_recipe(recipe), folder, group=group)
        _release_memory()
    if names:
        from .measures import measure_run  # evaluation and generation, which a run without measures does not need

        measure_run(folder, names, asking)


def _train_and_keep_rows(run: Callable[..., Any], recipe: Recipe, folder: Path, group: str) -> None:
    """Train a run; the losses of its held-out rows are kept as it is measured, which spares loading the base again."""
    from .row_losses import RowLossesTrainer, trainer_class_keeping, write_row_losses

    kept: list[RowLossesTrainer] = []
    run(recipe, folder, group=group, trainer_class=trainer_class_keeping(kept))
    for trainer in kept[-1:]:  # none where another process has finished the run meanwhile
        write_row_losses(folder, trainer)


def _release_memory() -> None:
    """Drop the trained model: measuring loads it anew from its files and should not need memory for two."""
    import torch

    gc.collect()  # trainer, model and callbacks refer to each other in circles
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def main(arguments: Sequence[str]) -> int:
    """Run the process; return the exit code that the command line has for the same outcome, or `DIVERGED`."""
    # bitsandbytes says, as it is imported on some CPUs, that an optional kernel package is missing.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    folder, recipe, *names = arguments
    asking = Asking.of(names.pop(0)) if names and names[0].startswith("{") else Asking()  # as `Asking.to_text` gives it
    end_with_starter()
    with outliving_its_reader(lambda note: None), answered(StopRequest(grace_seconds=0, interrupts=True)):
        return _run(Path(folder), Path(recipe), names, asking)


def _run(folder: Path, recipe: Path, names: Sequence[str], asking: Asking) -> int:
    try:
        train_and_measure(folder, recipe, names, asking)
    except UserInputError as error:
        line, code = f"error: {error}", 2
    except RunFailed as error:
        line, code = f"failed: {error}", DIVERGED if isinstance(error, Diverged) else 1
    except RunInterrupted as error:
        line, code = f"interrupted: {error}", 128 + error.signal
    except StopNow as error:
        line, code = "interrupted", 128 + error.signal
    except KeyboardInterrupt:
        line, code = "interrupted", 130
    except Exception as error:
        failure = told_of_disk(error)
        if failure is None:
            raise
        line, code = f"failed: {failure}", 1
    else:
        return 0
    echo(line, err=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
