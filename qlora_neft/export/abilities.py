"""What is known of an adapter, and what the verbs can do with it: merge it, write it as GGUF.

One answer, for `check`, the model card, the lines at the end of a run and the verbs themselves: where a rule cannot be
read from names and configurations, the verb's own planning is asked, which reads headers and no weight. No torch is
imported for adapters and bases of the ordinary kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..adapter.folder import AdapterFolder, beyond_merging, beyond_plain
from ..adapter.names import base_names, fault_of
from ..adapter.weights import AdapterWeights
from ..base.model_files import tensors_at_hand
from ..errors import UserInputError
from ..files import read_json
from ..fit import read_config
from ..fit.geometry import FAMILIES
from ..paths import kind_of
from ..run_folder.tokenizer_files import CONFIG as TOKENIZER_CONFIG
from ..run_folder.tokenizer_files import needs_transformers_5

GGUF_TYPES = ("llama", "mistral", "qwen2", "qwen3")  # model_type of bases that `qlora-neft gguf` writes
EMBEDDINGS = {"embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings"}
OF_TEXT_PART = (
    "its layers are named after the text part of {base}; a program that loads the whole model does not find them"
)
# Keys of config.json that may mean what llama.cpp does not compute; the rules themselves are the GGUF writer's.
_UNUSUAL = ("rope_scaling", "rope_parameters", "partial_rotary_factor", "layer_types", "use_sliding_window")


@dataclass(frozen=True)
class Abilities:
    """Why a verb refuses an adapter, None where it does not.

    Attributes:
        merge: `qlora-neft merge`.
        merged_gguf: `qlora-neft gguf` on what merge writes.
        adapter_gguf: `qlora-neft gguf` on the adapter.
    """

    merge: str | None = None
    merged_gguf: str | None = None
    adapter_gguf: str | None = None


@dataclass(frozen=True)
class Facts:
    """An adapter as other programs will find it.

    Attributes:
        source: The name the caller gave.
        config: Content of ``adapter_config.json``.
        base: Hub id or folder of the base.
        base_config: The base's ``config.json``; None if it cannot be reached.
        ranks: Rank of each module, from the shapes of its weights.
        others: Weights other than the matrices A and B.
        dtypes: Dtypes of the weights, as safetensors names them.
        largest_token: Largest id of the tokenizer beside the adapter, None without one.
        tokenizer_fault: What in its tokenizer's configuration transformers 4 cannot load, None if nothing is known.
        fault: Why its file is not a whole adapter of this base, None if nothing can be seen.
        abilities: What the verbs of this program can do with it; None if only its configuration is known.
        in_nf4: Whether the base was in NF4 in training.
    """

    source: str
    config: dict[str, Any]
    base: str
    base_config: dict[str, Any] | None
    ranks: dict[str, int]
    others: tuple[str, ...]
    dtypes: tuple[str, ...]
    largest_token: int | None
    tokenizer_fault: str | None = None
    fault: str | None = None
    abilities: Abilities | None = None
    in_nf4: bool = True

    @property
    def rank(self) -> int:
        """Largest rank of any module."""
        return max(self.ranks.values(), default=self.config.get("r", 0))

    @property
    def model_type(self) -> str | None:
        """Architecture of the base, as transformers names it."""
        return (self.base_config or {}).get("model_type")

    @property
    def recorded_base(self) -> str:
        """Base that ``adapter_config.json`` names, empty without one."""
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def base_is_local(self) -> bool:
        """Whether the recorded base is a path, which nobody else has."""
        return kind_of(self.recorded_base) != "hub"

    @property
    def odd_scale(self) -> str | None:
        """Settings that scale a module by anything other than ``lora_alpha / r``; None without any."""
        used = [key for key in ("use_rslora", "alpha_pattern", "rank_pattern") if self.config.get(key)]
        return " and ".join(used) or None

    @property
    def beyond_matrices(self) -> list[str]:
        """Parts of the adapter besides the matrices A and B, in the words of its configuration."""
        config = self.config
        found = [key for key in ("use_dora", "modules_to_save", "trainable_token_indices") if config.get(key)]
        if config.get("bias", "none") != "none" or config.get("lora_bias"):
            found.append("bias")
        if self.others and not found:
            found.append(f"weights such as {self.others[0]}")
        return found

    @property
    def embedding_modules(self) -> list[str]:
        """Modules with LoRA that are an embedding or the head."""
        # GPT-2 calls its embedding "wte".
        last = {module.split(".")[-1] for module in self.ranks}
        return sorted(last & EMBEDDINGS)

    @property
    def has_head_of_tied_base(self) -> bool:
        """Whether it changes a head that shares its weight with the embedding."""
        return "lm_head" in self.trained_ends and self.has_tied_base

    @property
    def trained_ends(self) -> list[str]:
        """Embedding and head, if they were trained: by LoRA, or whole."""
        whole = {part for name in self.others for part in name.split(".")} & EMBEDDINGS
        return sorted({*self.embedding_modules, *whole, *(EMBEDDINGS & {*(self.config.get("modules_to_save") or ())})})

    @property
    def has_tied_base(self) -> bool:
        """Whether the base's head shares its weight with the embedding; what a known base leaves out has a default."""
        config = self.base_config or {}
        if "tie_word_embeddings" in config or config.get("model_type") not in FAMILIES:
            return bool(config.get("tie_word_embeddings"))
        return bool(FAMILIES[config["model_type"]][1].get("tie_word_embeddings"))

    @property
    def is_of_text_part(self) -> bool:
        """Whether its layers are named after the text part of a base that also sees or hears.

        Whoever loads the whole base finds no layer of these names, and mostly goes on without the adapter.
        """
        inside = {"language_model", "text_model"}  # of an adapter that was trained on the whole model
        return "text_config" in (self.base_config or {}) and not any(inside & {*n.split(".")} for n in self.ranks)

    @property
    def is_lost_to_peft(self) -> bool:
        """Whether it is of a text part that AutoModelForCausalLM, by which PEFT loads a base, does not load alone."""
        if not self.is_of_text_part:
            return False
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(self.model_type or "")
        return name is None or name.endswith("ForConditionalGeneration")

    @property
    def new_tokens(self) -> int:
        """Number of the tokenizer's ids for which the base has no row."""
        rows = (self.base_config or {}).get("vocab_size")
        return 0 if rows is None or self.largest_token is None else max(0, self.largest_token + 1 - rows)


