"""What there is to know of an adapter before anything loads it: its configuration, its weights' header, its base."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import UserInputError
from ..fit import read_config
from ..trained.folder import MEND, WEIGHTS, AdapterFolder
from ..trained.kinds import beyond_plain

A, B = ".lora_A.weight", ".lora_B.weight"
_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")


@dataclass(frozen=True)
class Facts:
    """An adapter, as other programs will find it.

    Attributes:
        source: What the caller named.
        config: ``adapter_config.json``.
        base: Hub id or folder of the base.
        base_config: The base's ``config.json``; None where it is out of reach.
        ranks: By module, from the shapes of the weights.
        others: Weights that are no matrix A or B.
        dtypes: Of the weights, as safetensors names them.
        largest_token: Largest id of the tokenizer beside the adapter, None without one.
    """

    source: str
    config: dict[str, Any]
    base: str
    base_config: dict[str, Any] | None
    ranks: dict[str, int]
    others: tuple[str, ...]
    dtypes: tuple[str, ...]
    largest_token: int | None

    @property
    def rank(self) -> int:
        """The largest."""
        return max(self.ranks.values(), default=self.config.get("r", 0))

    @property
    def model_type(self) -> str | None:
        """The base's architecture, as transformers names it."""
        return (self.base_config or {}).get("model_type")

    @property
    def odd_scale(self) -> str | None:
        """What makes the scale of a module other than ``lora_alpha / r``, None if nothing does."""
        used = [key for key in ("use_rslora", "alpha_pattern", "rank_pattern") if self.config.get(key)]
        return " and ".join(used) or None

    @property
    def beyond_matrices(self) -> list[str]:
        """What the adapter has besides pairs of matrices, by the words of its configuration."""
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
        last = {module.split(".")[-1] for module in self.ranks}
        return sorted(last & {"embed_tokens", "lm_head", "wte"})

    @property
    def has_head_of_tied_base(self) -> bool:
        """Whether it changes a head that is the embedding."""
        return "lm_head" in self.embedding_modules and bool((self.base_config or {}).get("tie_word_embeddings"))

    @property
    def only_peft_merges(self) -> bool:
        """Whether `qlora-neft merge` refuses its kind: other than plain, or on an embedding."""
        return bool(beyond_plain(self.config) or {"embed_tokens", "wte"} & set(self.embedding_modules))

    @property
    def base_is_local(self) -> bool:
        """Whether the recorded base is a path, which nobody else has."""
        recorded = str(self.config.get("base_model_name_or_path") or "")
        return recorded.startswith((".", "/", "~")) or recorded.count("/") > 1 or Path(recorded).is_dir()

    @property
    def new_tokens(self) -> int:
        """Token ids of its tokenizer that the base has no row for."""
        rows = (self.base_config or {}).get("vocab_size")
        return 0 if rows is None or self.largest_token is None else max(0, self.largest_token + 1 - rows)


def facts_of(folder: AdapterFolder) -> Facts:
    """Read an adapter's files; of the base, its configuration alone.

    Raises:
        UserInputError: If the weights cannot be read, or no base is recorded.
    """
    ranks, others, dtypes = _weights(folder.path / WEIGHTS)
    try:
        base_config, _ = read_config(folder.base, folder.base_revision or "main")
    except UserInputError:  # a base that is out of reach is part of the answer
        base_config = None
    return Facts(
        source=folder.source,
        config=folder.config,
        base=folder.base,
        base_config=base_config,
        ranks=ranks,
        others=others,
        dtypes=dtypes,
        largest_token=_largest_token(folder.path / "tokenizer.json"),
    )


def _weights(path: Path) -> tuple[dict[str, int], tuple[str, ...], tuple[str, ...]]:
    ranks, others, dtypes = {}, [], set()
    try:
        with safe_open(path, "np") as stored:
            for key in stored.keys():  # noqa: SIM118  (it is no dictionary)
                piece = stored.get_slice(key)
                dtypes.add(piece.get_dtype())
                if key.endswith((A, _EMBEDDING[0])):
                    module = key.removesuffix(A).removesuffix(_EMBEDDING[0]).removeprefix("base_model.model.")
                    ranks[module] = piece.get_shape()[0]
                elif not key.endswith((B, _EMBEDDING[1])):
                    others.append(key)
    except (OSError, SafetensorError) as error:
        raise UserInputError(f"{path}: cannot be read ({error}). {MEND}") from error
    return ranks, tuple(sorted(others)), tuple(sorted(dtypes))


def _largest_token(path: Path) -> int | None:
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        vocab = stored["model"]["vocab"]
        ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
        return max([*ids, *(token["id"] for token in stored["added_tokens"])])
    except (ValueError, KeyError, TypeError) as error:
        raise UserInputError(f"{path}: is no tokenizer ({error!r}).") from error
