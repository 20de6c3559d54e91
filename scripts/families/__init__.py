"""The audit of model families: a tiny random model of each, driven through train, resume, merge and generate."""
