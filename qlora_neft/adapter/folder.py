"""An adapter on disk or on the Hub, and what its records say of its training. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserInputError
from ..files import read_record
from ..hub_client import download_errors, ready, why
from ..paths import kind_of, resolve_bundled
from ..recipe import Recipe, recipe_of_record
from ..recipe.schema import Quantization
from ..run_folder.checkpoints import PREFIX as CHECKPOINT
from ..run_folder.checkpoints import find_checkpoints
from ..run_folder.record import ModelCensus, RunData, RunSummary
from ..run_folder.tokenizer_files import FILES as TOKENIZER_FILES
from .config_schema import check_adapter_config

WEIGHTS, CONFIG, RECIPE = "adapter_model.safetensors", "adapter_config.json", "recipe.yaml"
SUMMARIES = ("summary.json", "training_summary.json")  # in a run's folder, in a published one
MEND = "Copy or download it again."  # remedy for a damaged file
# Files of a Hub repository. By their exact names: those of others, which its owner makes up, would be printed in the
# bars of the download as they are, and with them what a terminal obeys.
WANTED = [
    *(CONFIG, WEIGHTS, RECIPE, *SUMMARIES, *TOKENIZER_FILES, "config.json", "generation_config.json"),
    *(f"additional_chat_templates/{name}.jinja" for name in ("tool_use", "rag")),
]

# Initializations that leave the base as it is. Others (PiSSA, OLoRA ...) subtract from it, which a merge cannot see.
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
# Keys of adapter_config.json that make the update something other than B A.
NOT_PLAIN = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
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


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk and its records.

    Attributes:
        source: The folder or Hub id as the caller wrote it.
        path: The folder; for a Hub id, its snapshot.
        config: ``adapter_config.json``.
        recipe: The recipe it was trained with, as far as this version can use it; None if another program trained it.
        summary: What the run wrote at its end, None without one.
        own_base: The caller's base in place of the recorded one, None for the recorded one.
    """

    source: str
    path: Path
    config: dict[str, Any]
    recipe: Recipe | None = None
    summary: dict[str, Any] | None = None
    own_base: str | None = None

    @property
    def base(self) -> str:
        """The base: a Hub id or a folder; a bundled one as a folder.

        Raises:
            UserInputError: If none is recorded.
        """
        name = self.own_base or self.recorded_base
        if not name:
            raise UserInputError(f"{self.source}: {CONFIG} names no base_model_name_or_path. Give --base.")
        return resolve_bundled(name)

    @property
    def base_revision(self) -> str | None:
        """Hub branch, tag or commit of the base; None for the default, or for the caller's own base."""
        return None if self.own_base else self.recorded_revision

    @property
    def recorded_base(self) -> str | None:
        """The base it was trained on, as recorded: a Hub id, a folder or a bundled name; None without a record."""
        # The recipe first: where it says bundled:demo/base, PEFT wrote a path of the machine that trained.
        stated = self.recipe.model.name_or_path if self.recipe else None
        return stated or self.config.get("base_model_name_or_path")

    @property
    def recorded_revision(self) -> str | None:
        """Hub branch, tag or commit that the run asked for."""
        return self.config.get("revision") or (self.recipe.model.revision if self.recipe else None)

    @property
    def quantization(self) -> Quantization | None:
        """How the base was stored in training, None for not quantized; without a recipe as QLoRA's paper has it."""
        return self.recipe.quantization if self.recipe else Quantization()

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is a checkpoint inside its run's folder, where the records of the run are."""
        return self.path.name.startswith(CHECKPOINT)

    @property
    def data(self) -> RunData | None:
        """The record of the training data; None without one."""
        if self.summary is not None:
            return RunSummary.of(self.summary).data
        report = self.path.parent / "data_report.json"  # a run writes it at its beginning
        return RunData.of(read_record(report)) if self.is_checkpoint and report.is_file() else None

    @property
    def census(self) -> ModelCensus | None:
        """What its run counted on the loaded model; None without a record."""
        return RunSummary.of(self.summary).census


