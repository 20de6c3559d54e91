"""Which model families may be flattened, by their config.json, and which runs flatten their rows. No torch.

The families are not believed but found out: ``python -m scripts.probe_flattening`` builds each one tiny and compares.
Its result lies beside this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

from typing_extensions import TypedDict

from ..files import read_json

VARLEN, PER_SEQUENCE = "varlen", "per_sequence"  # as `machine.attn_implementation` names them
OURS = (VARLEN, PER_SEQUENCE)
FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
LAYERS = {"full_attention", "sliding_attention"}  # kinds of layers that our attention knows
# Names of the probability with which a family drops attention weights.
DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout", "attention_dropout_prob")


class Probed(TypedDict):
    """What the probe found, families by ``model_type``.

    Attributes:
        flattens: Exact under our attention.
        padded: Not exact, and why.
        kept_apart_by_masks: Exact under transformers' own attention and its block masks.
        attention_dropout: Of families that drop attention weights unless their config.json says otherwise.
    """

    flattens: list[str]
    padded: dict[str, str]
    kept_apart_by_masks: list[str]
    attention_dropout: dict[str, float]


@cache
def probed() -> Probed:
    """Return what the probe found."""
    return cast(Probed, read_json(Path(__file__).with_name("flattening.json")))


def why_padded(config: Mapping[str, Any]) -> str:
    """Return why the rows of a model must be padded; "" if they may be flattened under our attention.

    Args:
        config: Content of its ``config.json``.
    """
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else config
    for part in (config, text):
        family = part.get("model_type", "")
        # A family's own code under a known name is not the code that was probed.
        if part.get("auto_map") or family not in probed()["flattens"]:
            known = probed()["padded"].get(family)
            return f"{family}: {known}" if known else f"{family}: not known to flatten exactly"
    default = probed()["attention_dropout"].get(text["model_type"])
    stated = [(name, text[name]) for name in DROPOUT if name in text]
    if dropout := [(name, p) for name, p in stated or [("attention_dropout", default)] if p]:
        return f"{dropout[0][0]} is {dropout[0][1]}, and attention by sequence has no dropout"
    if others := set(text.get("layer_types") or ()) - LAYERS:
        return f"layers of kind {sorted(others)[0]}"
    return ""


def flattening_is_wanted(padding_free: bool | None, implementation: str, *, on_cuda: bool) -> bool:
    """Return whether rows are to be flattened if the model allows it.

    Args:
        padding_free: What was asked for; None decides: on CUDA yes, and on a CPU no, whose kernels are slower on many
            short sequences than on one padded rectangle.
        implementation: As ``machine.attn_implementation``.
        on_cuda: Whether the model is on a CUDA device.
    """
    if padding_free is not None:
        return padding_free
    return implementation in (*OURS, *FLASH) or (implementation == "auto" and on_cuda)


def flattens(padding_free: bool | None, implementation: str, *, on_cuda: bool, family: str, why: str) -> bool:
    """Return whether a run flattens its rows: if that is wanted, and exact.

    Args:
        padding_free, implementation, on_cuda: As in `flattening_is_wanted`.
        family: The model's ``model_type``, of its text part.
        why: Why its rows must be padded, by `why_padded`.
    """
    if not flattening_is_wanted(padding_free, implementation, on_cuda=on_cuda):
        return False
    # A mask over the whole flattened row costs more than padding: only for those who ask.
    by_masks = family in probed()["kept_apart_by_masks"]
    return (not why and implementation not in ("sdpa", "eager")) or (by_masks and (padding_free is True or not why))
