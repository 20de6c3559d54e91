"""Which layers an adapter goes on: "all-linear" and a recipe's names as PEFT's targets, experts among them.

PEFT resolves both by itself on a model without experts. On a mixture it would leave out the experts, or in exchange
for them the dense and shared MLPs, whose names it takes for those of experts in older checkpoints.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import UserInputError
from .expert_lora import for_experts
from .expert_names import is_of_stack
from .experts import QuantizedExperts, expert_modules, expert_weights
from .quantizer import routers
from .unadaptable import unadaptable

ALL_LINEAR = "all-linear"
PAIRS = (("gate_proj", "up_proj"), ("w1", "w3"))  # one stack holds both, so both are adapted or none


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the linear layers by name, the output layer and routers apart."""
    head = model.get_output_embeddings()
    chosen = set(routers(model))
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and name not in chosen
    }


def resolved(model: PreTrainedModel, config: LoraConfig) -> LoraConfig:
    """Return a configuration whose targets are those of the model, experts included; without experts the given one.

    Args:
        model: The base, quantized or not.
        config: ``target_modules`` may be ``"all-linear"``, a list of names, or a regular expression, which is left
            to PEFT.

    Raises:
        UserInputError: If a name is that of one of two projections that experts keep in one stack.
    """
    experts = dict(expert_modules(model))
    if experts:
        config = for_experts(copy.copy(config))
    targets = config.target_modules
    is_all = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    if isinstance(targets, str) and not is_all:
        return config
    names = None if is_all else set(targets or ())
    left_out = unadaptable(model)
    _check_named(model, names or (), left_out)
    own = [name for name in linear_layers(model) if name not in left_out]
    by_peft = not (routers(model) or left_out) and not any(
        _is_renamed(model, config, name) for name in _of_each_end(own)
    )
    if not experts and (by_peft or not is_all):
        return config
    modules = {name for name in own if names is None or _is_named(name, names)}
    if names is not None:
        # A router or the head may be named; "all-linear" leaves them alone.
        modules |= {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and _is_named(name, names)}
    parameters = _expert_parameters(experts, names)
    hidden = {name for name in modules if _is_renamed(model, config, name)}
    # PEFT would take these for experts; named as parameters, their weights get the same layers under the same names.
    parameters |= {f"{name}.weight" for name in hidden} | set(config.target_parameters or ())
    config = copy.copy(config)
    every = [name for name, _ in model.named_modules()]
    config.target_modules = _short(modules - hidden, every, parts=1)
    config.target_parameters = _short(parameters, [name for name, _ in model.named_parameters()], parts=2)
    _check_dropout(config, experts.values())
    return config


def _check_named(model: PreTrainedModel, names: Collection[str], left_out: dict[str, str]) -> None:
    """Refuse names of layers that cannot have LoRA."""
    for name, why in left_out.items():
        if _is_named(name, names):
            raise UserInputError(
                f"lora.target_modules: {name} of {type(model).__name__} cannot have LoRA ({why}). Remove it, or write "
                "all-linear, which leaves it out."
            )


def _check_dropout(config: LoraConfig, experts: Collection[nn.Module]) -> None:
    unpacked = [module for module in experts if not isinstance(module, QuantizedExperts)]
    if config.lora_dropout and config.target_parameters and unpacked:
        raise UserInputError(
            f"lora.lora_dropout: must be 0 on experts that are not in NF4, which PEFT adapts without dropout, got "
            f"{config.lora_dropout:g}."
        )


def _expert_parameters(experts: dict[str, nn.Module], names: set[str] | None) -> set[str]:
    """Return the experts' stacks that are named, by the projections in them, or by their own names."""
    found = set()
    for prefix, module in experts.items():
        for stack in expert_weights(module):
            full = f"{prefix}.{stack}"
            if names is None or _is_named(full, names) or is_of_stack(stack, names):
                found.add(full)
    if names is not None and experts:
        for pair in PAIRS:
            given = names.intersection(pair)
            if len(given) == 1:
                (name,), (missing,) = given, set(pair) - given
                raise UserInputError(
                    f"lora.target_modules: names {name} without {missing}; the experts of this model keep both in one "
                    f"weight, which is adapted as a whole. Name both or neither."
                )
    return found


def _is_named(module: str, names: Iterable[str]) -> bool:
    """Whether one of the names is a module's path or the end of it, as PEFT matches."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def _of_each_end(names: Iterable[str]) -> Iterable[str]:
    """Return one name for each last part: PEFT's rules below look at no other."""
    return {name.rpartition(".")[2]: name for name in names}.values()


def _is_renamed(model: PreTrainedModel, config: LoraConfig, name: str) -> bool:
    """Whether PEFT takes a linear layer's name for that of experts in an older checkpoint, and passes the layer over.

    https://github.com/huggingface/peft ``convert_peft_config_for_transformers``, 0.21; it looks at the last part of a
    name alone. Can go when it leaves names that the model has.
    """
    probe = copy.copy(config)
    probe.target_modules, probe.target_parameters, probe.rank_pattern, probe.alpha_pattern = [name], None, {}, {}
    try:
        convert_peft_config_for_transformers(probe, model, None)
    except ValueError:  # one of a pair
        return True
    return name not in (probe.target_modules or ())


def _short(names: Collection[str], every: Iterable[str], parts: int) -> list[str]:
    """Return the shortest endings, of at least so many parts, that match these names and no other."""
    others = set(every) - set(names)
    chosen: set[str] = set()
    for name in sorted(names):
        pieces = name.split(".")
        endings = [".".join(pieces[i:]) for i in range(len(pieces) - parts, -1, -1)] or [name]
        chosen.add(next((e for e in endings if not any(_is_named(other, (e,)) for other in others)), name))
    return sorted(chosen)
