"""The model being trained: its configuration, NF4 weights, LoRA, number formats and files."""
