"""Which tools can use an adapter: as it is, with a flag, or not at all; why, and what to do instead.

The rules for vLLM were read from ``vllm/lora/peft_helper.py`` and ``vllm/config/lora.py``, those for Ollama from
``docs/import.mdx`` and ``convert/convert.go``; neither was run. The rules for llama.cpp come from
``convert_lora_to_gguf.py`` and ``src/llama-adapter.cpp``. llama.cpp, transformers and PEFT are run in the tests.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..adapter.folder import AdapterFolder, beyond_plain
from ..adapter.names import base_names, fault_of
from ..adapter.weights import AdapterWeights
from ..errors import UserInputError
from ..files import read_json
from ..fit import read_config
from ..fit.geometry import FAMILIES
from ..paths import kind_of
from ..run_folder.tokenizer_files import CONFIG as TOKENIZER_CONFIG
from ..run_folder.tokenizer_files import needs_transformers_5

WORKS, FLAG, BREAKS = "works", "works with a flag", "breaks"
# Values of --max-lora-rank. vLLM's LoRAConfig had these as possible_max_ranks; v0.26 (MaxLoRARanks in
# https://github.com/vllm-project/vllm/blob/v0.26.0/vllm/config/lora.py) accepts 1 as well. It is omitted here: no
# adapter needs it, since the default covers every rank up to 16, and older versions reject it.
VLLM_DEFAULT_RANK = 16
VLLM_RANKS = (8, VLLM_DEFAULT_RANK, 32, 64, 128, 256, 320, 512)
GGUF_TYPES = ("llama", "mistral", "qwen2", "qwen3")  # model_type of bases that `qlora-neft gguf` writes
OLLAMA_TYPES = ("llama", "mistral", "mixtral", "gemma", "gemma2")  # and whose adapters Ollama takes as safetensors
NOT_THE_BASE = "the adapter was trained on the base in NF4; on the 16-bit base it answers differently"
VLLM_NF4 = "--quantization bitsandbytes makes vLLM quantize the base to NF4 as it loads it (after its documentation)"
READS_TOKENIZERS = ("vllm", "llama.cpp", "transformers", "peft")  # by transformers' rules
OLD_READERS = (
    "its tokenizer is in the form of transformers 5 ({what}): transformers 4 cannot load it, nor can a vLLM, TGI or "
    "converter that is pinned to it"
)
NF4_NEEDED = "NF4 is the BitsAndBytesConfig of training; without it the adapter is on the 16-bit base"


# ---- What is known of the adapter ----


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
        return sorted(last & {"embed_tokens", "lm_head", "wte"})

    @property
    def has_head_of_tied_base(self) -> bool:
        """Whether it changes a head that shares its weight with the embedding."""
        return "lm_head" in self.embedding_modules and bool((self.base_config or {}).get("tie_word_embeddings"))

    @property
    def only_peft_merges(self) -> bool:
        """Whether `qlora-neft merge` refuses the adapter: it is not plain LoRA, or is on an embedding."""
        return bool(beyond_plain(self.config) or {"embed_tokens", "wte"} & set(self.embedding_modules))

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
    return Facts(
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
    )


def _tokenizer_fault(folder: AdapterFolder) -> str | None:
    """Ask the tokenizer beside the adapter, else that of a base on this machine."""
    own = (folder.path / TOKENIZER_CONFIG).is_file()
    return needs_transformers_5(folder.path if own else Path(folder.base).expanduser())


def _num_equal_layers(config: dict[str, Any] | None) -> int | None:
    """Return the number of blocks of a family all of whose blocks have the same layers."""
    return (config or {}).get("num_hidden_layers") if (config or {}).get("model_type") in FAMILIES else None


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


# ---- Verdicts ----


@dataclass
class Verdict:
    """Whether and how a tool can use an adapter.

    Attributes:
        consumer: Name of the tool.
        verdict: ``works``, ``works with a flag`` or ``breaks``.
        flag: What to pass or do, for ``works with a flag``.
        reasons: Why it is not ``works``.
        remedy: What to do instead, if it breaks.
        command: How to use it, unless it breaks.
        notes: What else to know.
    """

    consumer: str
    verdict: str = WORKS
    flag: str | None = None
    reasons: list[str] = field(default_factory=list)
    remedy: str | None = None
    command: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def is_usable(self) -> bool:
        """Whether the tool can use the adapter, with a flag or without."""
        return self.verdict != BREAKS

    def breaks(self, reason: str, remedy: str) -> None:
        """Add a reason why the adapter cannot be used; the first remedy stays."""
        self.verdict, self.flag, self.command = BREAKS, None, None
        self.reasons.append(reason)
        self.remedy = self.remedy or remedy

    def needs(self, flag: str, reason: str) -> None:
        """Add a reason why a flag is needed."""
        self.reasons.append(reason)
        if self.is_usable:
            self.verdict, self.flag = FLAG, flag

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary, for JSON."""
        return asdict(self)


