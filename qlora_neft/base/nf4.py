"""The frozen base: 4-bit NF4 with double quantization (Dettmers et al. 2023, QLoRA, section 3, arXiv:2305.14314)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from ..errors import UserInputError, first_line
from ..files import sha256_of_text
from ..recipe.schema import Quantization
from .config import NOT_RUN, check_base_config
from .experts import QuantizedExperts
from .quantizer import Nf4Config, quantize_leftovers
from .text_part import CausalModel, causal_model
from .unpack import unpack_by_blocks, unpacked


def nf4_config(
    section: Quantization, compute_dtype: torch.dtype, *, quant_storage: torch.dtype = torch.uint8
) -> BitsAndBytesConfig:
    """Return bitsandbytes' configuration of NF4 as in QLoRA (section 3).

    Args:
        section: Whether the quantization constants are quantized too. Its own compute dtype may be ``auto``, so it is
            passed resolved.
        compute_dtype: Dtype that weights are dequantized to for each product.
        quant_storage: Dtype that the packed bytes are declared as. The bytes are the same; FSDP shards only floats.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=section.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=section.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=quant_storage,
    )


def load_nf4_base(
    name_or_path: str,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    quantization_config: BitsAndBytesConfig | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a base model in NF4, one shard at a time, straight to its device.

    Weights are quantized from the dtype they are stored in, whatever the machine computes in, so that every machine
    trains on the same NF4 bytes. Embeddings, norms and head stay unquantized, in ``compute_dtype``.

    Args:
        name_or_path: Hub id or directory; the checkpoint may already be stored in NF4.
        device: Device of the weights.
        compute_dtype: Dtype that NF4 weights are dequantized to and unquantized weights are stored in.
        quantization_config: Default NF4 with double quantization, as `nf4_config` makes it.
        kwargs: Passed on to ``from_pretrained`` (``revision``, ``attn_implementation`` ...;
            ``trust_remote_code``, default False: code in a model's repository is not run).

    Raises:
        UserInputError: As `check_base_config` does, or if weights are missing or unreadable.
    """
    config_kwargs = {key: kwargs[key] for key in ("revision", "trust_remote_code") if key in kwargs}
    config = check_base_config(name_or_path, **config_kwargs)
    causal = causal_model(config)
    part = causal if causal is not None and causal.is_text_part else None
    # A checkpoint that is stored in NF4 keeps its own constants and configuration.
    if getattr(config if part is None else part.config, "quantization_config", None) is None:
        chosen = quantization_config or nf4_config(Quantization(), compute_dtype)
        # An NF4 base also has its experts in NF4, which bitsandbytes' own configuration would leave in 16 bits.
        is_nf4 = chosen.load_in_4bit and chosen.bnb_4bit_quant_type == "nf4"
        kwargs["quantization_config"] = Nf4Config.of(chosen) if is_nf4 else chosen
    # Straight to the device: a 16-bit copy of the base need not fit into host memory.
    kwargs.setdefault("device_map", {"": device})
    model = _read_weights(name_or_path, part, {"dtype": "auto", **kwargs})
    if getattr(model, "is_loaded_in_4bit", False):
        quantize_leftovers(model, double_quant=model.config.quantization_config.bnb_4bit_use_double_quant)
    own_choice = None if quantization_config is None else quantization_config.bnb_4bit_compute_dtype
    set_compute_dtype(model, compute_dtype, own_choice)
    return model


def load_unquantized_base(
    name_or_path: str, *, device: torch.device, dtype: torch.dtype, revision: str | None = None
) -> PreTrainedModel:
    """Load a base without quantizing it, straight to its device: under LoRA, or to be trained in full.

    Args:
        name_or_path: Hub id or directory of a checkpoint that is not stored quantized.
        device: Device of the weights.
        dtype: Dtype of the weights; those that their architecture wants in float32 have it.
        revision: Hub branch, tag or commit.

    Raises:
        UserInputError: As `check_base_config` does, or if weights are missing or unreadable, or stored in NF4.
    """
    config = check_base_config(name_or_path, revision=revision)
    refuse_stored_nf4(config, name_or_path)
    causal = causal_model(config)
    part = causal if causal is not None and causal.is_text_part else None
    kwargs = {"device_map": {"": device}, "dtype": dtype, "revision": revision}
    return _read_weights(name_or_path, part, kwargs)


def refuse_stored_nf4(config: PreTrainedConfig, name: str) -> None:
    """Refuse a checkpoint stored in NF4 as a base that is not to be quantized.

    Raises:
        UserInputError: Names the recipe's key.
    """
    if any(getattr(part, "quantization_config", None) is not None for part in (config, config.get_text_config())):
        raise UserInputError(
            f"quantization: null asks for weights that are not quantized, and {name!r} is stored in NF4. Write "
            "quantization: {}, or choose the original 16-bit checkpoint."
        )


def _read_weights(name_or_path: str, part: CausalModel | None, kwargs: dict[str, Any]) -> PreTrainedModel:
    """Load a model, or its text part, and refuse one that lacks weights."""
    kwargs = {**NOT_RUN, **kwargs, **({} if part is None else part.load_kwargs())}
    loader: Any = AutoModelForCausalLM if part is None else part.model_class
    try:
        model, info = loader.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    except (OSError, SafetensorError) as error:
        raise UserInputError(
            f"model.name_or_path: no weights could be read from {name_or_path!r}. ({first_line(error)})"
        ) from error
    # transformers initializes missing weights at random and only warns.
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise UserInputError(
            f"model.name_or_path: the checkpoint {name_or_path!r} lacks {len(names)} weights of "
            f"{type(model).__name__}, among them {names[0]}. A base must be complete."
        )
    return model


def set_compute_dtype(model: PreTrainedModel, dtype: torch.dtype, matmul_dtype: torch.dtype | None = None) -> None:
    """Make a loaded NF4 base compute in ``dtype``: dequantization target, embeddings, norms, biases and head.

    ``matmul_dtype`` sets another dequantization target (a caller's own ``bnb_4bit_compute_dtype``). Weights that their
    architecture wants in float32 stay in it. Buffers (rotary frequencies) are left alone.
    """
    keep_nf4_layout(model)
    islands = float32_islands(model, dtype)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = matmul_dtype or dtype
            module.compute_type_is_set = True  # else bitsandbytes takes the dtype of the first input it sees
            module.weight.quant_state.dtype = matmul_dtype or dtype  # ty: ignore[missing-attribute]  # a Params4bit
        elif isinstance(module, QuantizedExperts):
            module.compute_dtype = matmul_dtype or dtype
    for name, param in model.named_parameters():
        # Packed bytes are not numbers: a cast would destroy them.
        if isinstance(param, Params4bit) or not param.is_floating_point():
            continue
        param.data = param.data.to(torch.float32 if name in islands else dtype)
    model.config.dtype = dtype


def float32_islands(model: PreTrainedModel, dtype: torch.dtype) -> frozenset[str]:
    """Return the parameters that stay in float32 while the others are in ``dtype``.

    An architecture names them by patterns, ``_keep_in_fp32_modules`` for float16 alone and
    ``_keep_in_fp32_modules_strict`` for bfloat16 too: routers, their corrections, some norms. They are read and matched
    as `from_pretrained` does (``core_model_loading.convert_and_load_state_dict_in_model``).
    """
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return frozenset()
    pattern, *_ = build_glob_alternation(list(plan))
    return frozenset(name for name, _ in model.named_parameters(remove_duplicate=False) if pattern.search(name))


def keep_nf4_layout(model: nn.Module) -> None:
    """Let a base on a CPU be what its NF4 bytes say, before, during and after training.

    `unpack_by_blocks` sees to layers that bitsandbytes unpacks wrongly there. And on CPUs with AVX512-BF16, the first
    forward in eval mode repacks every `Linear4bit` weight in place for an inference kernel, rounds its
    double-quantized constants to bf16 for good, and fails if a layer's width is not a multiple of 32; later training
    steps then run on the rewritten weights (``Linear4bit.forward`` and ``_convert_weight_packed_for_cpu``, bitsandbytes
    0.50; https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2078 is one consequence). A single evaluation
    would change the run. Can go when the repacking leaves the stored weight alone.
    """
    unpack_by_blocks(model)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def frozen_fingerprints(model: nn.Module, *, and_trained: bool = False) -> dict[str, str]:
    """Hash every frozen parameter's bytes, quantization constants included: SHA-256 as hex by name.

    Equal dictionaries before and after training prove that the base did not move by a single bit.

    Args:
        model: The model.
        and_trained: Whether trained parameters are hashed as well, as those of a base that is trained in full.
    """
    beside = {  # an experts module keeps the constants of its packed parameters as buffers
        f"{prefix}.{name}": module.constants(name)
        for prefix, module in model.named_modules()
        if isinstance(module, QuantizedExperts)
        for name in module.weight_names()
    }
    return {
        name: _sha256([*_stored_tensors(param), *beside.get(name, ())])
        for name, param in model.named_parameters()
        if and_trained or not param.requires_grad
    }


def base_fingerprint(fingerprints: dict[str, str]) -> str:
    """Hash the result of `frozen_fingerprints` as a whole: one SHA-256 as hex."""
    lines = "\n".join(f"{name} {digest}" for name, digest in sorted(fingerprints.items()))
    return sha256_of_text(lines)


def to_nf4(weight: Tensor, double_quant: bool) -> Params4bit:
    """Quantize a weight as `load_nf4_base` does, from the dtype it comes in."""
    nf4 = Params4bit.__new__(
        Params4bit, weight, requires_grad=False, compress_statistics=double_quant, quant_type="nf4"
    )  # by __new__: type checkers take the arguments of Parameter's __init__ for those of the constructor
    return nf4.cpu()  # quantizes


def from_nf4(weight: Params4bit) -> Tensor:
    """Return the float32 values that a quantized weight stands for, (out, in)."""
    weight.quant_state.dtype = torch.float32
    return unpacked(weight.data, weight.quant_state)


def _stored_tensors(param: Tensor) -> Iterator[Tensor]:
    yield param.detach()
    state = getattr(param, "quant_state", None)
    if state is None:
        return
    # With double quantization absmax is bytes itself: scale and offset of a second level turn it into floats.
    yield state.absmax
    if state.nested:
        yield state.offset
        yield state.state2.absmax


def _sha256(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        # As bytes, since NumPy has no bfloat16.
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()
