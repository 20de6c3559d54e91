"""The changes an adapter makes to its base's weights, read layer by layer. Names, shapes and scales need no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from ..base.model_files import stored_tensors
from ..errors import UserInputError
from ..recipe.model import lora_scale
from .folder import MEND, WEIGHTS, AdapterFolder, beyond_merging, stack_owners

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "base_model.model."  # PEFT puts it before every name of the base
A, B = ".lora_A.weight", ".lora_B.weight"
EMBEDDING_A, EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"  # the pair of an embedding, transposed


class AdapterWeights:
    """The tensors of an adapter's file. The header is read at once, a tensor only when it is asked for.

    Args:
        folder: The adapter.

    Attributes:
        shapes: Shape of each tensor, by its name in the file.
        ranks: Rank of each module with a pair of matrices A (r, in) and B (out, r), by its name in the base.
        experts: Number of experts of each module that is a stack of them.
        embedding_ranks: Rank of each embedding with such a pair.
        others: Sorted names of tensors that belong to no pair, such as whole modules (``modules_to_save``).
        dtypes: Sorted, as safetensors names them.

    Raises:
        UserInputError: If the file cannot be read.
    """

    def __init__(self, folder: AdapterFolder) -> None:
        self.folder = folder
        try:
            stored = stored_tensors(folder.path / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise self._unreadable(error) from error
        self.shapes = {name: tensor.shape for name, tensor in stored.items()}
        self.ranks = self._first_sizes(A)
        # A stack of experts has the matrices of all of them side by side.
        owners = stack_owners(folder.config)
        stacks = {name for name in self.ranks if any(_ends_with(_without_base_layer(name), end) for end in owners)}
        self.experts = {name: max(1, self.ranks[name] // folder.config["r"]) for name in stacks}
        self.ranks |= {name: self.ranks[name] // count for name, count in self.experts.items()}
        self.embedding_ranks = self._first_sizes(EMBEDDING_A)
        self.others = tuple(sorted(n for n in stored if not n.endswith((A, B, EMBEDDING_A, EMBEDDING_B))))
        self.dtypes = tuple(sorted({tensor.dtype for tensor in stored.values()}))

    def scale(self, module: str) -> float:
        """Return what PEFT multiplies B @ A with: lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA.

        The rank is that of the module's own A, which ``rank_pattern`` may have set; ``alpha_pattern`` sets the alpha.
        """
        from peft.utils.other import get_pattern_key  # takes seconds

        config, rank = self.folder.config, self.ranks[module]
        patterns = config.get("alpha_pattern") or {}
        # PEFT's own matching: a regular expression for the end of the module's name.
        alpha = patterns.get(get_pattern_key(list(patterns), module), config["lora_alpha"])
        return lora_scale(alpha, rank, use_rslora=bool(config.get("use_rslora")))

    def pair(self, module: str) -> tuple[Tensor, Tensor]:
        """Read A (r, in) and B (out, r) of a module."""
        return self.read(f"{PREFIX}{module}{A}"), self.read(f"{PREFIX}{module}{B}")

    def read(self, name: str) -> Tensor:
        """Read a tensor by its name in the file.

        Raises:
            UserInputError: If it is not there, or the file is gone.
        """
        try:
            with safe_open(self.folder.path / WEIGHTS, "pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise self._unreadable(error) from error

    def _first_sizes(self, ending: str) -> dict[str, int]:
        """Return by module the size of the first dimension of the tensors whose names end so."""
        names = [name for name in self.shapes if name.endswith(ending)]
        return {name.removesuffix(ending).removeprefix(PREFIX): self.shapes[name][0] for name in names}

    def _unreadable(self, error: Exception) -> UserInputError:
        return UserInputError(f"{self.folder.source}: {WEIGHTS} cannot be read ({error}). {MEND}")


class Update:
    """A LoRA adapter as updates of weights: ``scale * B @ A``, and whole weights that were trained (modules_to_save).

    Args:
        folder: The adapter.
        shapes: Shapes of the base's parameters, by name.
        quantized: Names of the parameters in NF4.
        tied: Names of the parameters that share a weight with another.

    Attributes:
        pairs: Module whose pair is added, for each parameter that gets ``scale * B @ A``.

    Raises:
        UserInputError: If the adapter does not fit the base, or is of a kind that cannot be merged.
    """

    def __init__(
        self, folder: AdapterFolder, shapes: Mapping[str, tuple[int, ...]], quantized: set[str], tied: set[str]
    ) -> None:
        _check_kind(folder)
        self._weights = AdapterWeights(folder)
        self._source, self._base = folder.source, folder.base
        self.pairs: dict[str, str] = {}
        self._replaced: dict[str, str] = {}  # by parameter, the tensor in the adapter's file that replaces it
        for module, rank in self._weights.ranks.items():
            if module not in self._weights.experts:
                self._add_pair(module, rank, shapes, tied)
        self._add_stacks(shapes)
        # Whatever is left is taken for a whole module; a name that the base lacks is refused there.
        for key in self._weights.shapes:
            if not key.endswith((A, B)):
                self._add_whole(key, shapes, quantized, tied)

    def changes(self, name: str) -> bool:
        """Whether a weight differs from the base's."""
        return name in self.pairs or name in self._replaced

    def delta(self, name: str) -> Tensor | None:
        """Return what is added to a weight, (out, in) in float32; None if nothing is."""
        if name not in self.pairs:
            return None
        module = self.pairs[name]
        a, b = self._weights.pair(module)
        if experts := self._weights.experts.get(module):
            # As PEFT lays them out: A (experts * r, in), B (out, r * experts) with the experts innermost.
            b = b.float().view(len(b), -1, experts).permute(2, 0, 1)
            return (b @ a.float().view(experts, -1, a.shape[1])).mul_(self._weights.scale(module))  # (experts, out, in)
        # In float32 whatever the matrices are stored in, so that the sum with the base is rounded once.
        return (b.float() @ a.float()).mul_(self._weights.scale(self.pairs[name]))

    def whole(self, name: str) -> Tensor | None:
        """Return a weight that was trained whole, None if it was not."""
        return self._weights.read(self._replaced[name]) if name in self._replaced else None

    def _add_pair(self, module: str, rank: int, shapes: Mapping[str, tuple[int, ...]], tied: set[str]) -> None:
        name, key = f"{module}.weight", f"{PREFIX}{module}{A}"
        own = self._weights.shapes
        shape = shapes.get(name, ())  # (out, in)
        # A module that the base lacks has shape () and fits neither matrix.
        if own[key] != (rank, *shape[1:]) or own.get(f"{PREFIX}{module}{B}") != (*shape[:1], rank):
            raise self._misfit(key)
        # In training only one of the two uses changed; merged, the shared weight would change both.
        if name in tied:
            raise self._refused(name, _shared(name))
        self.pairs[name] = module

    def _add_stacks(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Find the parameter of each adapted stack: PEFT wraps a module once for each, the first one innermost."""
        targets = self._weights.folder.config.get("target_parameters") or []
        of_owner: dict[str, list[str]] = {}
        for name, shape in shapes.items():
            if len(shape) == 3 and any(_ends_with(name, target) for target in targets):
                of_owner.setdefault(name.rpartition(".")[0], []).append(name)
        for owner, names in of_owner.items():
            for depth, name in enumerate(reversed(names)):
                self.pairs[name] = owner + ".base_layer" * depth
        for module in self._weights.experts:
            key, own = f"{PREFIX}{module}{A}", self._weights.shapes
            name = next((name for name, found in self.pairs.items() if found == module), "")
            count, out, width = shapes.get(name, (0, 0, 0))
            rank = self._weights.ranks[module] * count
            if own[key] != (rank, width) or own.get(f"{PREFIX}{module}{B}") != (out, rank):
                raise self._misfit(key)

    def _add_whole(self, key: str, shapes: Mapping[str, tuple[int, ...]], quantized: set[str], tied: set[str]) -> None:
        name = key.removeprefix(PREFIX)
        # Trained whole, it replaces the base's weight, so name and shape must be the same.
        if shapes.get(name) != self._weights.shapes[key]:
            raise self._misfit(key)
        if name in tied:
            raise self._refused(name, _shared(name))
        if name in quantized:
            raise self._refused(name, "is quantized in training")
        self._replaced[name] = key

    def _misfit(self, key: str) -> UserInputError:
        return UserInputError(
            f"{self._source}: the adapter does not fit the base {self._base!r} ({key} has no place in it). Give the "
            "base it was trained on with --base."
        )

    def _refused(self, name: str, why: str) -> UserInputError:
        return UserInputError(f"{self._source}: {name} was trained and {why}. It cannot be merged here.")


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _without_base_layer(name: str) -> str:
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return name


def _check_kind(folder: AdapterFolder) -> None:
    used = beyond_merging(folder.config)
    if used:
        raise UserInputError(
            f"{folder.source}: only plain LoRA can be merged here (with rsLoRA, rank and alpha patterns, "
            f"modules_to_save), the adapter has {', '.join(used)}. Merge it with PEFT's merge_and_unload."
        )


def _shared(name: str) -> str:
    """Say who shares a weight: blocks (zamba), else the two that mostly do."""
    return "is shared by several blocks" if re.search(r"\.\d+\.", name) else "is shared by embedding and head"
