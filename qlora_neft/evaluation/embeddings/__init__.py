"""The effect of NEFTune noise on token embeddings: nearest neighbors and the spectrum of similarities.

Jain et al. 2023, NEFTune, arXiv:2310.05914, appendix: "How does the noise impact the tokens?" and the parts after it.
"""
