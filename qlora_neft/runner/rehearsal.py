"""Everything of a run that can be built without weights, built: what upstream would refuse after loading shows now.

Model and adapters are made on the meta device, in NF4, by the same code that makes them with weights; the trainer's
arguments are made too. What is refused comes as one message, with the recipe key to change.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from ..base.census import census, check_nf4_share
from ..base.checkpoint import skeleton
from ..base.lora import add_adapters, lora_config
from ..base.nf4 import nf4_config, refuse_stored_nf4
from ..base.quantizer import in_nf4
from ..base.text_part import causal_model
from ..base.unadaptable import unadaptable
from ..errors import RecipeError, UserInputError, first_line
from .build import Run
from .build_trainer import arguments_of, quant_storage_of

# Words of upstream's refusals, and the recipe key that answers each. What is not here is passed on as it came.
REMEDIES = (
    ("gradient checkpointing", "machine.activation_checkpointing", "Set machine.activation_checkpointing=false."),
    ("activation checkpointing", "machine.activation_checkpointing", "Set machine.activation_checkpointing=false."),
    ("padding_free", "machine.padding_free", "Set machine.padding_free=false."),
    ("lora_dropout", "lora.lora_dropout", "Set lora.lora_dropout=0."),
    ("target modules", "lora.target_modules", "Write all-linear, or names of linear layers of this model."),
    ("target_modules", "lora.target_modules", "Write all-linear, or names of linear layers of this model."),
    ("attn_implementation", "machine.attn_implementation", "Set machine.attn_implementation=sdpa, or eager."),
    ("requires", "model.name_or_path", "Install what is asked for, or choose another base."),
)
# Families that fail in the first step, found by the audit (docs/model_families.md), and why.
UNTRAINABLE = {
    "rwkv": "it rescales its own weights in place, which packed ones do not allow",
    "reformer": "its reversible layers pass no gradient to adapters",
}


def rehearse(run: Run) -> Run:
    """Build what a run is made of, without weights; return the run, its plan completed by what was found.

    Raises:
        UserInputError: If the run could not start, with every problem that was found.
    """
    problems: list[str] = []
    with _collecting(run, problems, "its trainer cannot be set up"):
        arguments_of(run)
    if (why := UNTRAINABLE.get(run.config.model_type)) is not None:
        problems.append(
            f"model.name_or_path: a model of type {run.config.model_type} cannot be trained here: {why}. Choose "
            "another base."
        )
    model = None
    with _collecting(run, problems, "its model cannot be built"):
        model = _without_weights(run)
    notes: list[str] = []
    if model is not None:
        notes = _what_is_left_out(run, model)
        with _collecting(run, problems, "it cannot be counted"):
            _check_share(run, model)
        if not run.recipe.trains_all:
            with _collecting(run, problems, "LoRA cannot be added"), torch.device("meta"):
                adapted = add_adapters(model, lora_config(run.recipe.adapter))
                _check_head(adapted)
        run = _without_checkpointing(run, model, problems)
    if len(problems) == 1:
        raise UserInputError(problems[0])
    if problems:
        raise RecipeError(problems, run.recipe.model.name_or_path)
    return replace(run, plan=replace(run.plan, notes=(*run.plan.notes, *notes)))


def _without_weights(run: Run) -> PreTrainedModel:
    """Build the base on the meta device, in NF4 if the recipe quantizes it."""
    quantization = run.recipe.quantization
    if quantization is None:
        refuse_stored_nf4(run.config, run.recipe.model.name_or_path)
        return skeleton(run.config)
    config = nf4_config(quantization, run.policy.compute_dtype, quant_storage=quant_storage_of(run))
    return in_nf4(skeleton(run.config), config)


@contextmanager
def _collecting(run: Run, problems: list[str], what: str) -> Generator[None, None, None]:
    """Note a refusal instead of raising it, whoever refuses: upstream raises errors of every kind."""
    try:
        yield
    except UserInputError as error:
        problems.extend(error.problems if isinstance(error, RecipeError) else [str(error)])
    except Exception as error:  # noqa: BLE001  # any other is one line too, with upstream's own words
        problems.append(_refusal(run, what, error))


def _refusal(run: Run, what: str, error: Exception) -> str:
    message = first_line(error)
    for words, key, remedy in REMEDIES:
        if words in message:
            return f"{key}: {message.rstrip('.')}. {remedy}"
    kind = run.config.model_type
    return (
        f"model.name_or_path: a model of type {kind} cannot be trained here, {what} ({type(error).__name__}: {message})"
    )


def _what_is_left_out(run: Run, model: PreTrainedModel) -> list[str]:
    """Say what is not trained though one might think so: towers, and layers that cannot have LoRA."""
    notes = []
    causal = causal_model(run.config)
    if causal is not None and causal.is_text_part:
        parts = ", ".join(name.removesuffix("_config") for name in causal.without)
        notes.append(f"text part: {type(model).__name__} alone is loaded and trained; left out: {parts or 'the rest'}")
    reasons: dict[str, set[str]] = {}
    if not run.recipe.trains_all and run.recipe.adapter.target_modules == "all-linear":
        for name, why in unadaptable(model).items():
            reasons.setdefault(why, set()).add(name.rsplit(".", 1)[-1])
    notes += [f"without LoRA: {', '.join(sorted(names))} ({why})" for why, names in reasons.items()]
    return notes


def _check_share(run: Run, model: PreTrainedModel) -> None:
    quantization = run.recipe.quantization
    if quantization is None or getattr(run.config.get_text_config(), "quantization_config", None) is not None:
        return  # a checkpoint that is stored in NF4 says itself what is; it is counted when it is loaded
    check_nf4_share(census(model), quantization.min_nf4_share, run.recipe.model.name_or_path)


def _check_head(model: PeftModel) -> None:
    base = cast("PreTrainedModel", model.get_base_model())
    head = base.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        name = next(name for name, module in base.named_modules() if module is head)
        raise UserInputError(
            f"lora.target_modules: {name} is the output layer, whose weight the training loss reads past any adapter. "
            "Remove it; all-linear takes every other linear layer."
        )


def _without_checkpointing(run: Run, model: PreTrainedModel, problems: list[str]) -> Run:
    """Switch activation checkpointing off for a model that has none, if the machine chose it; else note the problem."""
    if not run.plan.activation_checkpointing or model.supports_gradient_checkpointing:
        return run
    asked = run.recipe.machine.activation_checkpointing
    name = type(model).__name__
    if asked != "auto":
        problems.append(
            f"machine.activation_checkpointing: {name} cannot recompute activations, got {asked}. Write false or auto."
        )
        return run
    note = f"activation checkpointing: off, {name} has none"
    notes = [line for line in run.plan.notes if not line.startswith("activation checkpointing:")]
    return replace(
        run, plan=replace(run.plan, activation_checkpointing=False, checkpointed_blocks=None, notes=(*notes, note))
    )
