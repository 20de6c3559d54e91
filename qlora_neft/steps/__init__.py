"""What an optimizer step is made of: rows, sequences, micro-batches, and random numbers keyed by the step alone."""
