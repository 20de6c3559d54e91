"""Fused experts in NF4: transformers keeps the experts of a layer as one 3-D parameter, which bitsandbytes passes over.

Each expert's matrix is quantized by itself, to the bytes that a linear layer of its own would have. The packed bytes of
a layer are one parameter under its old name, (experts, bytes); the constants beside it are buffers, so that they move
with the module. In a forward pass the experts in use are dequantized one at a time, and again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from bitsandbytes.functional import QuantState, quantize_4bit
from torch import Tensor, nn

from .expert_names import DOWN, UP_NAMES
from .unpack import unpacked

BLOCK, SECOND_BLOCK = 64, 256  # numbers that share a constant, as in `Linear4bit`
# Set on an experts module by transformers' `use_experts_implementation`: how its 3-D parameters are to be read.
DECLARED = ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate")


@dataclass(frozen=True)
class Layout:
    """How the experts of a module are to be read.

    Attributes:
        has_gate: Whether the first matrix holds gate and up projection.
        has_bias: Whether there are biases, (experts, out).
        turned: Whether matrices are (in, out), not (out, in).
        is_routed: Whether the module is told which expert each token goes to; else every expert sees every token,
            weighted before, which is how Llama 4 is written.
    """

    has_gate: bool = True
    has_bias: bool = False
    turned: bool = False
    is_routed: bool = True


OF_CLASS = {"Llama4TextExperts": Layout(turned=True, is_routed=False)}  # classes that declare nothing


def layout_of(module: nn.Module) -> Layout | None:
    """Return how the experts of a module are to be read, None if that is not known."""
    if all(hasattr(module, name) for name in DECLARED):
        own = cast(Any, module)
        return Layout(own.has_gate, own.has_bias, own.is_transposed)
    return next((OF_CLASS[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in OF_CLASS), None)


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module holds its experts as 3-D parameters in a layout that is known."""
    if layout_of(module) is None:
        return False
    weights = [getattr(module, name, None) for name in expert_weights(module)]
    return len(weights) == 2 and all(isinstance(w, Tensor) and w.dim() == 3 for w in weights)


