"""The fast path of a training step: the same mathematics as PEFT's and transformers' modules, in fewer passes."""
