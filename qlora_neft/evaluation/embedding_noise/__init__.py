"""What NEFTune's noise does to token embeddings: whether they stay nearest to their own token, and their similarity.

Jain et al. 2023, NEFTune, arXiv:2310.05914, appendix: "How does the noise impact the tokens?" and the parts after it.
"""

from __future__ import annotations

from .flips import Flips, token_flips
from .noised import NoisedRows, noised, whole_vocabulary
from .spectrum import Spectrum, similarity_spectrum
from .stored import read_embedding
from .table import EmbeddingTable

__all__ = [
    "EmbeddingTable",
    "Flips",
    "NoisedRows",
    "Spectrum",
    "noised",
    "read_embedding",
    "similarity_spectrum",
    "token_flips",
    "whole_vocabulary",
]
