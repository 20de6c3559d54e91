"""`QLoRANeftTrainer` and its configuration: TRL's trainer on a 4-bit NF4 base, with NEFTune as published."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import QLoRANeftConfig
    from .qlora_neft_trainer import QLoRANeftTrainer

_HOME = {"QLoRANeftConfig": "config", "QLoRANeftTrainer": "qlora_neft_trainer"}

__all__ = ["QLoRANeftConfig", "QLoRANeftTrainer"]


def __getattr__(name: str) -> Any:
    # Imported when it is first used: the other modules here serve without what these need.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