def verdict_for(consumer: str, facts: Facts) -> Verdict:
    """Judge an adapter for one tool, named by a key of `CONSUMERS`."""
    verdict = Verdict(consumer)
    if facts.fault is not None:
        verdict.breaks(facts.fault, "an adapter whose file is whole")
        return verdict
    # The tool's own rules first: `breaks` keeps the first remedy, and theirs say more.
    CONSUMERS[consumer](facts, verdict)
    if facts.tokenizer_fault is not None and consumer in READS_TOKENIZERS:
        verdict.notes.append(OLD_READERS.format(what=facts.tokenizer_fault))
    # Ids beyond the base's rows have no embedding, whatever the tool.
    if facts.new_tokens:
        verdict.breaks(
            f"its tokenizer has {facts.new_tokens} tokens more than the base has rows",
            "train with the base's own tokenizer",
        )
    # The other two load the base themselves; their rules say so in their own words.
    if facts.base_config is None and consumer not in ("transformers", "peft"):
        verdict.notes.append("the base's configuration cannot be reached: its architecture was not checked")
    return verdict


def named_consumers(names: str) -> list[str]:
    """Return the tools that a comma-separated list names, each once.

    Raises:
        UserInputError: If a name is not known, or there is none.
    """
    found = list(dict.fromkeys(name.strip().lower() for name in names.split(",") if name.strip()))
    for name in found:
        if name not in CONSUMERS:
            close = difflib.get_close_matches(name, CONSUMERS, n=1, cutoff=0.5)
            hint = f"Did you mean {close[0]}? " if close else ""
            raise UserInputError(f"--for: {name!r} is not known. {hint}Known: {', '.join(CONSUMERS)}.")
    if not found:
        raise UserInputError(f"--for: names no tool. Known: {', '.join(CONSUMERS)}.")
    return found


def vllm_rank_flag(rank: int) -> str | None:
    """Return the flag vLLM needs to serve a rank: empty if its default is enough, None above its largest."""
    # vLLM accepts these values alone, so a rank between two of them takes the next.
    allowed = next((size for size in VLLM_RANKS if size >= max(rank, VLLM_DEFAULT_RANK)), None)
    if allowed is None:
        return None
    return f"--max-lora-rank {allowed}" if allowed > VLLM_DEFAULT_RANK else ""


# ---- The tools, one function each ----


def _vllm(facts: Facts, verdict: Verdict) -> None:
    merge = _merge(facts)
    rank_flag = vllm_rank_flag(facts.rank)
    if facts.beyond_matrices:
        verdict.breaks(f"vLLM takes the matrices A and B only, not {', '.join(facts.beyond_matrices)}", merge)
    # Not an error in vLLM: it reads r and lora_alpha, and would serve a wrongly scaled adapter without a word.
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if facts.config.get(key)]
    if patterns:
        verdict.breaks(f"vLLM reads one r and one lora_alpha: {' and '.join(patterns)} would be ignored", merge)
    if rank_flag is None:
        verdict.breaks(f"rank {facts.rank} is over {VLLM_RANKS[-1]}, the largest --max-lora-rank", merge)
    elif rank_flag:
        verdict.needs(rank_flag, f"rank {facts.rank} is over vLLM's default of {VLLM_DEFAULT_RANK}")
    if facts.embedding_modules:
        modules = " and ".join(facts.embedding_modules)
        verdict.notes.append(f"LoRA on {modules}: whether vLLM takes it depends on version and model; not checked")
    if verdict.is_usable:
        flag = f" {verdict.flag}" if verdict.flag else ""
        verdict.command = f"vllm serve {facts.base} --enable-lora{flag} --lora-modules tuned={facts.source}"
        verdict.notes += [_not_the_base(facts), VLLM_NF4]
        if facts.dtypes == ("F32",):
            verdict.notes.append("its float32 weights are cast to the dtype that vLLM serves in")


def _llama_cpp(facts: Facts, verdict: Verdict) -> None:
    _only_matrices_fit(facts, verdict, f"{_merge(facts)}; qlora-neft gguf OUT model.gguf")
    # An unknown base gets the benefit of the doubt, and a note.
    is_ours = facts.model_type is None or facts.model_type in GGUF_TYPES
    if not is_ours and facts.odd_scale:
        verdict.breaks(
            f"qlora-neft gguf does not write {facts.model_type}, and llama.cpp's convert_lora_to_gguf.py ignores "
            f"{facts.odd_scale}",
            f"{_merge(facts)}; llama.cpp's convert_hf_to_gguf.py",
        )
    elif not is_ours:
        reason = f"qlora-neft gguf does not write {facts.model_type}; llama.cpp's converter may"
        verdict.needs("llama.cpp's convert_lora_to_gguf.py", reason)
    elif facts.odd_scale:
        reason = f"llama.cpp's own convert_lora_to_gguf.py writes only lora_alpha and ignores {facts.odd_scale}"
        verdict.needs(_gguf(facts), reason)
    if verdict.is_usable:
        if is_ours:
            verdict.command = f"{_gguf(facts)}; llama-server -m BASE.gguf --lora adapter.gguf"
        verdict.notes.append(_not_the_base(facts))


