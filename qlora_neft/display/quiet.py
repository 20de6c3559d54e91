"""Keep libraries' own chatter (progress bars, advice for other users) out of a run's output."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import transformers


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside the block: no upstream progress bars, no deprecation notes meant for developers, warnings kept."""
    verbosity = datasets.logging.get_verbosity(), transformers.utils.logging.get_verbosity()
    bars = datasets.utils.is_progress_bar_enabled(), transformers.utils.logging.is_progress_bar_enabled()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs an error, then raises it: once is enough
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        datasets.logging.set_verbosity(verbosity[0])
        transformers.utils.logging.set_verbosity(verbosity[1])
        if bars[0]:
            datasets.enable_progress_bars()
        if bars[1]:
            transformers.utils.logging.enable_progress_bar()
