"""A released checkpoint's files against its config.json: where the two differ, the files are what is loaded. No torch.

transformers ties a head that the configuration calls tied only if its files hold no head of its own, and takes the
number of tokens from the configuration; a table with other rows than that does not load, so its rows count here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..base.model_files import StoredTensor, file_in, same_tensor, tensor_files, tensors_at_hand
from ..errors import UserInputError
from .geometry import Geometry

Tensors = Mapping[str, StoredTensor]
# Last module of the names of embedding and head, in the families that transformers has.
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "embeddings")
HEADS = ("lm_head", "embed_out", "output_layer")


def stored_tensors_of(name_or_path: str, revision: str, origin: str) -> Tensors | None:
    """Return the headers of a checkpoint's files; on the Hub these are range requests of a few kilobytes.

    Args:
        name_or_path, revision: The base.
        origin: As `read_config` says; for a shipped configuration nothing is asked.

    Returns:
        Every tensor by its name, or None if they are not known.
    """
    if origin != "Hub":
        return tensors_at_hand(name_or_path, revision) if origin == "local" else None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError

    try:
        files = HfApi().get_safetensors_metadata(name_or_path, revision=revision).files_metadata
    # Not safetensors, no access or no network: the configuration alone is counted.
    except (OSError, ValueError, HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError):
        return None
    return {
        name: StoredTensor(tuple(info.shape), info.dtype)
        for file in files.values()
        for name, info in file.tensors.items()
    }


def as_stored(geometry: Geometry, name_or_path: str, tensors: Tensors | None) -> tuple[Geometry, list[str]]:
    """Correct a geometry by the files: a head of their own, another number of rows.

    Args:
        geometry: By the configuration.
        name_or_path: The base; a folder's two tables are compared.
        tensors: Headers of its files, None if they are not known.

    Returns:
        The geometry, and a line for everything that differs.
    """
    embedding, head = _table(tensors, EMBEDDINGS, geometry), _table(tensors, HEADS, geometry)
    notes = []
    if tensors and embedding is not None and tensors[embedding].shape[0] != geometry.vocab_size:
        rows = tensors[embedding].shape[0]
        notes.append(
            f"the files hold {rows} rows of embeddings, config.json says {geometry.vocab_size}: the files count"
        )
        added = (rows - geometry.vocab_size) * geometry.embedding_width
        geometry = replace(
            geometry,
            vocab_size=rows,
            embedding_parameters=geometry.embedding_parameters + added,
            head_parameters=geometry.head_parameters + (0 if geometry.tied else added),
        )
    if tensors and geometry.tied and head is not None and not _same(name_or_path, embedding, head):
        notes.append(f"the files hold a head of their own ({head}), config.json calls it tied: it counts")
        rows, width = tensors[head].shape
        geometry = replace(geometry, tied=False, head_parameters=rows * width)
    return geometry, notes


def _table(tensors: Tensors | None, names: tuple[str, ...], geometry: Geometry) -> str | None:
    """Return the name of the one table of embeddings, or head, with as many columns as the geometry says."""
    found = [
        name
        for name, tensor in (tensors or {}).items()
        if name.endswith(tuple(f"{part}.weight" for part in names))
        and len(tensor.shape) == 2
        and tensor.shape[1] == geometry.embedding_width
    ]
    return found[0] if len(found) == 1 else None


def _same(name_or_path: str, embedding: str | None, head: str) -> bool:
    """Whether a stored head is the embedding once more, which transformers then ties; unknown on the Hub."""
    folder = Path(name_or_path).expanduser()
    if embedding is None or not folder.is_dir():
        return False
    try:
        files = tensor_files(name_or_path, file_in(folder))
        return same_tensor(folder / files[embedding], embedding, folder / files[head], head)
    except (OSError, KeyError, ValueError, UserInputError):
        return False
