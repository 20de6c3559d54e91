"""QLoRA fine-tuning with NEFTune noise as published.

All public names are here. Each is imported on first use, so that ``import qlora_neft`` is cheap and loads no torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .errors import RecipeError
    from .notebook import command, output_of, train_live
    from .recipe import Recipe, list_recipes, load_recipe
    from .runner.run import run
    from .trainer import QLoRANeftConfig, QLoRANeftTrainer

__version__ = "0.2.0"

# The module that each public name comes from.
_MODULES = {
    "QLoRANeftConfig": "trainer",
    "QLoRANeftTrainer": "trainer",
    "Recipe": "recipe",
    "RecipeError": "errors",
    "command": "notebook",
    "list_recipes": "recipe",
    "load_recipe": "recipe",
    "output_of": "notebook",
    "run": "runner.run",
    "train_live": "notebook",
}

__all__ = [
    "QLoRANeftConfig",
    "QLoRANeftTrainer",
    "Recipe",
    "RecipeError",
    "__version__",
    "command",
    "list_recipes",
    "load_recipe",
    "output_of",
    "run",
    "train_live",
]


def _let_idle_threads_sleep() -> None:
    """Set ``OMP_WAIT_POLICY=PASSIVE``, unless the user has set it: idle OpenMP threads sleep instead of spinning.

    Between two parallel regions the threads of libgomp, which torch ships, spin by default. Beside other busy programs
    they take the cores from the threads they wait for, and a run becomes many times slower. libgomp reads the variable
    when it is loaded with torch, so it is set here, before any torch of ours; processes started later inherit it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


_let_idle_threads_sleep()


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
