"""Work on rows in several processes, in order and with a bounded number of rows in flight."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, Literal

from ..errors import RunFailed
from ..processes import SIGNALS, end_with_parent

CHUNK = 500  # rows passed to a process at once
CHUNK_SIZE = 2**22  # characters passed to a process at once, unless a single row has more
MIN_ROWS_PER_PROCESS = 4 * CHUNK  # fewer take less time than starting a process
CHUNKS_AHEAD = 4  # per process

Work = Callable[[Sequence[Any]], list[Any]]
_work: Work | None = None  # in a worker process: what it does to each chunk


def map_rows(
    work: Work,
    rows: Iterable[Any],
    num_proc: int | Literal["auto"] = "auto",
    size: Callable[[Any], int] = lambda row: 0,
) -> Iterator[list[Any]]:
    """Apply ``work`` to chunks of rows; results come in the order of the rows whatever the number of processes.

    Args:
        work: From a list of rows to a list of results; picklable.
        rows: Any number of rows, read at most a few chunks ahead.
        size: Number of characters in a row, about.
        num_proc: Number of processes; ``"auto"`` is one per core for enough rows, and this one alone for fewer.

    Raises:
        RunFailed: If a process dies.
    """
    chunks = _chunks(rows, size)
    if num_proc == "auto":
        # The number of rows is not known before the last one is read, so look at the first few thousand.
        ahead = list(islice(chunks, MIN_ROWS_PER_PROCESS // CHUNK))
        worth_it = len(ahead) == MIN_ROWS_PER_PROCESS // CHUNK
        num_proc = _cores() if worth_it else 1
        chunks = _chained(ahead, chunks)
    if num_proc == 1:
        yield from map(work, chunks)
        return
    with ProcessPoolExecutor(num_proc, _context(), initializer=_begin, initargs=(work, os.getpid())) as pool:
        try:
            yield from _in_order(pool, chunks, CHUNKS_AHEAD * num_proc)
        except BrokenProcessPool as error:
            raise RunFailed(
                "a process that prepares data died, most likely because memory ran out. Set machine.dataset_num_proc=1."
            ) from error
        finally:
            # The reader may stop early, and then nothing should be worked on for it.
            pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, chunks: Iterator[list[Any]], ahead: int) -> Iterator[list[Any]]:
    waiting: deque[Future[list[Any]]] = deque()
    for chunk in chunks:
        # The oldest is waited for although later ones may be done: that keeps the order, and bounds what is in memory.
        waiting.append(pool.submit(_do, chunk))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _begin(work: Work, parent: int) -> None:
    end_with_parent(parent)
    # A terminal's Ctrl-C and a batch system's signals reach this process too; its parent answers them, and ends the
    # pool, by SIGTERM if need be. A forked process has the handlers of its parent, which would take them for a request.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    # Given once to each process, not with each chunk: it holds the tokenizer.
    global _work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _work = work


def _do(chunk: list[Any]) -> list[Any]:
    assert _work is not None
    return _work(chunk)


def _chunks(rows: Iterable[Any], size: Callable[[Any], int]) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    total = 0
    for row in rows:
        length = size(row)
        if chunk and (len(chunk) == CHUNK or total + length > CHUNK_SIZE):
            yield chunk
            chunk, total = [], 0
        chunk.append(row)
        total += length
    if chunk:
        yield chunk


def _chained(first: list[list[Any]], rest: Iterator[list[Any]]) -> Iterator[list[Any]]:
    yield from first
    yield from rest


def _cores() -> int:
    # The cores that this process may use; a scheduler or container may give it fewer than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _context() -> multiprocessing.context.BaseContext:
    # A forked process has the tokenizer and all libraries already; a spawned one has to import them.
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    return multiprocessing.get_context("fork") if can_fork else multiprocessing.get_context()
