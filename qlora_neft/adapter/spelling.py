"""Names of adapter weights as PEFT must be given them, so that they arrive under the names they were saved with.

PEFT renames the weights of a file by transformers' rules for older checkpoints. A rule that also matches the names of
today spoils them: laguna's ``mlp.shared_expert.`` becomes ``mlp.shared_experts.``, and its dots stand for any
character, so that ``mlp.shared_experts.up_proj`` is read as ``mlp.shared_experts..up_proj`` and left out. Such names
are given in the older spelling, of which the rule makes the right one.
``convert_peft_adapter_state_dict_for_transformers``, PEFT 0.21; this can go when it keeps names that the model has.
"""

from __future__ import annotations

import re
from typing import cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, WeightTransform

PREFIX = "base_model.model."
_ENDING = ".lora_A.weight"  # of a module's weights in the file: a rule may need what follows the module


def older_names(model: PeftModel) -> dict[str, str]:
    """Return the adapted layers whose names PEFT would spoil, each with the name to give it instead."""
    base = cast("PreTrainedModel", model.get_base_model())
    renamings = [rule for rule in get_model_conversion_mapping(base) if isinstance(rule, WeightRenaming)]
    modules = dict(base.named_modules())
    found = {}
    for name in [name for name, module in modules.items() if isinstance(module, BaseTunerLayer)]:
        for rule in renamings:
            made = _renamed(rule, name)
            # What only lost its front is put right by PEFT itself.
            if made == name or made in modules or name.endswith(made):
                continue
            older = _renamed(rule.reverse_transform(), name)
            if _renamed(rule, older) == name:
                found[name] = older
    return found


def key_mapping(model: PeftModel) -> dict[str, str]:
    """Return `older_names` as `PeftModel.load_adapter` takes them: patterns of names without PEFT's prefix."""
    return {rf"^{re.escape(name)}\.": f"{older}." for name, older in older_names(model).items()}


def respelled(model: PeftModel, saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a file under the names that `set_peft_model_state_dict` must be given."""
    patterns = {
        rf"^{re.escape(PREFIX)}{pattern[1:]}": f"{PREFIX}{older}" for pattern, older in key_mapping(model).items()
    }
    renamed = {}
    for name, tensor in saved.items():
        for pattern, older in patterns.items():
            name = re.sub(pattern, older, name)
        renamed[name] = tensor
    return renamed


def _renamed(rule: WeightTransform, name: str) -> str:
    return rule.rename_source_key(f"{name}{_ENDING}")[0].removesuffix(_ENDING)
