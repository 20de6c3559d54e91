"""The parts of an optimizer step (rows, sequences, micro-batches) and the losses of tokenized rows.

Importing this package does not import torch; its modules do.
"""

IGNORE_INDEX = -100  # label of a token that is read, not learned; torch's and TRL's default
LOSS_WEIGHTS = "loss_weights"  # column, and key of a batch: how much each token counts in the loss; absent: 1