def facts_of(folder: AdapterFolder) -> Facts:
    """Read an adapter's files and its base's configuration; no weight is loaded.

    Raises:
        UserInputError: If the weights cannot be read, or no base is recorded.
    """
    weights = AdapterWeights(folder)
    try:
        # The planner's reader: it knows the configurations of well-known bases without asking the Hub.
        base_config, _ = read_config(folder.base, folder.base_revision or "main")
    except UserInputError:  # a base that cannot be reached is part of the answer
        base_config = None
    facts = Facts(
        source=folder.source,
        config=folder.config,
        base=folder.base,
        base_config=base_config,
        ranks=weights.ranks | weights.embedding_ranks,
        others=weights.others,
        dtypes=weights.dtypes,
        largest_token=_largest_token(folder.path / "tokenizer.json"),
        tokenizer_fault=_tokenizer_fault(folder),
        fault=fault_of(weights, base_names(folder, base_config, _num_equal_layers(base_config))),
        in_nf4=folder.quantization is not None,
    )
    return replace(facts, abilities=abilities_of(folder, facts))


def _tokenizer_fault(folder: AdapterFolder) -> str | None:
    """Ask the tokenizer beside the adapter, else that of a base on this machine."""
    own = (folder.path / TOKENIZER_CONFIG).is_file()
    return needs_transformers_5(folder.path if own else Path(folder.base).expanduser())


def _num_equal_layers(config: dict[str, Any] | None) -> int | None:
    """Return the number of blocks of a family all of whose blocks have the same layers."""
    stated = config or {}
    is_mixture = any(stated.get(key) for key in ("num_experts", "num_local_experts"))
    return None if is_mixture or stated.get("model_type") not in FAMILIES else stated.get("num_hidden_layers")


