"""From files or the Hub to tokenized sequences: reading, formats, templates, tokens, the gate, the held-out split."""
