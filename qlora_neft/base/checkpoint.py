"""The weights of a causal language model on disk: read one tensor at a time, written shard by shard."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from bitsandbytes.nn import Params4bit
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from ..errors import UserInputError
from ..files import write_json
from .config import check_base_config
from .experts import expert_modules, expert_weights
from .model_files import INDEX, SINGLE, file_in, file_on_hub, tensor_files
from .nf4 import from_nf4
from .text_part import CausalModel, causal_model

STATE = ".quant_state.bitsandbytes__nf4"  # follows the name of a weight stored in NF4


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model of a configuration without weights: parameters on the meta device, buffers computed."""
    config = copy.deepcopy(config)
    # Of a text part that a checkpoint stores quantized, both configurations say so.
    for one in (config, config.get_text_config()):
        if hasattr(one, "quantization_config"):
            del one.quantization_config
    causal = causal_model(config) or CausalModel(AutoModelForCausalLM, config)  # else one that brings its own code
    with init_empty_weights(include_buffers=False), _LargeOnMeta():
        return causal.build(dtype=torch.float32).eval()


class _LargeOnMeta(TorchFunctionMode):
    """Makes what can only be a stack of experts on the meta device at once.

    accelerate moves a parameter there when a module gets it, so it is allocated first: 30 GB for a layer of
    DeepSeek-V3, which a machine may refuse, or fill with zeros for minutes. Buffers, which must have their values, are
    smaller.
    """

    FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.randn, torch.rand)
    NUMBERS = 2**24

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.FACTORIES and kwargs.get("device") is None:
            shape = args[0] if args and isinstance(args[0], (tuple, list)) else args
            if len(shape) == 3 and math.prod(shape) >= self.NUMBERS:
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


