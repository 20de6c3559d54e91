"""What NEFTune noise does to token embeddings: nearest neighbours and the spectrum of similarities.

Jain et al. 2023, NEFTune, arXiv:2310.05914, appendix: "How does the noise impact the tokens?" and the parts after it.
"""
