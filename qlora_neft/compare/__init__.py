"""Runs side by side: sweeps over a recipe, and a report on any finished runs."""
