"""Rotary position embeddings in few passes over memory, and the attention modules that use them.

transformers turns queries and keys by a function of each modeling file, in 26 operations forward and backward, some of
which only copy halves about. Here it is one operation a pass: a single kernel on CUDA, six launches elsewhere.
Attention modules get it by the class of the instance: their forward pass is the one that most families share
(transformers 5, ``models/llama/modeling_llama.py``), and each module shows that it computes just that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .layers import Swapped, own_class, swap, swap_back
from .ops import rotated

CACHES = ("cache", "past_key_values", "past_key_value")  # transformers 5.24 calls it the first
TRIAL = "qlora_neft_trial"  # name of the attention function that only notes what it is given
_ROWS, _TOKENS = 2, 3  # of the trial
_TOLERANCE = 1e-5  # of the largest number, in float32


# ---- The function ----


class Rotation(torch.autograd.Function):
    """`ops.rotated`; nothing is kept for the backward pass but ``cos`` and ``sin``, which all layers share."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return both turned."""
        ctx.save_for_backward(cos, sin)
        return rotated(q, k, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Return the gradients of queries and keys."""
        cos, sin = ctx.saved_tensors
        return *rotated(grad_q, grad_k, cos, sin, True), None, None


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and keys turned by the angles of their positions, in the dtype they share with ``cos``."""
    dtype = torch.result_type(q, cos)
    return Rotation.apply(q.to(dtype), k.to(dtype), cos.to(dtype), sin.to(dtype))


# ---- The modules ----


@dataclass(frozen=True, eq=False)
class AttentionState:
    """What the fast path knows of one attention module.

    Attributes:
        settings: What it hands to the attention function in training beside tensors: scaling, dropout, a window.
        eager: The function of its modeling file that attends where no other is asked for.
    """

    settings: dict[str, Any]
    eager: Callable[..., Any]


class FusedAttention(Swapped):
    """An attention module with rotary embeddings in few passes, in training."""

    fused: AttentionState

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output, (B, T, hidden), and the attention weights if there are any."""
        # In evaluation the model is bit for bit the one that others load.
        usual = not self.training or bool(args) or any(kwargs.get(name) is not None for name in CACHES)
        output = None if usual else attention_output(self, self.fused, **kwargs)
        return super().forward(*args, **kwargs) if output is None else output


def attention_output(
    module: nn.Module,
    state: AttentionState,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None] | None:
    """Return what an attention module returns without a cache; None for embeddings of another form.

    Args:
        module: The module.
        state: What is known of it.
        hidden_states: (B, T, hidden).
        position_embeddings: cos and sin, each (B or 1, T, head_dim).
        attention_mask: For the attention function.
        kwargs: Handed down to it, caches apart.
    """
    own = cast(Any, module)
    if not _are_usual(position_embeddings, own.head_dim):
        return None
    shape = hidden_states.shape[:-1]
    q, k, v = (x.view(*shape, -1, own.head_dim) for x in _projected(own, hidden_states))  # (B, T, H, D)
    # Norms of heads, before the heads are moved: their memory is still in one piece.
    q, k = (x if norm is None else norm(x) for x, norm in zip((q, k), _head_norms(own), strict=True))
    q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(own.config._attn_implementation, state.eager)
    handed = {name: value for name, value in kwargs.items() if name not in CACHES}
    output, weights = attend(module, q, k, v.transpose(1, 2), attention_mask, **state.settings, **handed)
    return own.o_proj(output.reshape(*shape, -1).contiguous()), weights


def _projected(own: Any, x: Tensor) -> tuple[Tensor, ...]:
    if not hasattr(own, "qkv_proj"):
        return own.q_proj(x), own.k_proj(x), own.v_proj(x)
    keys = own.num_key_value_heads * own.head_dim
    joint = own.qkv_proj(x)
    return joint.split((joint.shape[-1] - 2 * keys, keys, keys), -1)


def _head_norms(own: Any) -> tuple[nn.Module | None, nn.Module | None]:
    return getattr(own, "q_norm", None), getattr(own, "k_norm", None)


def _are_usual(embeddings: Any, head_dim: int) -> bool:
    """Whether position embeddings turn the whole of every head; some families turn a part."""
    is_pair = isinstance(embeddings, tuple) and len(embeddings) == 2
    return is_pair and all(isinstance(e, Tensor) and e.dim() == 3 and e.shape[-1] == head_dim for e in embeddings)


def install_rotary(model: nn.Module) -> int:
    """Give every attention module of a model the fast path that computes what `attention_output` does.

    Returns:
        How many have it. `uninstall_rotary` takes it back.
    """
    for module in model.modules():
        if not isinstance(module, Swapped) and (state := _known_attention(module)) is not None:
            swap(module, FusedAttention, state)
    return sum(isinstance(module, FusedAttention) for module in model.modules())


def uninstall_rotary(model: nn.Module) -> None:
    """Give every attention module its own class back."""
    for module in model.modules():
        if isinstance(module, FusedAttention):
            swap_back(module)


# ---- Which modules compute the same ----


@dataclass
class _Handed:
    """What an attention module hands to its attention function."""

    tensors: tuple[Tensor, ...]
    mask: Any
    others: dict[str, Any]


def _note(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, trial: Any = None, **others: Any
) -> tuple[Tensor, str]:
    """Attend to nothing: return the queries, in the form of an attention function's output."""
    trial.append(_Handed((query, key, value), attention_mask, others))
    return query.transpose(1, 2), TRIAL


AttentionInterface.register(TRIAL, _note)


def _known_attention(module: nn.Module) -> AttentionState | None:
    """Return what the fast path must know of a module; None unless it computes what `attention_output` does.

    It is tried itself, not its class: what a layer does depends on its number in many families. Its projections are
    stood in for by random numbers, so that the trial costs nothing and rounds in float32.
    """
    names = vars(sys.modules[own_class(module).__module__])
    parts = ("qkv_proj", "o_proj") if hasattr(module, "qkv_proj") else ("q_proj", "k_proj", "v_proj", "o_proj")
    needed = (*parts, "head_dim", "scaling", "config", *(("num_key_value_heads",) if "qkv_proj" in parts else ()))
    eager = names.get("eager_attention_forward")
    has_parts = all(hasattr(module, name) for name in needed)
    if not has_parts or not callable(eager) or not callable(names.get("apply_rotary_pos_emb")):
        return None
    own = cast(Any, module)
    if any(not hasattr(getattr(own, part), name) for part in parts for name in ("weight", "out_features")):
        return None  # projections of a class of their own
    device = own.o_proj.weight.device
    device = torch.device("cpu") if device.type == "meta" else device
    if own.head_dim % 2 or not isinstance(own.scaling, float):
        return None
    with torch.no_grad(), _stood_in(module, parts[:-1], device):
        try:
            return _by_trial(module, eager, device)
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):  # it takes something else
            return None


