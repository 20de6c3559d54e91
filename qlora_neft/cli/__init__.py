"""The command line: verbs, a module each. What is heavy is imported inside the verb that needs it."""

from __future__ import annotations

from .app import app, main

__all__ = ["app", "main"]
