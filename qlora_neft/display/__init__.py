"""Recipes and runs as shown to a user: lines, progress, tables, pictures."""
