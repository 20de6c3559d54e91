"""The cache of prepared data is damaged between two sessions: it is prepared again, and the same tokens are trained."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from .bench import Bench
from .fault import Fault, hold


def damaged(bench: Bench, damage: Callable[[bytearray], None]) -> int:
    """Damage every file of tokens in the cache, go on with a stopped run."""
    out = bench.copy(bench.stopped)
    files = [path for path in Path(bench.environment["HF_DATASETS_CACHE"]).rglob("*.arrow") if path.is_file()]
    hold(files, "there is no cache")
    for file in files:
        content = bytearray(file.read_bytes())
        damage(content)
        file.write_bytes(content)
    bench.goes_on(out)
    return 0


def _flip(content: bytearray) -> None:
    content[len(content) // 2] ^= 1


def _half(content: bytearray) -> None:
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)


def _page(content: bytearray) -> None:
    middle = len(content) // 2 // 512 * 512
    content[middle : middle + 512] = bytes(len(content[middle : middle + 512]))


def _cut(content: bytearray) -> None:
    del content[len(content) // 2 :]


DAMAGES = {"one bit flipped": _flip, "half of it zeros": _half, "a lost page of zeros": _page, "cut off": _cut}
KIND = "the cache of prepared data is damaged"
FAULTS = [Fault(KIND, name, partial(damaged, damage=damage)) for name, damage in DAMAGES.items()]
