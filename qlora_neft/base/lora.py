"""LoRA adapters on every linear layer (QLoRA, section 4: adapters on all layers match full fine-tuning)."""

from __future__ import annotations

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from ..errors import UserInputError
from ..recipe.schema import Lora
from .targets import resolved

LARGE_MODEL_PARAMETERS = 14_000_000_000  # the dropout rule is "up to 13B": LLaMA-13B has 13.02 billion


def lora_config(section: Lora) -> LoraConfig:
    """Return a plain LoRA that every consumer of adapters can load: no bias, no DoRA, no extra saved modules."""
    targets = section.target_modules
    return LoraConfig(
        r=section.r,
        lora_alpha=section.lora_alpha,  # ty: ignore[invalid-argument-type]  # PEFT divides it by r: any number will do
        lora_dropout=section.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=section.use_rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )


def default_lora_config(num_parameters: int) -> LoraConfig:
    """Return QLoRA's choice: r 64, alpha 16, dropout 0.1 up to 13B parameters and 0.05 above, all linear layers.

    Source: Dettmers et al. 2023, appendix B.2, arXiv:2305.14314.
    """
    dropout = 0.1 if num_parameters < LARGE_MODEL_PARAMETERS else 0.05
    return lora_config(Lora(r=64, lora_alpha=16, lora_dropout=dropout, target_modules="all-linear"))


def add_adapters(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Wrap a model with LoRA, or with another kind of adapter that PEFT has, drawn from torch's global random stream.

    Raises:
        UserInputError: If a named target is not a module of the model; PEFT would silently leave it out.
    """
    if isinstance(config, LoraConfig):
        config = resolved(model, config)
    named = getattr(config, "target_modules", None)  # prompt and prefix tuning have none
    targets = named if isinstance(named, (set, list)) else ()
    names = [name for name, _ in model.named_modules()]
    # As PEFT matches: a target is a module's path or the end of it.
    unknown = sorted(t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names))
    if unknown:
        linears = sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise UserInputError(
            f"lora.target_modules: the model has no {', '.join(unknown)}. Its linear layers are {', '.join(linears)}; "
            "all-linear takes all but the head."
        )
    return get_peft_model(model, config)


def count_parameters(model: PreTrainedModel) -> int:
    """Count the model's parameters; transformers counts two for each byte that is stored in NF4."""
    return model.num_parameters()


def count_trainable(model: nn.Module) -> int:
    """Count the parameters that receive gradients."""
    return sum(param.numel() for param in model.parameters() if param.requires_grad)
