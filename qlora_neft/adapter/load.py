"""An adapter on its NF4 base, as it was trained, ready to answer on a GPU or a CPU."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, PeftModelForCausalLM
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base.config import load_tokenizer
from ..base.expert_lora import for_experts
from ..base.nf4 import load_nf4_base, load_unquantized_base, nf4_config
from ..base.precision import PrecisionPolicy, resolve_precision
from ..errors import UserInputError, first_line
from .folder import MEND, PLAIN_INITS, WEIGHTS, AdapterFolder, find_adapter
from .names import check_names
from .prompts import Prompts, prompts_of, recorded_template
from .spelling import key_mapping


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model that answers.

    Attributes:
        model: The model, in eval mode.
        tokenizer: The model's own, with a pad token.
        prompts: Requests in its prompt template.
        policy: How this machine computes.
        template_is_guessed: Whether neither a record nor the caller says which prompt template it was trained with.
    """

    model: PeftModel | PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts
    policy: PrecisionPolicy
    template_is_guessed: bool = False

    @property
    def stop_token_ids(self) -> list[int]:
        """Tokens that end an answer: the template's end token, the tokenizer's, and those the base's settings name.

        A chat model may have several. Of those in the base's ``generation_config.json`` only special tokens count:
        some of these files name an ordinary word.
        """
        tokenizer = self.tokenizer
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        named = getattr(model.generation_config, "eos_token_id", None)
        named = [named] if isinstance(named, int) else named or []
        added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
        # Begin and unknown token are special as well, but end nothing.
        special = {*tokenizer.all_special_ids, *added} - {tokenizer.bos_token_id, tokenizer.unk_token_id}
        return sorted({*self.prompts.stop_token_ids, *(special & set(named))})


@dataclass(frozen=True, kw_only=True)
class Trained(Loaded):
    """A trained model: NF4 base and adapter, with requests as it was trained with.

    Attributes:
        folder: Where its adapter is.
        model: Base and adapter.
    """

    folder: AdapterFolder
    model: PeftModel

    @contextmanager
    def base_alone(self) -> Generator[None, None, None]:
        """Disable the adapter inside the block."""
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
    """Load an adapter on its base, as it was trained: in NF4, or unquantized if its recipe says so.

    Args:
        source: As in `find_adapter`, or what it found.
        revision: Hub revision of the adapter.
        base: Base model in place of the recorded one.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``auto``, ``bf16``, ``fp16`` or ``fp32``.
        prompt_template: Template in place of that of the training run.

    Raises:
        UserInputError: If adapter, base or template cannot be loaded, or do not belong together.
    """
    folder = source if isinstance(source, AdapterFolder) else find_adapter(source, revision=revision, base=base)
    section = folder.quantization
    policy = resolve_precision(precision, device, "auto" if section is None else section.bnb_4bit_compute_dtype)
    check_names(folder)
    check_runs_nothing(folder)
    # Tokenizer and template come before gigabytes of weights, so that a mistake in them shows at once.
    tokenizer = tokenizer_of_adapter(folder)
    try:
        prompts = prompts_of(folder, tokenizer, prompt_template)
    except UserInputError as error:
        raise UserInputError(f"--prompt-template: {error}") from error
    is_guessed = prompt_template is None and recorded_template(folder) is None
    model = with_adapter(base_of_adapter(folder, policy), folder)
    return Trained(
        folder=folder, model=model, tokenizer=tokenizer, prompts=prompts, policy=policy, template_is_guessed=is_guessed
    )


def tokenizer_of_adapter(folder: AdapterFolder) -> PreTrainedTokenizerBase:
    """Load the tokenizer saved beside the adapter, else the base's."""
    # The run's own first: it may have a chat template or an end token that the base lacks.
    if (folder.path / "tokenizer_config.json").is_file():
        return load_tokenizer(str(folder.path))
    with naming_the_base(folder):
        return load_tokenizer(folder.base, revision=folder.base_revision)


