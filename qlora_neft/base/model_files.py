"""The safetensors files of a model: where each tensor lies, its shape and dtype. Names and headers alone, no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..errors import UserInputError, first_line
from ..files import is_inside, read_json
from ..hub_client import download_errors, ready, why

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_LENGTH = 8  # bytes at the start of a file that give the length of its header, little-endian
# Bytes of a number, for the dtypes that `_plain_header` reads.
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor, by the header of its file.

    Attributes:
        shape: Size of each dimension.
        dtype: As safetensors names it, such as ``F32`` or ``BF16``.
    """

    shape: tuple[int, ...]
    dtype: str


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file: names, shapes and dtypes of its tensors.

    Raises:
        OSError: If there is no such file.
        SafetensorError: If it is damaged.
    """
    # safe_open imports NumPy whatever it is asked for, so it reads only what is not in order: its errors say why.
    if (tensors := _plain_header(path)) is not None:
        return tensors
    with safe_open(path, "np") as file:  # "np" only names what tensors would be read as; none is
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is not a dictionary)
        return {name: StoredTensor(tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}


def _plain_header(path: Path) -> dict[str, StoredTensor] | None:
    """Read a header by hand, in the order of `safe_open`; None if anything in it is unusual or wrong.

    The format: https://github.com/huggingface/safetensors#format.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH), "little")
            num_bytes = path.stat().st_size - _LENGTH - length  # of all tensors
            if num_bytes < 0:  # checked before a damaged length is read, which may be any number
                return None
            header = json.loads(file.read(length).decode())
        header.pop("__metadata__", None)
        found, end = {}, 0
        # The tensors must cover the rest of the file without gap or overlap, as safetensors demands.
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
            if start != end or stop - start != math.prod(shape) * _SIZES[entry["dtype"]]:
                return None
            found[name], end = StoredTensor(shape, entry["dtype"]), stop
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return dict(sorted(found.items())) if end == num_bytes else None


def tensor_files(source: str, find: Callable[[str], Path | None]) -> dict[str, str]:
    """Map every stored tensor to the name of the file that holds it, by the index or the single file's header.

    Args:
        source: What messages call the model.
        find: Gives the path of a file by its name; None if there is no such file.

    Raises:
        UserInputError: If the model is not stored as safetensors, or index or header is damaged.
    """
    name = INDEX
    try:
        if (index := find(INDEX)) is not None:
            # The index alone: the headers of many shards need not be fetched.
            return _inside(read_json(index)["weight_map"])
        name = SINGLE
        if (single := find(SINGLE)) is not None:
            return dict.fromkeys(stored_tensors(single), SINGLE)
    except UserInputError:  # a ValueError as well; ``find`` has said what is wrong
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise UserInputError(f"{source}: {name} cannot be read ({error}). Fetch it again.") from error
    raise UserInputError(
        f"{source}: holds no {SINGLE} and no {INDEX}. Give a base that is stored as safetensors; one stored as .bin is "
        "converted by loading it in transformers and save_pretrained."
    )


def _inside(weight_map: dict[str, str]) -> dict[str, str]:
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not is_inside(file):
            raise ValueError(f"{tensor} is said to be in {file!r}, outside the model's folder")
    return weight_map


def file_in(folder: Path) -> Callable[[str], Path | None]:
    """Return a ``find`` for `tensor_files` that looks in a folder."""
    return lambda name: folder / name if (folder / name).is_file() else None


def file_on_hub(source: str, revision: str | None) -> Callable[[str], Path | None]:
    """Return a ``find`` for `tensor_files` that fetches files of a Hub repository.

    It returns None only for a missing index, which most models in one file lack, and raises UserInputError for any
    other file that is missing or out of reach.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def find(name: str) -> Path | None:
        ready()
        try:
            return Path(hf_hub_download(source, name, revision=revision))
        except EntryNotFoundError as error:  # not in the repository; offline, not in the cache
            if name == INDEX:
                return None
            raise UserInputError(
                f"{source}: the Hub has no {name} that could be fetched. ({first_line(error)})"
            ) from error
        except download_errors() as error:
            raise UserInputError(f"{source}: {name} cannot be fetched from the Hub. ({why(error)})") from error

    return find


def tensors_at_hand(name_or_path: str, revision: str | None = None) -> dict[str, StoredTensor] | None:
    """Read the headers of a model's files on this machine; nothing is fetched.

    Args:
        name_or_path: A folder, or a Hub id that may be in the download cache.
        revision: Hub branch, tag or commit.

    Returns:
        Every stored tensor by its name; None if a file is not here, damaged, or not safetensors.
    """
    folder = Path(name_or_path).expanduser()
    find = file_in(folder) if folder.is_dir() else file_in_cache(name_or_path, revision)
    found: dict[str, StoredTensor] = {}
    try:
        for name in dict.fromkeys(tensor_files(name_or_path, find).values()):
            if (path := find(name)) is None:
                return None
            found |= stored_tensors(path)
    except (OSError, SafetensorError, UserInputError):
        return None
    return found


def adapter_base(name_or_path: str, revision: str | None = None) -> str | None:
    """Return the base that an adapter names, empty if none; None if this is no adapter, or not on this machine.

    A folder with a ``config.json`` is a model, whatever lies beside it.
    """
    folder = Path(name_or_path).expanduser()
    find = file_in(folder) if folder.is_dir() else file_in_cache(name_or_path, revision)
    path = find("adapter_config.json")
    if path is None or find("config.json") is not None:
        return None
    try:
        return str(read_json(path).get("base_model_name_or_path") or "")
    except (OSError, ValueError, AttributeError):
        return ""


def file_in_cache(source: str, revision: str | None = None) -> Callable[[str], Path | None]:
    """Return a function that looks a file of a Hub repository up in the download cache, without asking the Hub."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    def find(name: str) -> Path | None:
        try:
            found = try_to_load_from_cache(source, name, revision=revision)
        except HFValidationError:  # a folder that is gone
            return None
        return Path(found) if isinstance(found, str) else None

    return find


def same_tensor(path: Path, name: str, other_path: Path, other_name: str) -> bool:
    """Whether two stored tensors are the same, bit for bit; read in blocks, up to the first difference.

    Raises:
        OSError, ValueError, KeyError: If a file cannot be read or lacks the tensor.
    """
    one, other = _place(path, name), _place(other_path, other_name)
    if one[1] - one[0] != other[1] - other[0]:
        return False
    with path.open("rb") as first, other_path.open("rb") as second:
        first.seek(one[0])
        second.seek(other[0])
        left = one[1] - one[0]
        while left > 0:
            size = min(left, 2**20)
            if first.read(size) != second.read(size):
                return False
            left -= size
    return True


def _place(path: Path, name: str) -> tuple[int, int]:
    """Return the first byte of a tensor in its file, and the one behind its last."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        start, stop = json.loads(file.read(length))[name]["data_offsets"]
    return _LENGTH + length + start, _LENGTH + length + stop
