"""A trained adapter: found on disk or on the Hub, loaded on its base, prompted as it was trained."""

from __future__ import annotations

from .folder import AdapterFolder, find_adapter
from .load import Trained, load_trained
from .prompts import Prompts

__all__ = ["AdapterFolder", "Prompts", "Trained", "find_adapter", "load_trained"]