def expert_weights(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the two stacks of matrices, in the order in which they are applied."""
    own = dict(module.named_parameters(recurse=False))
    return tuple(name for name in (*UP_NAMES, DOWN) if name in own)


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return the fused experts of a model by name, quantized or not."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedExperts) or is_fused_experts(module):
            yield name, module


@dataclass(frozen=True)
class PackedStack:
    """The matrices of a layer's experts in NF4.

    Attributes:
        data: Packed bytes, (experts, bytes).
        constants: The constants of the blocks, by the ending of their buffers' names.
        shape: Shape of one matrix.
    """

    data: Tensor
    constants: dict[str, Tensor]
    shape: tuple[int, ...]


def pack(stack: Tensor, *, double_quant: bool) -> PackedStack:
    """Quantize a stack of matrices (experts, rows, columns), each by itself, from the dtype it comes in.

    A stack on the meta device, which has no values, gives tensors of the same shapes there.
    """
    if stack.is_meta:
        return _packed_on_meta(stack, double_quant=double_quant)
    packed, states = [], []
    for matrix in stack:
        data, state = quantize_4bit(
            matrix.contiguous(), blocksize=BLOCK, compress_statistics=double_quant, quant_type="nf4"
        )
        packed.append(data.reshape(-1))
        states.append(state)
    constants = {"absmax": torch.stack([state.absmax for state in states]), "code": states[0].code}
    if double_quant:
        second = [state.state2 for state in states]
        constants |= {
            "offset": torch.stack([state.offset for state in states]),
            "nested_absmax": torch.stack([state.absmax for state in second]),
            "nested_code": second[0].code,
        }
    return PackedStack(torch.stack(packed), constants, tuple(stack.shape[1:]))


def _packed_on_meta(stack: Tensor, *, double_quant: bool) -> PackedStack:
    count, weights = stack.shape[0], stack[0].numel()
    blocks = -(-weights // BLOCK)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    constants = {
        "absmax": empty(count, blocks, dtype=torch.uint8 if double_quant else torch.float32),
        "code": empty(16),
    }
    if double_quant:
        constants |= {"offset": empty(count), "nested_code": empty(256)}
        constants["nested_absmax"] = empty(count, -(-blocks // SECOND_BLOCK))
    return PackedStack(empty(count, -(-weights // 2), dtype=torch.uint8), constants, tuple(stack.shape[1:]))


def store(module: nn.Module, name: str, stack: PackedStack) -> nn.Parameter:
    """Note a packed stack's constants on its module; return the parameter, still to be set.

    They become buffers in `quantized_class`: transformers renews every buffer that a checkpoint does not hold.
    """
    module.__dict__.setdefault("matrix_shapes", {})[name] = stack.shape
    constants = module.__dict__.setdefault("loaded_constants", {})
    constants |= {f"{name}_{ending}": value for ending, value in stack.constants.items()}
    return nn.Parameter(stack.data, requires_grad=False)


def quantized_class(module: nn.Module) -> None:
    """Let an experts module whose weights are packed compute with them: its class becomes a subclass of its own."""
    original = type(module)
    module.__dict__["layout"] = layout_of(module)
    for name, value in module.__dict__.pop("loaded_constants").items():
        module.register_buffer(name, value, persistent=False)
    module.__class__ = cast(type, type(f"Nf4{original.__name__}", (QuantizedExperts, original), {}))
    module.__dict__.setdefault("compute_dtype", torch.float32)
    module.__dict__.setdefault("adapters", {})


class QuantizedExperts(nn.Module):
    """Mixed into the class of an experts module whose weights are in NF4; see `quantized_class`.

    Attributes:
        matrix_shapes: Shape of one expert's matrix, by parameter.
        compute_dtype: Dtype that matrices are dequantized to.
        adapters: LoRA of the forward pass under way, by parameter; see `.expert_lora`.
        layout: How the matrices are to be read.
    """

    matrix_shapes: dict[str, tuple[int, ...]]
    compute_dtype: torch.dtype
    adapters: dict[str, Any]
    layout: Layout
    num_experts: int  # of transformers' classes

    def matrix(self, name: str, expert: int, dtype: torch.dtype | None = None) -> Tensor:
        """Dequantize one expert's matrix, (out, in), or (in, out) where the layout is turned."""
        return unpacked(cast(Tensor, getattr(self, name))[expert], self.state(name, expert, dtype))

    def state(self, name: str, expert: int, dtype: torch.dtype | None = None) -> QuantState:
        """Return bitsandbytes' description of one expert's matrix."""
        second = offset = None
        if f"{name}_offset" in self._buffers:
            offset = self.get_buffer(f"{name}_offset")[expert]
            second = QuantState(
                absmax=self.get_buffer(f"{name}_nested_absmax")[expert],
                code=self.get_buffer(f"{name}_nested_code"),
                blocksize=SECOND_BLOCK,
                dtype=torch.float32,
            )
        return QuantState(
            absmax=self.get_buffer(f"{name}_absmax")[expert],
            shape=torch.Size(self.matrix_shapes[name]),
            code=self.get_buffer(f"{name}_code"),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype or self.compute_dtype,
            offset=offset,
            state2=second,
        )

    def weight_names(self) -> tuple[str, ...]:
        """Return the names of the packed parameters."""
        return tuple(self.matrix_shapes)

    def constants(self, name: str) -> list[Tensor]:
        """Return what a packed parameter needs besides its bytes, without the code books, which never differ."""
        endings = ("absmax", "offset", "nested_absmax")
        return [self.get_buffer(f"{name}_{end}") for end in endings if f"{name}_{end}" in self._buffers]

    @contextmanager
    def adapted(self, name: str, adapter: Any) -> Generator[None, None, None]:
        """Add an adapter's update to the products of one parameter inside the block."""
        before = self.adapters.get(name)
        self.adapters[name] = adapter
        try:
            yield
        finally:
            if before is None:
                self.adapters.pop(name, None)
            else:
                self.adapters[name] = before

    def forward(self, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        """Return the experts' weighted sum for each token, (tokens, hidden).

        Args:
            hidden_states: Tokens, (tokens, hidden).
            routing: Experts of each token and their weights, (tokens, k) each; gpt-oss calls them by other names.
            named: The same, as keywords.
        """
        if not self.layout.is_routed:
            return self._each(hidden_states)
        index, weights = (*routing, *named.values())
        return self._mixed(hidden_states, index, weights)

    def _mixed(self, tokens: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        top_k, experts = index.shape[-1], index.reshape(-1)  # (pairs,), a pair being a token and one of its experts
        order = torch.argsort(experts, stable=True)
        # The one host synchronisation of the layer: how many pairs each expert has decides the shapes of its products.
        # An expert number beyond the last marks a token that this expert-parallel rank leaves out.
        counts = torch.bincount(experts, minlength=self.num_experts + 1)[: self.num_experts].tolist()
        used = [(expert, count) for expert, count in enumerate(counts) if count]
        kept = order[: sum(counts)]
        pairs = Pairs(kept, experts[kept], used, len(tokens), top_k)
        out = self._through(tokens[kept // top_k], pairs)
        out = out * weights.reshape(-1)[kept, None]
        # Back in the order of the tokens, then summed: unlike index_add, the same in every run.
        result = out.new_zeros(len(experts), out.shape[-1]).index_copy(0, kept, out)
        return result.view(len(tokens), top_k, -1).sum(dim=1).to(tokens.dtype)

    def _each(self, rows: Tensor) -> Tensor:
        """Return what every expert makes of its rows, (experts * tokens, hidden), a block of tokens for each."""
        count, tokens = self.num_experts, len(rows) // self.num_experts
        numbers = torch.arange(count, device=rows.device)
        order = (torch.arange(tokens, device=rows.device) * count + numbers[:, None]).reshape(-1)
        used = [(expert, tokens) for expert in range(count)]
        pairs = Pairs(order, numbers.repeat_interleave(tokens), used, tokens, count)
        return self._through(rows, pairs).to(rows.dtype)

    def _through(self, rows: Tensor, pairs: Pairs) -> Tensor:
        """Send rows, sorted by expert, through both matrices and what lies between them."""
        up = next(name for name in UP_NAMES if name in self.matrix_shapes)
        inner = self._product(up, rows, pairs)
        own = cast(Any, self)  # the members below are transformers'
        if not self.layout.has_gate:
            inner = own.act_fn(inner)
        elif hasattr(own, "_apply_gate"):
            inner = own._apply_gate(inner)
        else:
            gate, ahead = inner.chunk(2, dim=-1)
            inner = own.act_fn(gate) * ahead
        out = self._product(DOWN, inner, pairs)
        return own.post_expert_norm(out) if getattr(own, "has_post_expert_norm", False) else out

    def _product(self, name: str, rows: Tensor, pairs: Pairs) -> Tensor:
        """Multiply the rows of each expert by its matrix, (pairs, in) to (pairs, out), its LoRA and bias added."""
        cast_rows = rows.to(self.compute_dtype)
        pieces = [_Product.apply(part, self, name, expert) for expert, part in pairs.by_expert(cast_rows)]
        out = torch.cat(pieces) if pieces else rows.new_zeros(0, self._out_features(name))
        adapter = self.adapters.get(name)
        if adapter is not None:
            out = out + adapter.update(rows, pairs).to(out.dtype)
        if self.layout.has_bias:
            bias = cast(Tensor, getattr(self, f"{name}_bias"))  # (experts, out)
            out = out + bias[pairs.experts].to(out.dtype)
        return out.to(rows.dtype)

    def _out_features(self, name: str) -> int:
        return self.matrix_shapes[name][1 if self.layout.turned else 0]


@dataclass(frozen=True)
class Pairs:
    """Pairs of a token and one of its experts, sorted by expert.

    Attributes:
        order: Number of each pair, token * k + slot, (pairs,).
        experts: Expert of each pair, (pairs,).
        used: Experts with pairs, and how many each has.
        num_tokens: Tokens of the micro-batch.
        top_k: Experts of a token.
    """

    order: Tensor
    experts: Tensor
    used: list[tuple[int, int]]
    num_tokens: int
    top_k: int

    def by_expert(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Split rows, one for each pair, by expert."""
        parts = rows.split([count for _, count in self.used])
        return ((expert, part) for (expert, _), part in zip(self.used, parts, strict=True))


class _Product(torch.autograd.Function):
    """``rows @ matrix.T`` with a frozen NF4 matrix, dequantized anew for the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, experts: QuantizedExperts, name: str, expert: int) -> Tensor:
        ctx.where = (experts, name, expert)
        matrix = experts.matrix(name, expert)
        return rows @ (matrix if experts.layout.turned else matrix.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,), (experts, name, expert) = grads, ctx.where
        matrix = experts.matrix(name, expert, grad.dtype)
        return grad @ (matrix.t() if experts.layout.turned else matrix), None, None, None


def quantize_experts(modules: Iterable[nn.Module], *, double_quant: bool) -> None:
    """Quantize experts that are loaded already, one stack after another."""
    for module in modules:
        for name in expert_weights(module):
            weight = cast(nn.Parameter, getattr(module, name))
            setattr(module, name, store(module, name, pack(weight.data, double_quant=double_quant)))
        quantized_class(module)
