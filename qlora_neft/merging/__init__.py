"""An adapter and its base made into one plain model, with the proof that it is the one that was trained."""

from __future__ import annotations

from .merge import merge_adapter
from .plan import Plan, plan_merge
from .proof import KL_LIMIT
from .rows import ProofRows, proof_rows
from .strategies import STRATEGIES

__all__ = ["KL_LIMIT", "STRATEGIES", "Plan", "ProofRows", "merge_adapter", "plan_merge", "proof_rows"]
