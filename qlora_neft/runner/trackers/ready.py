"""Which trackers are at hand, asked before anything is prepared; no torch."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import get_args

from ...errors import RecipeError, UserInputError
from ...recipe.machine import Tracker

TRACKERS: tuple[Tracker, ...] = get_args(Tracker)
KEY = "machine.report_to"


def pip_line(tracker: Tracker) -> str:
    """Return the command that installs a tracker."""
    return f"pip install 'qlora-neft[{tracker}]'"


def is_installed(tracker: Tracker) -> bool:
    """Whether a tracker can be imported. A folder of its files in the current directory is none."""
    if sys.modules.get(tracker) is not None:
        return True
    found = importlib.util.find_spec(tracker)
    return found is not None and found.origin is not None  # None: any folder of that name, such as ./wandb


def check_trackers(trackers: Sequence[Tracker]) -> None:
    """Make sure that a run can report to its trackers, as far as that can be known without a network.

    Raises:
        UserInputError: If one is not installed, or would ask for an account in the middle of a run.
    """
    problems = [
        f"{KEY}: {tracker} is not installed. Install it ({pip_line(tracker)}), or remove it from the list."
        for tracker in trackers
        if not is_installed(tracker)
    ]
    if not problems and "wandb" in trackers and not _wandb_has_key():
        problems.append(
            f"{KEY}: wandb has no API key. Run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline to keep the "
            "run here."
        )
    if len(problems) == 1:
        raise UserInputError(problems[0])
    if problems:
        raise RecipeError(problems, KEY)


def _wandb_has_key() -> bool:
    """Whether wandb needs no key, or has one: at a terminal it would ask for it, and the run would wait."""
    if os.environ.get("WANDB_MODE", "online") not in ("online", "run", "shared") or os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    if wandb.run is not None or wandb.setup().settings.mode in ("offline", "disabled", "dryrun"):
        return True
    try:
        return bool(wandb.login(prompt=False))  # looks into its settings and netrc, and says nothing to the server
    except TypeError:  # wandb before 0.30 cannot be asked without asking the user
        return True
    except wandb.Error:
        return False
