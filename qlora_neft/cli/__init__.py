"""The command line: verbs, a module each. What is heavy is imported inside the verb that needs it."""

from .verbs import app, main

__all__ = ["app", "main"]