def _by_trial(module: nn.Module, eager: Callable[..., Any], device: torch.device) -> AttentionState | None:
    generator = torch.Generator().manual_seed(0)
    # Numbers of no angle: each of the halves then shows where it goes.
    cos, sin = torch.randn(2, _ROWS, _TOKENS, cast(Any, module).head_dim, generator=generator, device="cpu").to(device)
    x = torch.zeros(_ROWS, _TOKENS, 1, device=device)
    passed = {"position_ids": x, "use_cache": False, "cu_seq_lens_q": x, "max_length_q": 3, "sequence_bounds": (0, 3)}
    given = {"hidden_states": x, "position_embeddings": (cos, sin), "attention_mask": x, **passed}
    theirs, ours = [], []
    expected = type(module).forward(module, **given, trial=theirs)
    [noted] = theirs
    settings = {name: value for name, value in noted.others.items() if name not in passed}
    plain = all(value is None or isinstance(value, (bool, int, float)) for value in settings.values())
    # Its own forward pass hands down all that came in, and nothing that is made anew for each call.
    if not plain or any(noted.others.get(name) is not value for name, value in passed.items()):
        return None
    state = AttentionState(settings, eager)
    found = attention_output(module, state, **given, trial=ours)
    same = found is not None and expected[1:] == found[1:] == (TRIAL,) and noted.mask is ours[0].mask is x
    pairs = zip((*noted.tensors, expected[0]), (*ours[0].tensors, found[0]), strict=True) if found is not None else ()
    return state if same and all(_are_close(a, b) for a, b in pairs) else None


def _are_close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= _TOLERANCE * a.abs().max())


@contextmanager
def _stood_in(module: nn.Module, parts: tuple[str, ...], device: torch.device) -> Generator[None, None, None]:
    """Let projections give random numbers, and the attention function note what it is given, inside the block."""
    own, generator = cast(Any, module), torch.Generator().manual_seed(1)
    usual, training = own.config._attn_implementation, own.training
    layers = [own.o_proj, *(getattr(own, name) for name in parts)]
    forwards = [vars(layer).get("forward") for layer in layers]

    def give(y: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda _: y

    try:
        for layer in layers[1:]:
            y = torch.randn(_ROWS, _TOKENS, layer.out_features, generator=generator, device="cpu")
            vars(layer)["forward"] = give(y.to(device))
        vars(own.o_proj)["forward"] = lambda y: y
        own.config._attn_implementation = TRIAL
        own.training = True  # its own dropout is handed to the attention function, which drops nothing here
        yield
    finally:
        own.config._attn_implementation, own.training = usual, training
        for layer, forward in zip(layers, forwards, strict=True):
            vars(layer).pop("forward", None)
            if forward is not None:  # another library's
                vars(layer)["forward"] = forward
