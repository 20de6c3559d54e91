"""Whether an adapter's file is whole and belongs to its base, by names and shapes alone. No torch.

PEFT only warns where names do not match, and the base answers in the adapter's place. What is found here is the likely
cause; that every tensor was used is checked once more on the loaded model (`.load.with_adapter`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..base.model_files import StoredTensor, tensors_at_hand
from ..errors import UserInputError
from .folder import MEND, AdapterFolder
from .weights import EMBEDDING_A, EMBEDDING_B, PREFIX, A, AdapterWeights, B

# Parts of names that wrappers add, and what to do about each. The wrapped model saves them, PEFT does not know them.
WRAPPERS = {
    "_orig_mod": "torch.compile wraps the model: save the one inside it, model._orig_mod.save_pretrained",
    "module": "DistributedDataParallel or DeepSpeed wraps the model: save the one inside it, model.module",
    "_fsdp_wrapped_module": "FSDP wraps the model: save a full state dict of the one inside it",
    "_checkpoint_wrapped_module": "a checkpoint wrapper is around the blocks: take it off before saving",
}
# Leading parts that differ between a checkpoint's names and the model's.
_OUTER = {"model", "language_model", "text_model", "transformer", "base_model"}
_EMBEDDINGS = {"embed_tokens", "wte", "embed_in", "word_embeddings", "lm_head", "embed_out", "output", "embedding"}


@dataclass(frozen=True)
class BaseNames:
    """What is known of the base without loading it.

    Attributes:
        tensors: Headers of its safetensors files by name; empty if they are not on this machine.
        rows: Rows of its embedding by the configuration, None if that is not known.
        num_layers: Number of blocks if all of them have the same layers, else None.
    """

    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    rows: int | None = None
    num_layers: int | None = None


def check_names(folder: AdapterFolder) -> None:
    """Refuse an adapter that is not whole, or not of its base, before any weight is loaded.

    Raises:
        UserInputError: With the likely cause.
    """
    reason = fault_of(AdapterWeights(folder), base_names(folder))
    if reason is not None:
        raise UserInputError(f"{folder.source}: {reason}")


def base_names(
    folder: AdapterFolder, config: Mapping[str, Any] | None = None, num_layers: int | None = None
) -> BaseNames:
    """Return what this machine knows of the base.

    Args:
        folder: The adapter.
        config: The base's ``config.json``, if the caller has read it.
        num_layers: As in `BaseNames`, if the caller knows.
    """
    if folder.own_base is None and folder.recorded_base is None:
        return BaseNames()
    tensors = tensors_at_hand(folder.base, folder.base_revision) or {}
    text = (config or {}).get("text_config") or config or {}
    return BaseNames(tensors, text.get("vocab_size"), num_layers)


def fault_of(weights: AdapterWeights, base: BaseNames) -> str | None:
    """Return what is wrong with an adapter's file and what to do, None if nothing can be seen from its names."""
    names = weights.shapes
    return (
        _spoiled_names(names)
        or _resized(weights, base)
        or _halves(weights)
        or _other_base(weights, base)
        or _missing_layers(weights, base)
    )


def cause_of(names: Iterable[str]) -> str | None:
    """Return why names are not PEFT's, None if they are."""
    return _spoiled_names(list(names))


# ---- Names ----


def _spoiled_names(names: Iterable[str]) -> str | None:
    names = list(names)
    if not names:
        return f"its file holds no weights. {MEND}"
    for wrapper, cause in WRAPPERS.items():
        # In the base's own names a part "module" could stand further in; a wrapper's stands in front or after PREFIX.
        spoiled = [name for name in names if wrapper in _outer_parts(name, anywhere=wrapper != "module")]
        if spoiled:
            return (
                f"{len(spoiled)} of its {len(names)} weights have {wrapper!r} in their names ({spoiled[0]}), so that "
                f"PEFT would leave them out and the base would answer. {cause}; or remove it from the names."
            )
    named = [name for name in names if re.search(r"\.lora_(A|B|embedding_A|embedding_B)\.\w+\.weight$", name)]
    if named:
        return (
            f"its weights hold the name of an adapter ({named[0]}): they are a state_dict, not what save_pretrained "
            "writes. Save it again with save_pretrained, or remove that part from the names."
        )
    bare = [name for name in names if not name.startswith(PREFIX)]
    if bare:
        return (
            f"{len(bare)} of its {len(names)} weights lack {PREFIX!r}, which PEFT puts before every name ({bare[0]}), "
            "so that PEFT would leave them out and the base would answer. Save it again with PEFT's save_pretrained, "
            "or put it before the names."
        )
    return None