def _ollama(facts: Facts, verdict: Verdict) -> None:
    merge = f"{_merge(facts)}; qlora-neft gguf OUT model.gguf --modelfile"
    _only_matrices_fit(facts, verdict, merge)
    flag = f"{_gguf(facts)} --modelfile"
    # Two ways into Ollama: the adapter's folder for some architectures, or a LoRA GGUF for those that are written here.
    as_folder = facts.model_type is None or facts.model_type in OLLAMA_TYPES
    if facts.model_type is not None and facts.model_type not in (*OLLAMA_TYPES, *GGUF_TYPES):
        verdict.breaks(f"Ollama does not take an adapter of {facts.model_type} as a folder", merge)
    elif not as_folder:
        verdict.needs(flag, f"Ollama takes a folder for Llama, Mistral and Gemma, not for {facts.model_type}")
    if facts.odd_scale and facts.model_type in (None, *GGUF_TYPES):
        verdict.needs(flag, f"from a folder Ollama reads only lora_alpha and ignores {facts.odd_scale}")
    elif facts.odd_scale:
        verdict.breaks(f"from a folder Ollama reads only lora_alpha and ignores {facts.odd_scale}", merge)
    if verdict.is_usable:
        verdict.command = f"{verdict.flag or flag}; ollama create tuned -f Modelfile"
        verdict.notes.append(_not_the_base(facts))


def _peft(facts: Facts, verdict: Verdict) -> None:
    _base_can_be_loaded(facts, verdict)
    if verdict.is_usable:
        call = f"AutoPeftModelForCausalLM.from_pretrained({facts.source!r}, quantization_config=NF4)"
        verdict.command = call
        verdict.notes.append(NF4_NEEDED)


def _transformers(facts: Facts, verdict: Verdict) -> None:
    _base_can_be_loaded(facts, verdict)
    if facts.config.get("modules_to_save"):
        verdict.notes.append("modules_to_save are taken from the adapter; PEFT must be installed")
    if verdict.is_usable:
        verdict.command = f"AutoModelForCausalLM.from_pretrained({facts.source!r}, quantization_config=NF4)"
        verdict.notes.append(NF4_NEEDED)


CONSUMERS: dict[str, Callable[[Facts, Verdict], None]] = {
    "vllm": _vllm,
    "llama.cpp": _llama_cpp,
    "ollama": _ollama,
    "transformers": _transformers,
    "peft": _peft,
}


# ---- Rules that several tools share ----


def _only_matrices_fit(facts: Facts, verdict: Verdict, merge: str) -> None:
    """Refuse an adapter with parts that a LoRA GGUF cannot hold."""
    if facts.beyond_matrices:
        verdict.breaks(f"a LoRA GGUF holds the matrices A and B only, not {', '.join(facts.beyond_matrices)}", merge)
    # Head and embedding are one tensor in the GGUF, so this cannot be merged either: other advice than below.
    if facts.has_head_of_tied_base:
        reason = "it has a LoRA on lm_head, which is the embedding in this base"
        verdict.breaks(reason, "train without lm_head in lora.target_modules")
    elif "embed_tokens" in facts.embedding_modules:
        verdict.breaks("it has a LoRA on embed_tokens", merge)


def _base_can_be_loaded(facts: Facts, verdict: Verdict) -> None:
    """Refuse an adapter whose recorded base is missing here: PEFT and transformers load it by that name."""
    recorded = facts.recorded_base
    if not recorded:
        verdict.breaks("adapter_config.json names no base", "qlora-neft export writes the base's Hub id into it")
    elif facts.base_is_local and not Path(recorded).expanduser().is_dir():
        verdict.breaks(f"the base is a folder that is not here: {recorded}", "qlora-neft export names it by its Hub id")
    elif facts.base_is_local:
        verdict.notes.append("the base is a folder of this machine: nobody else can load it (qlora-neft export)")
    elif facts.base_config is None:
        verdict.notes.append(f"the base {recorded} could not be reached from here")


def _merge(facts: Facts) -> str:
    """Advise how to make a plain model; `qlora-neft merge` refuses some kinds of adapter."""
    if facts.only_peft_merges:
        return "PEFT's merge_and_unload, saved to OUT"
    return f"qlora-neft merge {facts.source} OUT"


def _not_the_base(facts: Facts) -> str:
    return NOT_THE_BASE + ("" if facts.only_peft_merges else f": {_merge(facts)} is exact")


def _gguf(facts: Facts) -> str:
    return f"qlora-neft gguf {facts.source} adapter.gguf"