def _largest_token(path: Path) -> int | None:
    if not path.is_file():
        return None
    try:
        stored = read_json(path)
        vocab = stored["model"]["vocab"]
        ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))  # Unigram lists its tokens in order
        return max([*ids, *(token["id"] for token in stored["added_tokens"])])
    except (ValueError, KeyError, TypeError) as error:
        raise UserInputError(f"{path}: is not a tokenizer ({error!r}).") from error


# ---- What the verbs can do ----


def abilities_of(folder: AdapterFolder, facts: Facts) -> Abilities:
    """Ask what each verb would say; nothing is fetched and no weight is read."""
    merge = facts.fault or _merge_refusal(folder, facts)
    base = _base_gguf_refusal(folder, facts)
    return Abilities(merge, merge or base or _tokenizer_refusal(folder, facts), _adapter_gguf_refusal(facts) or base)


def _merge_refusal(folder: AdapterFolder, facts: Facts) -> str | None:
    used = beyond_merging(facts.config)
    if used:
        return f"only plain LoRA can be merged here, the adapter has {', '.join(used)}"
    embeddings = sorted(set(facts.embedding_modules) - {"lm_head", "embed_out"})
    if embeddings:
        return f"it has a LoRA on {', '.join(embeddings)}"
    if facts.trained_ends and facts.has_tied_base:
        return f"{', '.join(facts.trained_ends)} was trained and is shared by embedding and head in this base"
    # Of the counted families nothing else can go wrong; others, and whole modules, are what planning a merge decides.
    is_ordinary = (facts.model_type is None or facts.model_type in FAMILIES) and not facts.others
    if is_ordinary or tensors_at_hand(folder.base, folder.base_revision) is None:
        return None
    from .merge.plan import plan_merge

    return _refusal(facts, lambda: plan_merge(folder))


def _base_gguf_refusal(folder: AdapterFolder, facts: Facts) -> str | None:
    """Return what of the base cannot be written; None too if it is not known."""
    config = facts.base_config
    if config is None:
        return None
    if facts.model_type not in GGUF_TYPES:
        return f"qlora-neft gguf does not write {facts.model_type}"
    if config.get("hidden_act", "silu") == "silu" and not any(config.get(key) for key in _UNUSUAL):
        return None
    from .gguf.architecture import architecture_of, read_model_config

    def ask() -> None:
        architecture_of(_unquantized(read_model_config(folder.base, folder.base_revision)), facts.source)

    return _refusal(facts, ask)


def _unquantized(config: Any) -> Any:
    """Return a base's configuration as merge writes it: in 16 bits."""
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


def _tokenizer_refusal(folder: AdapterFolder, facts: Facts) -> str | None:
    """Return why llama.cpp does not have the tokenizer, None too if its file is not here."""
    places = (folder.path, Path(folder.base).expanduser())
    path = next((place / "tokenizer.json" for place in places if (place / "tokenizer.json").is_file()), None)
    if path is None:
        return None
    from .gguf.vocabulary import splitting_of

    try:
        stored = {"normalizer": None, "pre_tokenizer": None, **read_json(path)}
        return _refusal(facts, lambda: splitting_of(stored, facts.source))
    except (ValueError, KeyError, TypeError) as error:
        return f"{path} is not a tokenizer ({error!r})"


def _adapter_gguf_refusal(facts: Facts) -> str | None:
    if facts.fault is not None:
        return facts.fault
    used = beyond_plain(facts.config)
    if used:
        return f"a LoRA GGUF has no place for {', '.join(used)}"
    if facts.others or {*facts.embedding_modules} - {"lm_head"}:
        return f"a LoRA GGUF holds the matrices A and B only, not {', '.join(facts.beyond_matrices) or 'embeddings'}"
    if facts.has_head_of_tied_base:
        return "it has a LoRA on lm_head, which is the embedding in this base"
    return None


def _refusal(facts: Facts, ask: Callable[[], object]) -> str | None:
    """Return a verb's own reason for refusing, None if it does not."""
    try:
        ask()
    except UserInputError as error:
        return str(error).removeprefix(f"{facts.source}: ").rstrip(".")
    return None
