"""Carrying out a recipe: the plan, data, trainer, measurements and records of one run."""
