"""Talking to a trained model: prompts in, answers out, one by one, in batches or as a conversation."""

from __future__ import annotations

from .chat import Chat
from .generate import Reply, generate, replies
from .requests import Request, requests_of_file, requests_of_texts

__all__ = ["Chat", "Reply", "Request", "generate", "replies", "requests_of_file", "requests_of_texts"]
