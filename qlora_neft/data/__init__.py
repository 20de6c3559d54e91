"""From files or the Hub to tokenized sequences: reading, formats, templates, tokens, the gate, the held-out split."""

from .gate import DataRefused, Limits
from .prepare import PreparedData, prepare_data
from .sources import Source
from .worker import Settings

__all__ = ["DataRefused", "Limits", "PreparedData", "Settings", "Source", "prepare_data"]
