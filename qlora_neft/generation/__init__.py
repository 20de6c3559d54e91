"""Answers from a model: token by token, greedy or sampled; from a file of prompts or in a chat."""
