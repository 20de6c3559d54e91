"""`QLoRANeftTrainer` and its configuration: TRL's trainer on a 4-bit NF4 base, with NEFTune as published."""

from __future__ import annotations

from .config import QLoRANeftConfig
from .trainer import QLoRANeftTrainer

__all__ = ["QLoRANeftConfig", "QLoRANeftTrainer"]
