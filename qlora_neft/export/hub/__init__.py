"""A trained adapter on the Hugging Face Hub: what is published, and how it gets there."""
