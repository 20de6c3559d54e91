"""NF4 bases of random weights, made in seconds on the device itself: no network, no file, no 16-bit copy of the whole.

The same seed gives the same bytes in every process on one kind of device, so arms need not share a checkpoint.
Random weights say nothing about quality, and nothing about speed or memory depends on their values.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

STD = 0.02  # of random weights, as Llama is initialized
LORA_STD = 0.01  # of LoRA's B, which training begins at 0: its gradients would not depend on A
SEED = 0
STORED = torch.bfloat16  # what weights are quantized from, as in a published checkpoint


def nf4_base(
    sizes: Mapping[str, int], device: torch.device, dtype: torch.dtype, attn_implementation: str = "sdpa"
) -> PreTrainedModel:
    """Make a Llama with random weights in NF4, as ``from_pretrained`` would have loaded it.

    Weights are drawn and quantized one by one on the device.

    Args:
        sizes: Keys of ``config.json``.
        device: Where it is made and stays.
        dtype: What NF4 weights are dequantized to and other weights are stored in.
        attn_implementation: As in ``from_pretrained``.
    """
    config = LlamaConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config._attn_implementation = attn_implementation
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    quantizer = AutoHfQuantizer.from_config(_nf4_config(dtype), pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": device}, dtype=dtype)
    generator = torch.Generator(device).manual_seed(SEED)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        _set_weight(model.get_submodule(owner), leaf, parameter.shape, generator, dtype)
    # Its frequencies are a buffer, which no checkpoint holds: made anew where the weights are.
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer  # as from_pretrained does; Trainer asks it whether training is possible
    model.config.dtype = dtype
    return model.eval()


def _nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _set_weight(
    module: nn.Module, leaf: str, shape: torch.Size, generator: torch.Generator, dtype: torch.dtype
) -> None:
    """Replace a module's weight, which has no memory yet, by a random one; a norm's by ones."""
    device = generator.device
    if len(shape) == 1:
        module.register_parameter(leaf, nn.Parameter(torch.ones(shape, device=device, dtype=dtype), False))
        return
    drawn = torch.randn(shape, generator=generator, device=device, dtype=STORED).mul_(STD)  # (out, in)
    if not isinstance(module, Linear4bit):
        module.register_parameter(leaf, nn.Parameter(drawn.to(dtype), requires_grad=False))
        return
    old = module.weight
    packed = Params4bit(
        drawn,
        requires_grad=False,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
        module=module,
    ).to(device)  # quantizes
    packed.quant_state.dtype = dtype
    module.weight = packed


def set_adapters(model: nn.Module) -> None:
    """Set LoRA's weights, each from its own name: the same in every arm, whatever order they are made in."""
    for name, parameter in adapters(model):
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
        drawn = torch.randn(parameter.shape, generator=generator, device=parameter.device)
        # A as PEFT draws it, with unit variance over its inputs and a third of it; B small, but not 0.
        scale = (3 * parameter.shape[1]) ** -0.5 if "lora_A" in name else LORA_STD
        with torch.no_grad():
            parameter.copy_(drawn.mul_(scale))


def adapters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield LoRA's weights and their names, which start at the decoder whatever is wrapped around it."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            at = name.find("model.layers.")
            yield name[at:], parameter


def checksum(model: nn.Module) -> int:
    """Add up the bytes of all NF4 weights, to show that two arms trained on the same."""
    total = sum(
        module.weight.data.view(torch.uint8).sum(dtype=torch.int64) * (number % 251 + 1)
        for number, module in enumerate(module for module in model.modules() if isinstance(module, Linear4bit))
    )
    return int(total) if isinstance(total, Tensor) else 0


def save_base(sizes: Mapping[str, int], device: torch.device, folder: Path) -> Path:
    """Write a base as an NF4 checkpoint with a tokenizer, for trainers that load their own."""
    model: Any = nf4_base(sizes, device, STORED)
    make_tokenizer().save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def make_tokenizer() -> Any:
    """Return a tokenizer in name only: the rows are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
