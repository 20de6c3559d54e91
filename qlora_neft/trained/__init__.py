"""A trained adapter: found on disk or on the Hub, loaded on its base, prompted as it was trained.

Names are imported when they are first used: finding an adapter loads no torch, so a wrong folder is told at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names

if TYPE_CHECKING:
    from .folder import AdapterFolder, find_adapter
    from .load import Trained, load_trained
    from .prompts import Prompts

__all__ = ["AdapterFolder", "Prompts", "Trained", "find_adapter", "load_trained"]

_HOME = {
    "AdapterFolder": "folder",
    "Prompts": "prompts",
    "Trained": "load",
    "find_adapter": "folder",
    "load_trained": "load",
}

__getattr__ = lazy_names(__name__, _HOME)