def _outer_parts(name: str, *, anywhere: bool) -> list[str]:
    parts = name.split(".")
    if anywhere:
        return parts
    return [parts[0], *name.removeprefix(PREFIX).split(".")[:1]]


def _halves(weights: AdapterWeights) -> str | None:
    """Find matrices without their twin, and twins of different rank."""
    shapes = weights.shapes
    for a, b in ((A, B), (EMBEDDING_A, EMBEDDING_B)):
        ends = {end: {n.removesuffix(end) for n in shapes if n.endswith(end)} for end in (a, b)}
        alone = sorted(ends[a] ^ ends[b])
        if alone:
            there = a if alone[0] in ends[a] else b
            return (
                f"{len(alone)} modules have only one of the two matrices, among them {alone[0].removeprefix(PREFIX)} "
                f"(only {there[1:].removesuffix('.weight')}). The file is not whole. {MEND}"
            )
        for stem in sorted(ends[a]):
            if len(shapes[stem + a]) == 2 and shapes[stem + a][0] != shapes[stem + b][1]:
                return (
                    f"{stem.removeprefix(PREFIX)} has a lora_A of rank {shapes[stem + a][0]} and a lora_B of rank "
                    f"{shapes[stem + b][1]}. {MEND}"
                )
    return None


# ---- Against the base ----


def _resized(weights: AdapterWeights, base: BaseNames) -> str | None:
    """Find weights with more or fewer rows than the base has tokens."""
    for name, shape in weights.shapes.items():
        stem = re.sub(r"\.(weight|lora_[AB]\.weight|lora_embedding_[AB])$", "", name.removeprefix(PREFIX))
        if stem.rsplit(".", 1)[-1] not in _EMBEDDINGS or len(shape) != 2 or name.endswith((A, EMBEDDING_B)):
            continue
        rows = shape[1] if name.endswith(EMBEDDING_A) else shape[0]
        stored = _twin(stem, base.tensors)
        known = stored.shape[0] if stored is not None and len(stored.shape) == 2 else base.rows
        if known is not None and rows != known:
            change = f"{rows - known} tokens were added" if rows > known else f"it lost {known - rows} rows"
            return (
                f"the vocabulary was resized in training: its {stem} has {rows} rows, the base's {known} ({change}). "
                "It fits no model of the base's size, and cannot be loaded, merged or converted here. In Python: "
                f"base.resize_token_embeddings({rows}), then PeftModel.from_pretrained; or train without new tokens."
            )
    return None


def _twin(stem: str, tensors: Mapping[str, StoredTensor]) -> StoredTensor | None:
    """Return the base's weight of a module, whatever its files call the modules around it."""
    if f"{stem}.weight" in tensors:
        return tensors[f"{stem}.weight"]
    inner = _inner(stem)
    return next((t for name, t in tensors.items() if name.endswith(".weight") and _inner(name[:-7]) == inner), None)


def _inner(name: str) -> str:
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _OUTER:
        parts = parts[1:]
    return ".".join(parts)


