"""`QLoRANeftTrainer` and its configuration: TRL's trainer on a 4-bit NF4 base, with NEFTune as published."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names

if TYPE_CHECKING:
    from .config import QLoRANeftConfig
    from .qlora_neft_trainer import QLoRANeftTrainer

_HOME = {"QLoRANeftConfig": "config", "QLoRANeftTrainer": "qlora_neft_trainer"}

__all__ = ["QLoRANeftConfig", "QLoRANeftTrainer"]

__getattr__ = lazy_names(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
