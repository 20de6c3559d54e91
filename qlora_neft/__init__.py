"""QLoRA fine-tuning with NEFTune noise as published.

Everything public is named here and imported when it is first used: ``import qlora_neft`` is cheap
and loads no torch.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .lazy_names import lazy_names

if TYPE_CHECKING:
    from .errors import RecipeError
    from .notebook import command, output_of, train_live
    from .recipe import Recipe, list_recipes, load_recipe
    from .run import run
    from .trainer import QLoRANeftConfig, QLoRANeftTrainer

__version__ = "0.1.0"

_HOME = {
    "QLoRANeftConfig": "trainer",
    "QLoRANeftTrainer": "trainer",
    "Recipe": "recipe",
    "RecipeError": "errors",
    "command": "notebook",
    "list_recipes": "recipe",
    "load_recipe": "recipe",
    "output_of": "notebook",
    "run": "run",
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

__getattr__ = lazy_names(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """This package's class: it keeps the name ``run`` for the function.

    The module that holds ``run`` has the same name, and importing a submodule binds it in its
    package. Without this, ``from qlora_neft import run`` would give the function or the module,
    whichever was asked for first. The module stays reachable: ``from .run import ...``.
    """

    @property
    def run(self) -> Callable[..., dict[str, Any]]:
        return importlib.import_module(f"{self.__name__}.run").run

    @run.setter
    def run(self, module: types.ModuleType) -> None:
        """Take note of nothing: the import system binds the submodule here, and the function stays."""


sys.modules[__name__].__class__ = _Package
