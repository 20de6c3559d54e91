"""A GGUF file: metadata first, then tensors, one in memory at a time. It is written whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...disks import check_writable
from ...errors import RunFailed, UserInputError
from ...files import whole_file

if TYPE_CHECKING:
    from gguf import GGUFWriter

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# GGUF's name of a dtype, and the numpy dtype its values are passed in: numpy has no bfloat16, so its bits are.
_KINDS = {torch.float32: ("F32", np.float32), torch.float16: ("F16", np.float16), torch.bfloat16: ("BF16", np.int16)}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor to write.

    Attributes:
        name: Name in GGUF.
        shape: As in torch; GGUF lists it backwards.
        dtype: Dtype it is written in.
        read: Returns its values, of that shape, in any float dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


def gguf_library() -> ModuleType:
    """Return the ``gguf`` package, which is an extra.

    Raises:
        UserInputError: If it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserInputError("gguf: the gguf library is missing. Install it: pip install 'qlora-neft[gguf]'") from error
    return gguf


def check_dtype(name: str) -> torch.dtype:
    """Return the dtype that ``--dtype`` names.

    Raises:
        UserInputError: If there is none of that name.
    """
    if name not in DTYPES:
        raise UserInputError(f"--dtype: must be one of {', '.join(DTYPES)}, got {name!r}.")
    return DTYPES[name]


def write_gguf(
    path: Path, architecture: str, describe: Callable[[GGUFWriter], None], tensors: Sequence[GgufTensor]
) -> None:
    """Write a GGUF file.

    Args:
        path: A new file in an existing folder.
        architecture: llama.cpp's name of the architecture.
        describe: Adds the metadata.
        tensors: In the order of the file.

    Raises:
        UserInputError: If the path cannot be written to, or a value does not fit the dtype.
        RunFailed: If the disk fails.
    """
    gguf = gguf_library()
    with _new_file(path) as draft:
        writer = gguf.GGUFWriter(draft, architecture)
        describe(writer)
        for tensor in tensors:
            # GGUF lists all tensors, with their sizes, before the data of the first: so none has to be read yet.
            _announce(writer, tensor)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                writer.write_tensor_data(_values(tensor))
        finally:
            writer.close()


@contextmanager
def _new_file(path: Path) -> Generator[Path, None, None]:
    """Yield a draft to write to, which becomes ``path``; errors name OUT."""
    # Checked at once, not when the draft is renamed: a large model takes minutes to write.
    if path.exists():
        raise UserInputError(f"OUT: {str(path)!r} exists already. Name another file, or remove it.")
    if not path.parent.is_dir():
        raise UserInputError(f"OUT: there is no folder {str(path.parent)!r}. Make it first.")
    check_writable(path, "OUT")
    try:
        # Only here an OSError is the disk's; the checks above speak of the path.
        with whole_file(path, synced=True) as draft:
            yield draft
    except PermissionError as error:
        raise UserInputError(f"OUT: {str(path)!r} cannot be written ({error.strerror}).") from error
    except OSError as error:
        raise RunFailed(f"{path}: could not be written ({error.strerror}). Nothing is left of it.") from error


def _announce(writer: GGUFWriter, tensor: GgufTensor) -> None:
    """Write a tensor's name, shape and dtype into the header."""
    name, numpy_dtype = _KINDS[tensor.dtype]
    dtype, kind = np.dtype(numpy_dtype), gguf_library().GGMLQuantizationType[name]
    # The library reverses the shape itself: GGUF lists the fastest axis first.
    writer.add_tensor_info(tensor.name, tensor.shape, dtype, math.prod(tensor.shape) * dtype.itemsize, kind)


def _values(tensor: GgufTensor) -> np.ndarray:
    """Read a tensor's values in the dtype they are written in."""
    found = tensor.read()
    assert tuple(found.shape) == tensor.shape, f"{tensor.name}: {tuple(found.shape)} read, {tensor.shape} announced"
    values = found.to(tensor.dtype).contiguous()
    # Finite values that overflow float16 would become infinite without a word; infinities of the source are kept.
    if tensor.dtype == torch.float16 and not torch.isfinite(values).all() and torch.isfinite(found).all():
        largest = found.abs().max().item()
        raise UserInputError(f"--dtype f16: {tensor.name} has values up to {largest:g}, f16 ends at 65504. Use bf16.")
    return (values.view(torch.int16) if tensor.dtype == torch.bfloat16 else values).numpy()
