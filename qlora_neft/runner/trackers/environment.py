"""Environment variables and loggers, set for a while."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager


@contextmanager
def environment(values: Mapping[str, str | None]) -> Generator[None, None, None]:
    """Set variables inside the block, or remove them for None, and restore them afterwards."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def unless_set(values: Mapping[str, str]) -> dict[str, str]:
    """Return those variables that the user has not set."""
    return {name: value for name, value in values.items() if name not in os.environ}


@contextmanager
def only_errors_of(names: tuple[str, ...]) -> Generator[None, None, None]:
    """Keep loggers from saying anything but errors inside the block."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def first_error_of(name: str) -> Generator[list[str], None, None]:
    """Show nothing of what a logger says inside the block; yield a list that gets its first error, of any thread."""
    errors: list[str] = []
    logger = logging.getLogger(name)

    def keep(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR and not errors:  # a server may be away for days
            errors.append(record.getMessage())
        return False

    logger.addFilter(keep)
    try:
        yield errors
    finally:
        logger.removeFilter(keep)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
