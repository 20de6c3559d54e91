"""Writing a model's weights as safetensors shards, with the memory of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bitsandbytes.nn import Params4bit
from safetensors.torch import save_file
from torch import Tensor

from ..files.json_file import write_json
from .checkpoint import INDEX, SINGLE


class ShardWriter:
    """Collects tensors and writes them whenever a shard is full.

    Args:
        folder: Where the shards go.
        max_bytes: Of a shard; a larger tensor gets a shard of its own.
        wrote: Called with the number of bytes written so far.
    """

    def __init__(self, folder: Path, max_bytes: int, wrote: Callable[[int], None]) -> None:
        self.folder, self.max_bytes, self.wrote = folder, max_bytes, wrote
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, key: str, weight: Tensor | Params4bit) -> None:
        """Take a weight; one in NF4 with its constants, which stay in the same shard."""
        parts = {key: weight.detach().contiguous()}
        if isinstance(weight, Params4bit):
            state = weight.quant_state.as_dict(packed=True)
            parts = {key: weight.data} | {f"{key}.{name}": part for name, part in state.items()}
        if self._pending and _size(self._pending) + _size(parts) > self.max_bytes:
            self._flush()
        self._pending |= parts

    def close(self) -> None:
        """Write what is left, and the index if there is more than one shard."""
        self._flush()
        count = len(self._shards)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for i, name in enumerate(names):
            self._draft(i).rename(self.folder / name)
        if count > 1:
            where = {key: name for name, keys in zip(names, self._shards, strict=True) for key in keys}
            metadata = {"total_size": self.total_bytes}
            write_json(self.folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(where.items()))})

    def _flush(self) -> None:
        save_file(self._pending, self._draft(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self.total_bytes += _size(self._pending)
        self._pending = {}
        self.wrote(self.total_bytes)

    def _draft(self, i: int) -> Path:
        return self.folder / f"shard-{i}.part"


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
