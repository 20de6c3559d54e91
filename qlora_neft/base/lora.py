"""LoRA adapters on every linear layer (QLoRA, section 4: adapters on all layers match full fine-tuning)."""

from __future__ import annotations

from collections.abc import Sequence

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from ..errors import UserInputError

LARGE_MODEL_PARAMETERS = 14_000_000_000  # the dropout rule is "up to 13B": LLaMA-13B has 13.02 billion


def default_lora_config(num_parameters: int) -> LoraConfig:
    """QLoRA's defaults: r 64, alpha 16, dropout 0.1 up to 13B parameters and 0.05 above, all linear layers.

    Source: Dettmers et al. 2023, appendix B.2, arXiv:2305.14314.
    """
    return lora_config(lora_dropout=0.1 if num_parameters < LARGE_MODEL_PARAMETERS else 0.05)


def lora_config(
    r: int = 64,
    lora_alpha: float = 16,
    lora_dropout: float = 0.1,
    target_modules: str | Sequence[str] = "all-linear",
) -> LoraConfig:
    """A plain LoRA that every consumer of adapters can load: no bias, no DoRA, no extra saved modules.

    Args:
        r: Rank of the update.
        lora_alpha: The update is scaled by ``lora_alpha / r``.
        lora_dropout: Dropout on the adapter's input, in [0, 1).
        target_modules: ``"all-linear"`` (every linear layer but the head) or module names.
    """
    return LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )


def add_adapters(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Wrap a model with LoRA adapters, drawn from torch's global random stream.

    Raises:
        UserInputError: If a named target is no module of the model; PEFT would leave it out without a word.
    """
    targets = config.target_modules if isinstance(config.target_modules, (set, list)) else ()
    names = [name for name, _ in model.named_modules()]
    unknown = sorted(t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names))
    if unknown:
        linears = sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise UserInputError(
            f"lora.target_modules: the model has no {', '.join(unknown)}. Its linear layers are {', '.join(linears)}; "
            "all-linear takes all but the head."
        )
    return get_peft_model(model, config)


def count_parameters(model: PreTrainedModel) -> int:
    """Parameters of the model, two to a byte where they are stored in NF4."""
    return model.num_parameters()


def count_trainable(model: nn.Module) -> int:
    """Parameters that receive gradients."""
    return sum(param.numel() for param in model.parameters() if param.requires_grad)
