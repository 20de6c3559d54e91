"""A run on disk: begun or gone on with, one writer, whole checkpoints, a mirror, records, and when to write them."""