class Checkpoint:
    """The safetensors files of a causal language model.

    A tensor is read only when it is asked for, and its file is closed again, so that nothing stays in memory.

    Args:
        folder: Folder of ``model.safetensors`` or its shards.
        config: The model's configuration.
        source: The model's name in messages.

    Attributes:
        folder: As given.
        model: The model without weights; its parameter names are those used here.
        key_of: Name of each parameter in the files; a tied parameter that is not stored has its twin's.
        shapes: Shape of each parameter.
        stored_nf4: Parameters stored in NF4.
        transposed: Parameters of shape (in, out), the other way round than a linear layer's: GPT-2's Conv1D.
        buffers: Names in the files of the model's buffers, which a checkpoint may store as well.
        stacks: Parameters that hold the experts of a layer, and the tensors of the files that they are made of: for
            each projection in it, one of each expert. Empty for a stack that is stored as one tensor.
        turned_stacks: Those of them whose matrices are (in, out).
        dtype: Dtype that unquantized weights are loaded in: the configuration's, else that of the first stored weight.

    Raises:
        UserInputError: If there are no such files, or they do not hold the model's parameters one by one.
    """

    def __init__(self, folder: Path, config: PreTrainedConfig, source: str) -> None:
        self.folder, self.source = folder, source
        files = tensor_files(source, file_in(folder))
        self._file_of = {key: folder / name for key, name in files.items()}
        # A missing shard shows now, not in the middle of a merge.
        for name in sorted(set(files.values())):
            if not (folder / name).is_file():
                raise _missing(source, name)
        self.model = skeleton(config)
        causal = causal_model(config)
        self._key_mapping = dict(causal.key_mapping) if causal else {}
        # remove_duplicate=False: tied parameters under each of their names.
        self.shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters(remove_duplicate=False)}
        modules = self.model.named_modules()
        self.transposed = frozenset(f"{name}.weight" for name, m in modules if isinstance(m, Conv1D))
        self.buffers: dict[str, str] = {}
        self.stacks: dict[str, list[list[str]]] = {
            f"{prefix}.{own}": [] for prefix, module in expert_modules(self.model) for own in expert_weights(module)
        }
        self.turned_stacks = frozenset(
            f"{prefix}.{own}"
            for prefix, module in expert_modules(self.model)
            for own in expert_weights(module)
            if getattr(module, "is_transposed", False)  # as PEFT reads them, by which the update is laid out
        )
        self.key_of = self._names()
        self.stored_nf4 = {name for name, key in self.key_of.items() if key + STATE in self._file_of}
        self.dtype = getattr(config, "dtype", None) or self._first_dtype()

    def parameters(self) -> dict[str, str]:
        """Return the stored parameters and their names in the files, tied ones once, in the model's order."""
        # Reversed, so that of tied parameters the first in the model's order keeps the key.
        stored = {key: name for name, key in reversed(self.key_of.items())}
        return {name: key for name, key in self.key_of.items() if stored[key] == name}

    def others(self) -> list[str]:
        """Return the stored tensors that are no parameters, by their names in the files: towers, buffers."""
        own = {*self.key_of.values(), *(key for keys in self.stacks.values() for part in keys for key in part)}
        # The constants of a weight in NF4 belong to it.
        parts = {f"{self.key_of[name]}." for name in self.stored_nf4}
        return [key for key in self._file_of if key not in own and not key.startswith(tuple(parts))]

    def other(self, key: str) -> Tensor:
        """Read a tensor of `others`, in the dtype it is stored in."""
        with self._opened(key) as file:
            return file.get_tensor(key)

    def weight(self, name: str) -> Tensor:
        """Read a parameter as it is loaded: in ``dtype``; one stored in NF4 is dequantized to float32."""
        if name in self.stored_nf4:
            weight = from_nf4(self.packed(name))  # NF4 holds every weight as a linear layer's, (out, in)
            return weight.T.contiguous() if name in self.transposed else weight
        if parts := self.stacks.get(name):
            projections = [torch.stack([self.other(key) for key in keys]) for keys in parts]  # (experts, out, in) each
            return torch.cat(projections, dim=1).to(self.dtype)
        key = self.key_of[name]
        with self._opened(key) as file:
            return file.get_tensor(key).to(self.dtype)

    def pieces(self, name: str, weight: Tensor | Params4bit) -> Iterator[tuple[str, Tensor | Params4bit]]:
        """Split a parameter into the tensors that the files hold it as, with their names there."""
        parts = self.stacks.get(name)
        if not parts:
            yield self.key_of[name], weight
            return
        for keys, projection in zip(parts, weight.chunk(len(parts), dim=1), strict=True):
            yield from zip(keys, projection.unbind(0), strict=True)

    def packed(self, name: str) -> Params4bit:
        """Read a parameter stored in NF4 as its bytes and their quantization state."""
        key = self.key_of[name]
        parts = {}
        # Beside the bytes lie absmax, the code book and the packed state, each a tensor of its own.
        for part in [k for k in self._file_of if k.startswith(f"{key}.")]:
            with self._opened(part) as file:
                parts[part.removeprefix(f"{key}.")] = file.get_tensor(part)
        with self._opened(key) as file:
            return Params4bit.from_prequantized(file.get_tensor(key), parts, device="cpu")

    def _opened(self, key: str) -> Any:
        path = self._file_of[key]
        try:
            return safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            raise UserInputError(f"{self.source}: {path.name} cannot be read ({error}). Fetch it again.") from error

    def _first_dtype(self) -> torch.dtype:
        key = next(key for name, key in self.parameters().items() if name not in self.stored_nf4)
        with self._opened(key) as file:
            return file.get_tensor(key).dtype

    def _names(self) -> dict[str, str]:
        """Match parameters with stored tensors by the rules that transformers loads with."""
        transforms = get_model_conversion_mapping(self.model, self._key_mapping)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        state, found = self.model.state_dict(), {}
        parts: dict[str, dict[str, list[str]]] = {}
        for key in sorted(self._file_of, key=dot_natural_key):  # experts in the order of their numbers
            name, converted = rename_source_key(key, renamings, converters, self.model.base_model_prefix, state)
            # A converter joins or splits tensors while loading; of those, a stack of experts is understood here.
            if converted is not None and key not in state:
                converter = next(c for c in converters if converted in c.source_patterns)
                if name in self.stacks and _stacks_experts(converter):
                    order = {pattern: list[str]() for pattern in converter.source_patterns}
                    parts.setdefault(name, order)[converted].append(key)
                    continue
                raise UserInputError(
                    f"{self.source}: {type(self.model).__name__} keeps its weights in another form than its files "
                    f"({key} is part of {name}). Such a model cannot be merged here."
                )
            # A rule for old checkpoints may match a name that is right already.
            name = key if key in state and name not in state else name
            if name in state:
                found[name] = key
        for name, of_stack in parts.items():
            self.stacks[name] = list(of_stack.values())
            found[name] = self.stacks[name][0][0]
        self._add_tied(found)
        missing = sorted(set(state) - set(found))
        if missing:
            raise UserInputError(
                f"{self.source}: its files lack {len(missing)} of the model's tensors, among them {missing[0]}. A base "
                "must be complete."
            )
        self.buffers = {name: key for name, key in found.items() if name not in self.shapes}
        return {name: found[name] for name in self.shapes}

    def _add_tied(self, found: dict[str, str]) -> None:
        """Add tied parameters whose twin is stored; the configuration says which are tied."""
        for name, other in self.model.all_tied_weights_keys.items():
            # Either of the two may be the stored one.
            for one, two in ((name, other), (other, name)):
                if one not in found and two in found:
                    found[one] = found[two]


