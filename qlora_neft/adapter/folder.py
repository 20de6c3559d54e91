"""Where an adapter is, and what is known of its training. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserInputError, first_line
from ..files import read_record
from ..paths import kind_of, resolve_bundled
from ..run_folder.checkpoints import find_checkpoints

WEIGHTS, CONFIG, RECIPE = "adapter_model.safetensors", "adapter_config.json", "recipe.yaml"
MEND = "Copy or download it again."  # a damaged file
SUMMARIES = ("summary.json", "training_summary.json")  # of a run's folder, of a published one
WANTED = ["*.json", "*.yaml", "*.jinja", "*.model", "*.txt", WEIGHTS]


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk and its records.

    Attributes:
        source: What the caller wrote: a folder or a Hub id.
        path: The folder; of a Hub id, its snapshot.
        config: ``adapter_config.json``.
        recipe: The resolved recipe it was trained with, as plain values; None if another program trained it.
        summary: What the run wrote at its end, None without one.
        own_base: The base to use in place of the recorded one, None for that.
    """

    source: str
    path: Path
    config: dict[str, Any]
    recipe: dict[str, Any] | None = None
    summary: dict[str, Any] | None = None
    own_base: str | None = None

    @property
    def base(self) -> str:
        """The base it was trained on: a Hub id or a folder; a bundled one as a folder.

        Raises:
            UserInputError: If none is recorded.
        """
        stated = (self.recipe or {}).get("model", {}).get("name_or_path")
        recorded = self.own_base or stated or self.config.get("base_model_name_or_path")
        if not recorded:
            raise UserInputError(f"{self.source}: {CONFIG} names no base_model_name_or_path. Give --base.")
        return resolve_bundled(recorded)

    @property
    def base_revision(self) -> str | None:
        """Hub branch, tag or commit of the base; None for the default, or with a base of the caller's own."""
        if self.own_base:
            return None
        return self.config.get("revision") or (self.recipe or {}).get("model", {}).get("revision")


def find_adapter(source: str | Path, *, revision: str | None = None, base: str | None = None) -> AdapterFolder:
    """Find an adapter by folder or Hub id.

    Args:
        source: The ``--output-dir`` of a run, one of its checkpoints, any PEFT adapter's folder, or a Hub id.
        revision: Hub branch, tag or commit of the adapter.
        base: Base model to use in place of the recorded one.

    Raises:
        UserInputError: If there is no LoRA adapter, with what is there instead.
    """
    source = str(source)
    path = Path(source).expanduser()
    if not path.is_dir():
        path = _downloaded(source, revision)
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        raise UserInputError(f"{source}: {_what_is_missing(path)}")
    config = read_record(path / CONFIG)
    if str(config.get("peft_type", "")).upper() != "LORA":
        raise UserInputError(f"{source}: must be a LoRA adapter, its peft_type is {config.get('peft_type')!r}.")
    found = [path / name for name in SUMMARIES if (path / name).is_file()]
    recipe = read_record(path / RECIPE) if (path / RECIPE).is_file() else _recipe_of_run(path)
    return AdapterFolder(source, path, config, recipe, read_record(found[0]) if found else None, base)


def _recipe_of_run(path: Path) -> dict[str, Any] | None:
    """A checkpoint's recipe lies in the folder of its run."""
    above = path.parent / RECIPE
    return read_record(above) if path.name.startswith("checkpoint-") and above.is_file() else None


def _what_is_missing(path: Path) -> str:
    if (path / CONFIG).is_file() and (path / "adapter_model.bin").is_file():
        return "holds a pickled adapter (adapter_model.bin), which is not loaded. Save it as safetensors with PEFT."
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
    """A Hub repository's files, without what no adapter needs."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if kind_of(source) != "hub" or "/" not in source:
        raise UserInputError(f"{source}: no such folder. Give the --output-dir of a run, or a Hub id (owner/name).")
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=WANTED))
    except (OSError, HFValidationError) as error:  # every error of the Hub's client and of the network below it
        raise UserInputError(
            f"{source}: no such folder, and the Hub gives no such model. Give the --output-dir of a run, or a Hub id "
            f"that you can reach. ({first_line(error)})"
        ) from error


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
