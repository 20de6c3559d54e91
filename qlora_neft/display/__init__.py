"""What a user sees of recipes and runs: lines, progress, tables, pictures."""
