"""The live view of runs: read from their folders, and nothing written there. No torch."""
