"""Carrying out a recipe: plan, data, trainer, measurements and record of one run."""
