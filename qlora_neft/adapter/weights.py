"""What an adapter adds to the weights of its base, read one layer at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ..errors import UserInputError
from .folder import MEND, WEIGHTS, AdapterFolder, beyond_plain

if TYPE_CHECKING:
    from torch import Tensor  # `qlora-neft check` reads names and shapes alone, without torch

PREFIX = "base_model.model."


class Update:
    """A LoRA adapter as updates of weights: ``scale * B @ A``, and whole weights that were trained (modules_to_save).

    Args:
        folder: The adapter.
        shapes: Of the base's parameters, by name.
        quantized: Names of those in NF4.
        tied: Names of those that share a weight with another.

    Attributes:
        scale: By parameter that has an update.
        replaced: Parameters that are stored whole, and their names in the adapter's file.

    Raises:
        UserInputError: If the adapter does not fit the base, or is of a kind that cannot be merged.
    """

    def __init__(
        self, folder: AdapterFolder, shapes: Mapping[str, tuple[int, ...]], quantized: set[str], tied: set[str]
    ) -> None:
        self.folder = folder
        _check_kind(folder)
        self.scale: dict[str, float] = {}
        self.replaced: dict[str, str] = {}
        stored = self._stored()
        for key, shape in stored.items():
            if ".lora_B." in key:
                continue  # looked at with its A
            module, is_factor, _ = key.removeprefix(PREFIX).partition(".lora_A.")
            name = f"{module}.weight" if is_factor else module
            fits = name in shapes and (shape[1] == shapes[name][1] if is_factor else shape == shapes[name])
            b_shape = stored.get(key.replace(".lora_A.", ".lora_B."))
            if not fits or (is_factor and b_shape != (shapes[name][0], shape[0])):
                raise UserInputError(
                    f"{folder.source}: the adapter does not fit the base {folder.base!r} ({key} has no place in it). "
                    "Give the base it was trained on with --base."
                )
            if name in tied or (not is_factor and name in quantized):
                what = "is shared by embedding and head" if name in tied else "is quantized in training"
                raise UserInputError(f"{folder.source}: {name} was trained and {what}. It cannot be merged here.")
            if is_factor:
                self.scale[name] = _scale(folder.config, module, shape[0])
            else:
                self.replaced[name] = key

    def changes(self, name: str) -> bool:
        """Whether a weight is another than the base's."""
        return name in self.scale or name in self.replaced

    def delta(self, name: str) -> Tensor | None:
        """What is added to a weight, (out, in) in float32; None if nothing."""
        if name not in self.scale:
            return None
        module = PREFIX + name.removesuffix(".weight")
        a, b = self._read(f"{module}.lora_A.weight"), self._read(f"{module}.lora_B.weight")
        return (b.float() @ a.float()).mul_(self.scale[name])

    def whole(self, name: str) -> Tensor | None:
        """A weight that was trained whole, None if it was not."""
        return self._read(self.replaced[name]) if name in self.replaced else None

    def _stored(self) -> dict[str, tuple[int, ...]]:
        try:
            with safe_open(self.folder.path / WEIGHTS, "pt") as file:
                return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserInputError(f"{self.folder.source}: {WEIGHTS} cannot be read ({error}). {MEND}") from error

    def _read(self, key: str) -> Tensor:
        with safe_open(self.folder.path / WEIGHTS, "pt") as file:
            return file.get_tensor(key)


def _check_kind(folder: AdapterFolder) -> None:
    used = beyond_plain(folder.config)
    if used:
        raise UserInputError(
            f"{folder.source}: only plain LoRA can be merged here (with rsLoRA, rank and alpha patterns, "
            f"modules_to_save), the adapter has {', '.join(used)}. Merge it with PEFT's merge_and_unload."
        )


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """As PEFT scales: lora_alpha / r, or over its root with rsLoRA, with the pattern's alpha where one matches."""
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), module), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def finite(weight: Tensor) -> bool:
    """Whether every number is."""
    return bool(weight.isfinite().all())


A, B, PREFIX = ".lora_A.weight", ".lora_B.weight", "base_model.model."


def scaling_of(config: dict[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies B A x with, for one module.

    Args:
        config: ``adapter_config.json``.
        module: Its name in the base.
        rank: Of its A, which ``rank_pattern`` may have set.
    """
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns.keys(), module), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")


def _weights(path: Path) -> tuple[dict[str, int], tuple[str, ...], tuple[str, ...]]:
    ranks, others, dtypes = {}, [], set()
    try:
        with safe_open(path, "np") as stored:
            for key in stored.keys():  # noqa: SIM118  (it is no dictionary)
                piece = stored.get_slice(key)
                dtypes.add(piece.get_dtype())
                if key.endswith((A, _EMBEDDING[0])):
                    module = key.removesuffix(A).removesuffix(_EMBEDDING[0]).removeprefix("base_model.model.")
                    ranks[module] = piece.get_shape()[0]
                elif not key.endswith((B, _EMBEDDING[1])):
                    others.append(key)
    except (OSError, SafetensorError) as error:
        raise UserInputError(f"{path}: cannot be read ({error}). {MEND}") from error
    return ranks, tuple(sorted(others)), tuple(sorted(dtypes))
