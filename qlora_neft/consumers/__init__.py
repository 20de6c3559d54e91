"""Where an adapter can be used: a verdict for each tool that takes adapters, from the adapter's own files."""

from __future__ import annotations

from .facts import Facts, facts_of
from .verdicts import CONSUMERS, Verdict, named_consumers, verdict_for

__all__ = ["CONSUMERS", "Facts", "Verdict", "facts_of", "named_consumers", "verdict_for"]
