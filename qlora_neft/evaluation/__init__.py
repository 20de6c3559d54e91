"""What the NEFTune paper measures, on texts, on losses, on embeddings. No module here sees a recipe."""
