"""Runs of one recipe under several settings and seeds, as pairs that differ in nothing else. No torch."""