def _stacks_experts(converter: WeightConverter) -> bool:
    """Whether a converter stacks one tensor of each expert, and joins the projections along their rows."""
    stack, *rest = converter.operations
    joins = [type(op) is Concatenate and op.dim == 1 for op in rest]
    return type(stack) is MergeModulelist and stack.dim == 0 and joins in ([], [True])


class ShardWriter:
    """Collects tensors and writes them whenever a shard is full.

    Args:
        folder: Folder to write to.
        max_bytes: Maximum size of a shard; a larger tensor gets a shard of its own.
        wrote: Called with the number of bytes written so far.
    """

    def __init__(self, folder: Path, max_bytes: int, wrote: Callable[[int], None]) -> None:
        self.folder, self.max_bytes, self.wrote = folder, max_bytes, wrote
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, key: str, weight: Tensor | Params4bit) -> None:
        """Add a weight; one in NF4 is stored with its constants in the same shard."""
        parts = {key: weight.detach().contiguous()}
        if isinstance(weight, Params4bit):
            state = weight.quant_state.as_dict(packed=True)
            parts = {key: weight.data} | {f"{key}.{name}": part for name, part in state.items()}
        if self._pending and _size(self._pending) + _size(parts) > self.max_bytes:
            self._flush()
        self._pending |= parts

    def close(self) -> None:
        """Write the last shard, and the index if there is more than one."""
        self._flush()
        count = len(self._shards)
        # A shard's name holds their number, known only now: until here they are drafts.
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for i, name in enumerate(names):
            self._draft(i).rename(self.folder / name)
        if count > 1:
            where = {key: name for name, keys in zip(names, self._shards, strict=True) for key in keys}
            metadata = {"total_size": self.total_bytes}
            write_json(self.folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(where.items()))})

    def _flush(self) -> None:
        # The metadata that save_pretrained writes; transformers 4 refuses a file without it.
        save_file(self._pending, self._draft(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self.total_bytes += _size(self._pending)
        self._pending = {}
        self.wrote(self.total_bytes)

    def _draft(self, i: int) -> Path:
        return self.folder / f"shard-{i}.part"


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def read_embedding(name_or_path: str, *, revision: str | None = None) -> Tensor:
    """Read the input embedding of a causal language model.

    Only the shard that holds it is read, or downloaded from the Hub.

    Args:
        name_or_path: Hub id or directory.
        revision: Hub branch, tag or commit.

    Returns:
        The table (V, D), in its stored dtype, on the CPU.

    Raises:
        UserInputError: If there is no such model, no safetensors file, or no such tensor in it.
    """
    name, shape = _name_and_shape(name_or_path, revision)
    folder = Path(name_or_path).expanduser()
    find = file_in(folder) if folder.is_dir() else file_on_hub(name_or_path, revision)
    files = tensor_files(name_or_path, find)
    key = _stored_name(name, files, name_or_path)
    path = find(files[key])
    if path is None:
        raise _missing(name_or_path, files[key])
    try:
        with safe_open(path, framework="pt") as tensors:
            table = tensors.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise UserInputError(f"{name_or_path}: {path.name} cannot be read ({error}).") from error
    if not table.is_floating_point() or table.dim() != 2 or table.shape[1] != shape[1]:
        raise UserInputError(
            f"{name_or_path}: {key} must be a table of {shape[1]} floating-point columns, it is "
            f"{tuple(table.shape)} of {table.dtype}. Start from the original 16-bit checkpoint."
        )
    return table


def _name_and_shape(name_or_path: str, revision: str | None) -> tuple[str, torch.Size]:
    """Return name and shape of the embedding in this architecture; the model is built without memory for weights."""
    config = check_base_config(name_or_path, **({"revision": revision} if revision else {}))
    # Names differ between architectures, so the model itself is asked.
    model = skeleton(config)
    weight = model.get_input_embeddings().weight
    name, table = next((name, param) for name, param in model.named_parameters() if param is weight)
    return name, table.shape


def _stored_name(name: str, files: Mapping[str, str], source: str) -> str:
    """Return the name in the files: old ones lack the outermost module's name, multimodal ones order it otherwise."""
    if name in files:
        return name
    # Module and parameter, such as embed_tokens.weight: the part that all spellings share.
    ending = ".".join(name.split(".")[-2:])
    found = [key for key in files if key == ending or key.endswith(f".{ending}")]
    if len(found) != 1:
        raise UserInputError(
            f"{source}: the checkpoint must hold one input embedding, {name}; it holds {', '.join(found) or 'none'}."
        )
    return found[0]


def _missing(source: str, name: str) -> UserInputError:
    return UserInputError(f"{source}: {INDEX} names {name}, which is not there. Fetch the base again.")
