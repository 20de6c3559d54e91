"""Taking a trained adapter elsewhere: merged, as GGUF, on the Hub, and who can load it."""