def base_of_adapter(folder: AdapterFolder, policy: PrecisionPolicy) -> PreTrainedModel:
    """Load the base as it was in training: in NF4, or not quantized."""
    with naming_the_base(folder):
        if folder.quantization is None:
            return load_unquantized_base(
                folder.base, device=policy.device, dtype=policy.compute_dtype, revision=folder.base_revision
            )
        return load_nf4_base(
            folder.base,
            device=policy.device,
            compute_dtype=policy.compute_dtype,
            # As the run stored it: other constants give other weights, which the adapter was not trained on.
            quantization_config=nf4_config(folder.quantization, policy.compute_dtype),
            revision=folder.base_revision,
        )


def with_adapter(base: PreTrainedModel, folder: AdapterFolder, *, is_trainable: bool = False) -> PeftModel:
    """Put the adapter on a base, in eval mode; every tensor of its file is used, and none of the model's is missing.

    Args:
        base: The loaded base.
        folder: The adapter.
        is_trainable: Whether it goes on training.

    Raises:
        UserInputError: If the adapter does not fit the base, or only a part of it would be loaded.
    """
    check_runs_nothing(folder)
    try:
        config = PeftConfig.from_pretrained(str(folder.path))
        if isinstance(config, LoraConfig):
            config = for_experts(config)
        config.inference_mode = not is_trainable
        made = PeftModelForCausalLM if config.task_type == "CAUSAL_LM" else PeftModel
        # What PeftModel.from_pretrained does, which keeps the names that found no match to itself, and only warns.
        model = made(base, config)
        mapping = key_mapping(model) or getattr(base, "_checkpoint_conversion_mapping", {})
        found = model.load_adapter(str(folder.path), "default", is_trainable=is_trainable, key_mapping=mapping)
    except SafetensorError as error:
        raise UserInputError(f"{folder.source}: {WEIGHTS} cannot be read ({error}). {MEND}") from error
    # PEFT raises ValueError for target modules that the base lacks, KeyError for modules_to_save that the file lacks;
    # torch RuntimeError for other shapes.
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserInputError(
            f"{folder.source}: the adapter does not fit the base {folder.base!r}. Give the base it was trained on "
            f"with --base. ({first_line(error)})"
        ) from error
    _check_all_used(folder, found.missing_keys, found.unexpected_keys)
    return model.eval()


def check_runs_nothing(folder: AdapterFolder) -> None:
    """Refuse what runs when PEFT loads it: a decomposition of the base, or a module that the configuration names.

    Raises:
        UserInputError: If there is such a setting.
    """
    config = folder.config
    if config.get("megatron_config"):  # PEFT imports the module that megatron_core names
        raise UserInputError(f"{folder.source}: adapter_config.json sets megatron_config, which is not loaded here.")
    if config.get("init_lora_weights", True) not in PLAIN_INITS:
        raise UserInputError(
            f"{folder.source}: adapter_config.json sets init_lora_weights: {config['init_lora_weights']!r}, which "
            "changes the base as it is loaded, so it is not. Convert the adapter with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)."
        )


def _check_all_used(folder: AdapterFolder, missing: list[str], unused: list[str]) -> None:
    """Refuse an adapter of which a part was not loaded: PEFT leaves out what it does not know, and the base answers.

    Raises:
        UserInputError: With a name of each kind.
    """
    if not missing and not unused:
        return
    parts = []
    if unused:
        parts.append(f"{len(unused)} weights of its file have no place in the model, such as {unused[0]}")
    if missing:
        parts.append(f"{len(missing)} weights of the model are not in its file, such as {missing[0]}")
    raise UserInputError(
        f"{folder.source}: the adapter does not fit the base {folder.base!r}: {'; '.join(parts)}. Give the base it was "
        "trained on with --base, or copy the adapter again."
    )


@contextmanager
def naming_the_base(folder: AdapterFolder) -> Generator[None, None, None]:
    """Let errors about a base name the caller's ``--base``, or the adapter, in place of ``model.name_or_path``.

    Raises:
        UserInputError: In place of one that names a recipe's key, which the caller never wrote.
    """
    try:
        yield
    except UserInputError as error:
        rule = str(error).removeprefix("model.name_or_path: ")
        if folder.own_base:
            raise UserInputError(f"--base: {rule}") from error
        raise UserInputError(
            f"{folder.source}: its base: {rule} To take the base from another place, give --base."
        ) from error
