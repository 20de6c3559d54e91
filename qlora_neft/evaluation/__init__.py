"""The measurements of the NEFTune paper: of texts, losses, recitation, preferences, capabilities and embeddings."""
