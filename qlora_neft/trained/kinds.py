"""Which kinds of LoRA are more than the plain one, so that `qlora-neft merge` refuses them. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Initializations that leave the base as it is. Others (PiSSA, OLoRA ...) subtract from it, which a merge cannot see.
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
# Keys of adapter_config.json under which the update is no plain B A.
NOT_PLAIN = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "megatron_config",
)


def beyond_plain(config: Mapping[str, Any]) -> list[str]:
    """What of ``adapter_config.json`` makes an update other than ``scale * B @ A`` and whole modules."""
    used = [key for key in NOT_PLAIN if config.get(key)]
    if config.get("bias", "none") != "none":
        used.append(f"bias={config['bias']}")
    if config.get("init_lora_weights", True) not in PLAIN_INITS:
        used.append(f"init_lora_weights={config['init_lora_weights']}")
    return used