def find_adapter(source: str | Path, *, revision: str | None = None, base: str | None = None) -> AdapterFolder:
    """Find an adapter by folder or Hub id.

    Args:
        source: The ``--output-dir`` of a run, one of its checkpoints, any PEFT adapter's folder, or a Hub id.
        revision: Hub branch, tag or commit of the adapter.
        base: Base model to use in place of the recorded one.

    Raises:
        UserInputError: If there is no LoRA adapter; the message says what is there instead.
    """
    source = str(source)
    path = Path(source).expanduser()
    # A folder wins over a Hub id of the same name, as in transformers.
    if not path.is_dir():
        path = _downloaded(source, revision)
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        raise UserInputError(f"{source}: {_what_is_missing(path)}")
    config = read_record(path / CONFIG)
    # Prompt tuning, IA3 and others write the same two files.
    if str(config.get("peft_type", "")).upper() != "LORA":
        raise UserInputError(f"{source}: must be a LoRA adapter, its peft_type is {config.get('peft_type')!r}.")
    check_adapter_config(config, source)
    summaries = [path / name for name in SUMMARIES if (path / name).is_file()]
    summary = read_record(summaries[0]) if summaries else None
    return AdapterFolder(source, path, config, recorded_recipe(path), summary, base)


def beyond_plain(config: Mapping[str, Any]) -> list[str]:
    """Return the settings of ``adapter_config.json`` that a merge of ``scale * B @ A`` and whole modules would miss."""
    used = [key for key in NOT_PLAIN if config.get(key)]
    if config.get("bias", "none") != "none":
        used.append(f"bias={config['bias']}")
    if config.get("init_lora_weights", True) not in PLAIN_INITS:
        used.append(f"init_lora_weights={config['init_lora_weights']}")
    return used


def beyond_merging(config: Mapping[str, Any]) -> list[str]:
    """Return the settings that a merge here would miss: it knows `beyond_plain` but for adapted stacks of experts."""
    return [key for key in beyond_plain(config) if key != "target_parameters"]


def stack_owners(config: Mapping[str, Any]) -> set[str]:
    """Return the ends of the names of modules whose adapted parameters are stacks of experts, such as ``experts``."""
    parameters = config.get("target_parameters") or []
    # The weight of a linear layer may be named as well; it has the layer's own adapter.
    return {name.rpartition(".")[0] for name in parameters if not name.endswith(".weight")}


def recorded_recipe(path: Path) -> Recipe | None:
    """Read the recipe beside an adapter; a checkpoint's is in the folder of its run."""
    files = [path / RECIPE, *([path.parent / RECIPE] if path.name.startswith(CHECKPOINT) else [])]
    file = next((file for file in files if file.is_file()), None)
    return recipe_of_record(read_record(file)) if file else None


def _what_is_missing(path: Path) -> str:
    # A pickle may run code when it is read.
    if (path / CONFIG).is_file() and (path / "adapter_model.bin").is_file():
        return "holds a pickled adapter (adapter_model.bin), which is not loaded. Save it as safetensors with PEFT."
    recipe = recorded_recipe(path)
    if recipe is not None and recipe.trains_all and (path / "config.json").is_file():
        return (
            "holds a full model, trained without an adapter (lora: null), which needs no base: there is nothing to "
            f"merge or export. Load it with AutoModelForCausalLM.from_pretrained({str(path)!r}), publish it with hf "
            "upload, or name it as model.name_or_path of another recipe."
        )
    # The likeliest mistake: a run that was interrupted, whose checkpoints would do.
    newest = find_checkpoints(path).newest
    if newest is not None:
        return (
            f"the run in this folder is not finished. Finish it with the same train command, or name its newest "
            f"checkpoint: {newest.path}"
        )
    if (path / "config.json").is_file():
        return f"holds a model and no adapter ({WEIGHTS} and {CONFIG}). Give the --output-dir of a run."
    return f"holds no adapter ({WEIGHTS} and {CONFIG}). Give the --output-dir of a finished run, or a Hub id."


def _downloaded(source: str, revision: str | None) -> Path:
    """Fetch a Hub repository's files, except those no adapter needs."""
    from huggingface_hub import snapshot_download

    # A name without an owner is a mistyped folder more often than one of the Hub's few models without.
    if kind_of(source) != "hub" or "/" not in source:
        raise UserInputError(f"{source}: no such folder. Give the --output-dir of a run, or a Hub id (owner/name).")
    ready()
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=WANTED))
    except download_errors() as error:
        raise UserInputError(
            f"{source}: no such folder, and the Hub gives no such model. Give the --output-dir of a run, or a Hub id "
            f"that you can reach. ({why(error)})"
        ) from error
