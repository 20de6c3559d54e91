"""What an optimizer step is made of: rows, sequences, micro-batches. And the losses of tokenized rows.

Importing this package does not import torch; its modules do.
"""

IGNORE_INDEX = -100  # label of a token that is read, not learned; torch's and TRL's default