def _other_base(weights: AdapterWeights, base: BaseNames) -> str | None:
    """Find modules whose weight has another shape in the base."""
    inner = {_inner(name[:-7]): tensor for name, tensor in base.tensors.items() if name.endswith(".weight")}
    for module in weights.ranks:
        tensor = inner.get(_inner(module))
        if tensor is None or len(tensor.shape) != 2 or tensor.dtype == "U8":  # U8: packed NF4, whose shape says nothing
            continue
        ours = (weights.shapes[f"{PREFIX}{module}{B}"][0], weights.shapes[f"{PREFIX}{module}{A}"][1])
        # GPT-2 stores its weights (in, out).
        if ours not in (tensor.shape, tensor.shape[::-1]):
            return (
                f"the adapter does not fit the base {weights.folder.base!r}: it was trained on {ours[1]} inputs and "
                f"{ours[0]} outputs of {module}, whose weight is {' x '.join(map(str, tensor.shape))} there. Give the "
                "base it was trained on with --base."
            )
    theirs = _indices(name[:-7] for name in base.tensors if name.endswith(".weight"))
    # A block that has other layers may share this one with another block, whose copy alone is stored (zamba).
    blocks = {index.split(".")[0] for indices in theirs.values() for index in indices}
    for kind, indices in _indices(weights.ranks).items():
        beyond = [i for i in sorted(indices - theirs[kind]) if i.split(".")[0] not in blocks] if kind in theirs else []
        if beyond:
            return (
                f"the adapter does not fit the base {weights.folder.base!r}, which has no {kind} in block {beyond[0]}. "
                "Give the base it was trained on with --base."
            )
    return None


def _missing_layers(weights: AdapterWeights, base: BaseNames) -> str | None:
    """Find layers that the configuration names, that the base has, and that the file lacks."""
    config = weights.folder.config
    if any(config.get(key) for key in ("layers_to_transform", "exclude_modules", "layers_pattern")):
        return None  # fewer layers may be meant; the loaded model decides
    targets = config.get("target_modules")
    if not targets:
        return None
    ours = _indices(weights.ranks)
    theirs = _indices(n[:-7] for n, t in base.tensors.items() if n.endswith(".weight") and len(t.shape) == 2)
    if base.num_layers is not None:
        theirs = {kind: {str(i) for i in range(base.num_layers)} for kind in ours if kind.count("*") == 1} | theirs
    wanted = {kind: indices for kind, indices in theirs.items() if kind in ours or _is_left_out(kind, ours, targets)}
    names = [
        re.sub(r"\*", "{}", kind).format(*index.split("."))
        for kind, indices in wanted.items()
        for index in sorted(indices - ours.get(kind, set()), key=lambda text: [int(part) for part in text.split(".")])
    ]
    missing = [name for name in names if isinstance(targets, str) or _is_target(name, targets)]
    if not missing:
        return None
    return (
        f"{len(weights.ranks)} of {len(weights.ranks) + len(missing)} layers are in its file, {missing[0]} is not: it "
        f"holds a part of an adapter, and the base would answer in the other layers. {MEND}"
    )


def _is_left_out(kind: str, ours: Mapping[str, set[str]], targets: Any) -> bool:
    """Whether a kind of layer is a target that the file has in no layer, in the blocks where it has others."""
    if kind.count("*") != 1 or not isinstance(targets, list) or not _is_target(kind, targets):
        return False  # of experts the files hold each one, the model may hold them as one tensor
    blocks = {name.split("*")[0] for name in ours}
    last = kind.rpartition(".")[2]
    return kind.split("*")[0] in blocks and not any(name.rpartition(".")[2] == last for name in ours)


def _is_target(name: str, targets: Iterable[str]) -> bool:
    """Whether PEFT matches a module with one of a list of targets, whatever stands before the blocks."""
    return any(name == target or name.endswith(f".{target}") or target.endswith(f".{name}") for target in targets)


def _indices(modules: Iterable[str]) -> dict[str, set[str]]:
    """Group modules that differ only in numbers: from ``layers.*.mlp.up_proj`` to the numbers that occur."""
    found: dict[str, set[str]] = defaultdict(set)
    for module in modules:
        name = _inner(module)
        found[re.sub(r"(?<=\.)\d+(?=\.)", "*", name)].add(".".join(re.findall(r"(?<=\.)\d+(?=\.)", name)))
    return found
