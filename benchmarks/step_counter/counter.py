"""What a training step asks of a device, counted operation by operation on the CPU.

`StepCounter` is a dispatch mode: inside it every operation that reaches a device is added up, views aside, as the bytes
of the tensors it reads and of those it writes, and as one launch. Together with it, storages that autograd keeps for
the backward pass, the most bytes alive at once, and places where the host would wait for the device.

What is not counted: what a cache saves (every read counts, as if from memory), the time of anything, an operation's
scratch memory inside itself, and operations of a foreign library that do not pass through torch's dispatcher.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_neft.fused import ops

from .regions import Region, Regions

# Kinds of work, each a line of its own: "other" is what fusion can save.
OTHER, BASE, ATTENTION, UNPACKING = "other", "base products", "attention", "unpacking"
KINDS = (OTHER, BASE, ATTENTION, UNPACKING)

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "_addmm_activation", "addmm_"}
# Memory is set aside or given another shape; nothing is read or written.
FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "detach_", "alias", "set_",
    "_unsafe_view", "_reshape_alias", "lift_fresh", "resize_", "is_same_size", "_has_compatible_shallow_copy_type",
    "sym_size", "sym_stride", "stride", "size",
}  # fmt: skip
# Operations whose result the host must have before it can go on.
WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim",
    "unique_consecutive", "item",
}  # fmt: skip
COPIES = {"_to_copy", "clone", "copy_", "t", "transpose", "view"}
# In-place operations that read nothing of what they overwrite.
OVERWRITES = {"zero_", "fill_", "copy_", "bernoulli_", "uniform_", "normal_", "random_", "exponential_"}
OURS = (
    "qlora_neft",
    "trl",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
)  # packages that a wait is named after
HOST_READS = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}


class StepCounter(TorchDispatchMode):
    """Count everything between its entry and its exit.

    Args:
        model: Its parameters, buffers and the scales of its NF4 weights are memory that is there anyway.
        lengths: Tokens of a sequence, and of a flattened micro-batch, each a number that divides no width: a tensor
            with two such dimensions holds scores of attention.
        as_on_cuda: Count a function of `qlora_neft.fused.ops` as one launch that reads its inputs and writes its
            outputs; otherwise whatever it runs here is counted.

    Attributes:
        bytes: Read and written, by kind.
        launches: By kind.
        kept: Bytes that autograd keeps for the backward pass, each storage once.
        kept_in_blocks: Those of them that decoder blocks keep and that grow with the tokens.
        peak: Most bytes alive at once in a decoder block, forward or backward, beyond those before the first one; only
            of tensors whose size is a multiple of the length.
        waits: Places where the host would wait for the device, by operation.
    """

    def __init__(self, model: nn.Module, lengths: Iterable[int] = (), *, as_on_cuda: bool = False) -> None:
        super().__init__()
        self.lengths, self.as_on_cuda = set(lengths), as_on_cuda
        self.bytes: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.waits_at: Counter[str] = Counter()  # the same, with the line that waits
        self.operations: Counter[tuple[str, str]] = Counter()  # launches by (kind, name), to see what they are
        self.bytes_of: Counter[tuple[str, str]] = Counter()
        self.kept = self.kept_in_blocks = self.peak = 0
        self._frozen = {_key(t) for t in model.parameters() if not t.requires_grad and t.dim() >= 2}
        self._packed = {_key(t) for t in _quantized(model)}
        own = [*model.parameters(), *model.buffers(), *_quantized(model)]
        self._own = {_key(t) for t in own}
        self._base: set[int] = set()  # unpacked base weights
        self._on_device = set(self._own)
        # Weak references keep an address from being used twice, and not the memory behind it.
        self._storages: dict[int, StorageWeakRef] = {}
        self._alive: list[tuple[StorageWeakRef, int]] = []
        self._of_numpy: dict[int, int] = {}  # storages that no operation made, with a hash of what was last read there
        self._saved: set[int] = set()
        self._saved_in_blocks: set[int] = set()
        self._regions, self._made_in = Regions(), {}
        self._blocks: list[range] = []  # autograd nodes of each pass through a decoder block
        self._in_block, self._before_blocks, self._first_node = 0, 0, 0
        self._before: set[int] = set()  # storages that were there before the first block
        self._block_inputs: set[int] = set()
        self._model, self._paused = model, False
        self._stack = ExitStack()

    def __enter__(self) -> StepCounter:
        """Begin to count."""
        super().__enter__()
        self._stack.enter_context(saved_tensors_hooks(self._keep, lambda tensor: tensor))
        self._stack.enter_context(_HostReads(self))
        for module in self._model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                self._stack.callback(module.register_forward_pre_hook(self._enter_block).remove)
                self._stack.callback(module.register_forward_hook(self._leave_block, always_call=True).remove)
        if self.as_on_cuda:
            ops.observer = self._observe
            self._stack.callback(setattr, ops, "observer", None)
        return self

    def __exit__(self, *error: Any) -> None:
        """Count no more."""
        self._stack.close()
        super().__exit__(*error)

    # ---- Operations ----

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count it."""
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        name = _name(func)
        # What is overwritten is not read, nor is a sum that a product begins anew.
        unread = name in OVERWRITES or (name in ("addmm_", "addmm", "baddbmm_") and kwargs.get("beta", 1) == 0)
        reads = inputs[1:] if unread else inputs
        self._count(name, inputs, outputs, reads=reads, written=_mutated(func, args, kwargs))
        return result

    def _observe(self, name: str, run: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Count a function of the fast path as one launch."""
        if self._paused:
            return run(*args, **kwargs)
        inputs = [tensor for value in (args, kwargs) for tensor in _tensors_in(value)]
        self._paused = True
        try:
            result = run(*args, **kwargs)
        finally:
            self._paused = False
        self._count(name, inputs, list(_tensors_in(result)), reads=inputs, written=inputs[: name.endswith("_")])
        return result

    def _count(
        self, name: str, inputs: list[Tensor], outputs: list[Tensor], *, reads: list[Tensor], written: list[Tensor]
    ) -> None:
        region = None
        if self.as_on_cuda:
            region = self._regions.current(makes_node=any(tensor.requires_grad for tensor in inputs))
        read = {id(tensor) for tensor in reads}
        for tensor in inputs:
            self._meet(tensor, made=self._leave_region(tensor, region) or id(tensor) not in read)
        self._wait(name, inputs)
        known = {_key(tensor) for tensor in inputs}
        device = not known.isdisjoint(self._on_device)
        kind = self._kind(name, inputs, outputs)
        for tensor in outputs:
            if region is None:
                self._meet(tensor, made=True)
            if device:
                self._on_device.add(_key(tensor))
            if kind == UNPACKING:
                self._base.add(_key(tensor))
        self._look_at_memory()
        if name in FREE or self._is_view(inputs, outputs, written):
            return
        for tensor in reads:
            if tensor.dim():
                self._read_of_numpy(tensor)
        if region is not None:
            self._count_in(region, reads, outputs)
            return
        touched = sum(_touched(t) for t in reads) + sum(_touched(t) for t in [*outputs, *_new(written, outputs)])
        self._add(kind, name, 1, touched)

    def _read_of_numpy(self, tensor: Tensor) -> None:
        """Count what NumPy has written since the last read; its memory is used again, and only the content tells."""
        key = _key(tensor)
        if key in self._of_numpy:
            content = hash(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
            if content != self._of_numpy[key]:
                self._of_numpy[key] = content
                self._add(OTHER, "written by NumPy", 1, _touched(tensor))

    def _add(self, kind: str, name: str, launches: int, touched: int) -> None:
        self.bytes[kind] += touched
        self.launches[kind] += launches
        self.bytes_of[kind, name] += touched
        self.operations[kind, name] += launches

    # ---- Calls that are one kernel on CUDA ----

    def _count_in(self, region: Region, reads: list[Tensor], outputs: list[Tensor]) -> None:
        """Count what a call reads from outside; what it makes counts when somebody outside reads it."""
        if not region.read and not region.made:
            self._add(OTHER, region.name, 1, 0)
        for tensor in reads:
            key = _key(tensor)
            if key not in region.made and key not in region.read:
                region.read.add(key)
                self._add(OTHER, region.name, 0, _touched(tensor))
        for tensor in outputs:
            key = _key(tensor)
            if key not in region.read:
                region.made[key] = max(region.made.get(key, 0), _touched(tensor))
                self._made_in[key] = region

    def _leave_region(self, tensor: Tensor, now: Region | None) -> bool:
        """Count a tensor as written by the call that made it if something else reads it; whether a call made it."""
        region = self._made_in.get(_key(tensor))
        if region is not None and region is not now:
            del self._made_in[_key(tensor)]
            self._add(OTHER, region.name, 0, region.made[_key(tensor)])
        return region is not None

    # ---- What an operation is ----

    def _is_view(self, inputs: list[Tensor], outputs: list[Tensor], written: list[Tensor]) -> bool:
        if written or not outputs:
            return not written and not outputs and not inputs
        known = {_key(tensor) for tensor in inputs}
        return all(_key(tensor) in known for tensor in outputs)

    def _kind(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> str:
        if "4bit" in name or "blockwise" in name:
            return BASE if "gemm" in name or "gemv" in name else UNPACKING
        known = [_key(tensor) for tensor in inputs]
        if name in PRODUCTS and any(key in self._base or key in self._frozen for key in known):
            return BASE
        if "attention" in name or any(self._is_scores(tensor) for tensor in (*inputs, *outputs)):
            return ATTENTION
        # Double quantization: the scales are unpacked first; and a weight may be unpacked to another dtype.
        packed = any(key in self._packed for key in known)
        return UNPACKING if packed or (name in COPIES and any(key in self._base for key in known)) else OTHER

    def _is_scores(self, tensor: Tensor) -> bool:
        return sum(size in self.lengths for size in tensor.shape) >= 2

    # ---- Storages ----

    def _meet(self, tensor: Tensor, *, made: bool = False) -> None:
        """Note a storage; one that is read and that no operation made is NumPy's to write."""
        key = _key(tensor)
        if key in self._storages or key in self._own:
            return
        storage = tensor.untyped_storage()
        self._storages[key] = StorageWeakRef(storage)
        # Weights in another dtype, and their gradients, do not grow with the tokens; nor does memory that NumPy fills,
        # which is there for the largest model of the process.
        if made and any(storage.nbytes() % length == 0 for length in self.lengths):
            self._alive.append((self._storages[key], storage.nbytes()))
        if not made:
            self._of_numpy[key] = 0

    def _keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd saves, by its whole storage, which stays alive with it."""
        key = _key(tensor)
        inside = self._made_in.get(key)
        if inside is not None and inside is self._regions.current(makes_node=False):
            return tensor  # the one kernel keeps nothing of its own
        if self._paused or key in self._own or key in self._base:
            return tensor
        self._meet(tensor, made=True)
        size = tensor.untyped_storage().nbytes()
        if (
            self._in_block
            and (key not in self._before or key in self._block_inputs)
            and key not in self._saved_in_blocks
        ):
            self._saved_in_blocks.add(key)
            self.kept_in_blocks += size if any(size % length == 0 for length in self.lengths) else 0
        if key not in self._saved:
            self._saved.add(key)
            self.kept += size
        return tensor

    def keep_contexts(self, loss: Tensor) -> None:
        """Count what autograd functions keep on their contexts beside ``save_for_backward``.

        Args:
            loss: Its graph is walked; call between the forward and the backward pass.
        """
        assert loss.grad_fn is not None
        seen, queue = set(), [loss.grad_fn]
        while queue:
            node = queue.pop()
            if node in seen:
                continue
            seen.add(node)
            self._in_block = int(any(node._sequence_nr() in nodes for nodes in self._blocks))
            queue += [following for following, _ in node.next_functions if following is not None]
            for value in list(getattr(node, "__dict__", {}).values()):
                for tensor in _tensors_in(value):
                    self._keep(tensor)
        self._in_block = 0

    # ---- Memory ----

    def _look_at_memory(self) -> None:
        """Note the memory in use if a decoder block, forward or backward, is under way."""
        self._alive = [(storage, size) for storage, size in self._alive if not storage.expired()]
        if self._in_block or self._is_backward_of_a_block():
            self.peak = max(self.peak, self._in_use() - self._before_blocks)

    def _in_use(self) -> int:
        return sum(size for storage, size in self._alive if not storage.expired())

    def _is_backward_of_a_block(self) -> bool:
        node = torch._C._current_autograd_node()
        return node is not None and any(node._sequence_nr() in nodes for nodes in self._blocks)

    def _enter_block(self, module: nn.Module, args: tuple) -> None:
        if not self._blocks and not self._in_block:
            self._before_blocks, self._before = self._in_use(), set(self._storages)
        self._block_inputs.update(_key(tensor) for tensor in args[:1] if isinstance(tensor, Tensor))
        self._in_block += 1
        self._first_node = torch._C._autograd._get_sequence_nr()

    def _leave_block(self, *hook_arguments: Any) -> None:
        self._in_block -= 1
        self._blocks.append(range(self._first_node, torch._C._autograd._get_sequence_nr()))

    # ---- Waiting ----

    def _wait(self, name: str, inputs: list[Tensor]) -> None:
        masks = [t for t in inputs[1:] if t.dtype in (torch.bool, torch.uint8)]
        by_mask = name in ("index", "index_put_", "_index_put_impl_", "index_put", "_unsafe_index") and bool(masks)
        if (name in WAITS or by_mask) and any(_key(tensor) in self._on_device for tensor in inputs):
            self._waited(f"{name} of a mask" if by_mask else name)

    def read_by_host(self, name: str, tensor: Tensor) -> None:
        """Count a tensor of the device that Python reads."""
        if _key(tensor) in self._on_device:
            self._waited(name)

    def _waited(self, name: str) -> None:
        self.waits[name] += 1
        self.waits_at[f"{name} in {_place()}"] += 1

    def on_device(self, tensors: Any) -> None:
        """Say that tensors, in whatever nest of containers, have been moved to the device."""
        for leaf in tree_leaves(tensors):
            if isinstance(leaf, Tensor):
                self._meet(leaf, made=True)
                self._on_device.add(_key(leaf))


class _HostReads(TorchFunctionMode):
    """Sees the ways of reading a tensor that pass no dispatcher on a CPU."""

    def __init__(self, counter: StepCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in HOST_READS and not self.counter._paused:
            self.counter.read_by_host(func.__name__, args[0])
        return func(*args, **(kwargs or {}))


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _place() -> str:
    """Return the innermost line of a package that has to do with training."""
    for frame in reversed(traceback.extract_stack(limit=40)):
        path = Path(frame.filename)
        package = next((part for part in reversed(path.parts) if part in OURS), None)
        if package is not None:
            return f"{package}: {path.name}:{frame.lineno} {frame.name}"
    return "elsewhere"


def _name(func: Any) -> str:
    return func._schema.name.split("::")[-1]


def _mutated(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    found = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return found


def _new(written: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
    known = {_key(tensor) for tensor in outputs}
    return [tensor for tensor in written if _key(tensor) not in known]


def _touched(tensor: Tensor) -> int:
    """Bytes of a tensor as it is stored: a dimension that is only repeated (stride 0) is read once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()


def _quantized(model: nn.Module) -> list[Tensor]:
    """Return the packed NF4 weights of a model and everything they are unpacked with."""
    found = []
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            found.append(parameter.data)
            found += [t for t in (state.absmax, state.code, state.offset) if isinstance(t, Tensor)]
            if state.state2 is not None:
                found += [state.state2.absmax, state.state2.code]
    return found


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.parameters()
        yield from _quantized(value)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors_in([getattr(value, field.name) for field in dataclasses.fields(value)])
