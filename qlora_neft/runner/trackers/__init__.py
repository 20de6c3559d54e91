"""A run's logs in the trackers that people watch their runs with, through transformers' own callbacks."""
