"""An adapter on its NF4 base, ready to answer: what was trained, on a GPU or a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..base.config import load_tokenizer
from ..base.nf4 import load_nf4_base, nf4_config
from ..base.precision import PrecisionPolicy, resolve_precision
from ..errors import UserInputError, first_line
from ..files import read_record
from ..recipe.schema import Quantization
from .folder import MEND, WEIGHTS, AdapterFolder, find_adapter
from .prompts import Prompts, recorded_template, template_of


def tokenizer_of_adapter(folder: AdapterFolder) -> Any:
    """The tokenizer saved beside the adapter, else the base's."""
    if (folder.path / "tokenizer_config.json").is_file():
        return load_tokenizer(str(folder.path))
    with naming_the_base(folder):
        return load_tokenizer(folder.base, revision=folder.base_revision)


@contextmanager
def naming_the_base(folder: AdapterFolder) -> Iterator[None]:
    """What is wrong with a base, in the words of who loads an adapter: ``model.name_or_path`` is a recipe's.

    Raises:
        UserInputError: With ``--base``, or with the adapter whose base it is and how to give another.
    """
    try:
        yield
    except UserInputError as error:
        rule = str(error).removeprefix("model.name_or_path: ")
        if folder.own_base:
            raise UserInputError(f"--base: {rule}") from error
        raise UserInputError(f"{folder.source}: its base: {rule} Another place of the base: --base.") from error


@dataclass(frozen=True)
class Trained:
    """A trained model.

    Attributes:
        folder: Where its adapter is.
        model: NF4 base and adapter, in eval mode.
        tokenizer: Its own, with a pad token.
        prompts: As it was trained.
        policy: How this machine computes.
        template_is_guessed: No record says what it was prompted with, and the caller did not.
    """

    folder: AdapterFolder
    model: PeftModel
    tokenizer: Any
    prompts: Prompts
    policy: PrecisionPolicy
    template_is_guessed: bool = False

    @property
    def stop_token_ids(self) -> list[int]:
        """What ends an answer: the template's end token, the tokenizer's, and those the base's own settings name.

        A chat model may have several. Of the base's only special tokens count: settings that name a word do exist.
        """
        tokenizer = self.tokenizer
        named = self.model.get_base_model().generation_config.eos_token_id
        named = [named] if isinstance(named, int) else named or []
        added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
        special = {*tokenizer.all_special_ids, *added} - {tokenizer.bos_token_id, tokenizer.unk_token_id}
        return sorted({*self.prompts.stop_token_ids, *(special & set(named))})

    @contextmanager
    def base_alone(self) -> Iterator[None]:
        """Inside, the model is the base without the adapter."""
        with self.model.disable_adapter():
            yield


def load_trained(
    source: str | Path | AdapterFolder,
    *,
    revision: str | None = None,
    base: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    prompt_template: str | None = None,
) -> Trained:
    """Load an adapter on its base in NF4, as it was trained.

    Args:
        source: As in `find_adapter`, or what it found.
        revision: Hub revision of the adapter.
        base: Base model in place of the recorded one.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``auto``, ``bf16``, ``fp16`` or ``fp32``.
        prompt_template: In place of that of the training run.

    Raises:
        UserInputError: If adapter, base or template cannot be loaded, or do not belong together.
    """
    folder = source if isinstance(source, AdapterFolder) else find_adapter(source, revision=revision, base=base)
    quantization = (folder.recipe or {}).get("quantization", {})
    policy = resolve_precision(precision, device, quantization.get("bnb_4bit_compute_dtype", "auto"))
    tokenizer = tokenizer_of_adapter(folder)
    records = folder.recipe, _summary(folder)
    prompts = _prompts(tokenizer, records, prompt_template)
    is_guessed = prompt_template is None and recorded_template(*records) is None
    base_model = nf4_base_of(folder, policy)
    return Trained(folder, with_adapter(base_model, folder), tokenizer, prompts, policy, is_guessed)


def _summary(folder: AdapterFolder) -> dict[str, Any] | None:
    """What is known of the data: of a checkpoint, what its run wrote at its beginning."""
    report = folder.path.parent / "data_report.json"
    if folder.summary is None and folder.path.name.startswith("checkpoint-") and report.is_file():
        return {"data": read_record(report)}
    return folder.summary


def _prompts(
    tokenizer: Any, records: tuple[dict[str, Any] | None, dict[str, Any] | None], wanted: str | None
) -> Prompts:
    try:
        return Prompts(tokenizer, wanted or template_of(*records, tokenizer))
    except UserInputError as error:
        raise UserInputError(f"--prompt-template: {error}") from error


def nf4_base_of(folder: AdapterFolder, policy: PrecisionPolicy) -> PreTrainedModel:
    """The base as it was in training: NF4, double quantization as the recipe has it (on without one)."""
    double_quant = (folder.recipe or {}).get("quantization", {}).get("bnb_4bit_use_double_quant", True)
    section = Quantization(bnb_4bit_use_double_quant=double_quant)
    with naming_the_base(folder):
        return load_nf4_base(
            folder.base,
            device=policy.device,
            compute_dtype=policy.compute_dtype,
            quantization_config=nf4_config(section, policy.compute_dtype),
            revision=folder.base_revision,
        )


def with_adapter(base: PreTrainedModel, folder: AdapterFolder) -> PeftModel:
    """Put the adapter on a base, in eval mode.

    Raises:
        UserInputError: If the adapter does not fit the base.
    """
    try:
        return PeftModel.from_pretrained(base, str(folder.path)).eval()
    except SafetensorError as error:
        raise UserInputError(f"{folder.source}: {WEIGHTS} cannot be read ({error}). {MEND}") from error
    except (RuntimeError, ValueError) as error:
        raise UserInputError(
            f"{folder.source}: the adapter does not fit the base {folder.base!r}. Give the base it was trained on "
            f"with --base. ({first_line(error)})"
        ) from error
