"""How answers come about: token by token, greedily or drawn, and to the questions that were held out."""

from .decode import Continuation, context_of, continuations, generate_ids
from .settings import Decoding

__all__ = ["Continuation", "Decoding", "context_of", "continuations", "generate_ids"]
