"""What a person sees of recipes and runs: lines, progress, tables, pictures. And what libraries say, kept out of it."""
