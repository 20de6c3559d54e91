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

from ..adapter.folder import beyond_plain
from ..errors import UserInputError
from .abilities import GGUF_TYPES, OF_TEXT_PART, Facts, facts_of

__all__ = ["CONSUMERS", "Facts", "Verdict", "facts_of", "named_consumers", "verdict_for", "vllm_rank_flag"]

WORKS, FLAG, BREAKS = "works", "works with a flag", "breaks"
# Values of --max-lora-rank. vLLM's LoRAConfig had these as possible_max_ranks; v0.26 (MaxLoRARanks in
# https://github.com/vllm-project/vllm/blob/v0.26.0/vllm/config/lora.py) accepts 1 as well. It is omitted here: no
# adapter needs it, since the default covers every rank up to 16, and older versions reject it.
VLLM_DEFAULT_RANK = 16
VLLM_RANKS = (8, VLLM_DEFAULT_RANK, 32, 64, 128, 256, 320, 512)
OLLAMA_TYPES = ("llama", "mistral", "mixtral", "gemma", "gemma2")  # and whose adapters Ollama takes as safetensors
NOT_THE_BASE = "the adapter was trained on the base in NF4; on the 16-bit base it answers differently"
VLLM_NF4 = "--quantization bitsandbytes makes vLLM quantize the base to NF4 as it loads it (after its documentation)"
READS_TOKENIZERS = ("vllm", "llama.cpp", "transformers", "peft")  # by transformers' rules
OLD_READERS = (
    "its tokenizer is in the form of transformers 5 ({what}): transformers 4 cannot load it, nor can a vLLM, TGI or "
    "converter that is pinned to it"
)
KNOWN_PARTS = ("use_dora", "trainable_token_indices", "lora_bias", "bias")  # `Facts.beyond_matrices` names them
EXPERTS = "target_parameters"  # how PEFT names LoRA on experts, which are not modules
NF4_NEEDED = "NF4 is the BitsAndBytesConfig of training; without it the adapter is on the 16-bit base"


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
    _not_a_text_part(facts, verdict, is_lost=facts.is_of_text_part)
    rank_flag = vllm_rank_flag(facts.rank)
    _only_plain_lora(facts, verdict, merge)
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
        verdict.notes += [*_not_the_base(facts), *([VLLM_NF4] if facts.in_nf4 else [])]
        if facts.dtypes == ("F32",):
            verdict.notes.append("its float32 weights are cast to the dtype that vLLM serves in")


def _llama_cpp(facts: Facts, verdict: Verdict) -> None:
    _only_matrices_fit(facts, verdict, _merged_gguf(facts))
    # An unknown base gets the benefit of the doubt, and a note.
    is_ours = facts.model_type is None or facts.model_type in GGUF_TYPES
    if not is_ours and facts.odd_scale:
        verdict.breaks(
            f"qlora-neft gguf does not write {facts.model_type}, and llama.cpp's convert_lora_to_gguf.py ignores "
            f"{facts.odd_scale}",
            _merged_gguf(facts),
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
        verdict.notes += _not_the_base(facts)


def _ollama(facts: Facts, verdict: Verdict) -> None:
    merge = _merged_gguf(facts, " --modelfile")
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
        verdict.notes += _not_the_base(facts)


def _peft(facts: Facts, verdict: Verdict) -> None:
    _not_a_text_part(facts, verdict, is_lost=facts.is_lost_to_peft)
    _base_can_be_loaded(facts, verdict)
    if verdict.is_usable:
        _loaded_by("AutoPeftModelForCausalLM", facts, verdict)


def _transformers(facts: Facts, verdict: Verdict) -> None:
    _not_a_text_part(facts, verdict, is_lost=facts.is_lost_to_peft)
    _base_can_be_loaded(facts, verdict)
    if facts.config.get("modules_to_save"):
        verdict.notes.append("modules_to_save are taken from the adapter; PEFT must be installed")
    if verdict.is_usable:
        _loaded_by("AutoModelForCausalLM", facts, verdict)


def _loaded_by(name: str, facts: Facts, verdict: Verdict) -> None:
    """Say how the base is loaded under the adapter: as it was trained on."""
    weights = "quantization_config=NF4" if facts.in_nf4 else 'dtype="auto"'
    verdict.command = f"{name}.from_pretrained({facts.source!r}, {weights})"
    verdict.notes += [NF4_NEEDED] if facts.in_nf4 else []


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
    _only_plain_lora(facts, verdict, merge)
    if facts.beyond_matrices:
        verdict.breaks(f"a LoRA GGUF holds the matrices A and B only, not {', '.join(facts.beyond_matrices)}", merge)
    # Head and embedding are one tensor in the GGUF, so this cannot be merged either: other advice than below.
    if facts.has_head_of_tied_base:
        reason = "it has a LoRA on lm_head, which is the embedding in this base"
        verdict.breaks(reason, "train without lm_head in lora.target_modules")
    elif "embed_tokens" in facts.embedding_modules:
        verdict.breaks("it has a LoRA on embed_tokens", merge)


def _only_plain_lora(facts: Facts, verdict: Verdict, merge: str) -> None:
    """Refuse settings that make the update something other than B A on the base as it is stored."""
    used = [key for key in beyond_plain(facts.config) if key.split("=")[0] not in (*KNOWN_PARTS, EXPERTS)]
    if used:
        verdict.breaks(f"it takes plain LoRA only, the adapter has {', '.join(used)}", merge)
    if facts.config.get(EXPERTS):
        verdict.breaks(f"not verified with LoRA on experts, which this adapter has ({EXPERTS})", merge)


def _not_a_text_part(facts: Facts, verdict: Verdict, *, is_lost: bool) -> None:
    """Refuse an adapter of a text part, if the tool loads the whole checkpoint."""
    if is_lost:
        verdict.breaks(OF_TEXT_PART.format(base=facts.base), _merge(facts))


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
    if facts.has_tied_base and facts.trained_ends:
        return "train without embedding and head, which are one weight in this base"
    if not _merges(facts):
        return "PEFT's merge_and_unload, saved to OUT"
    return f"qlora-neft merge {facts.source} OUT"


def _merges(facts: Facts) -> bool:
    return facts.abilities is None or facts.abilities.merge is None


def _merged_gguf(facts: Facts, options: str = "") -> str:
    """Advise how to make a GGUF of the merged model."""
    if facts.has_tied_base and facts.trained_ends:
        return _merge(facts)
    ours = facts.abilities is None or facts.abilities.merged_gguf is None
    can = ours or (not _merges(facts) and facts.model_type in (None, *GGUF_TYPES))
    return f"{_merge(facts)}; " + (
        f"qlora-neft gguf OUT model.gguf{options}" if can else "llama.cpp's convert_hf_to_gguf.py"
    )


def _not_the_base(facts: Facts) -> list[str]:
    if not facts.in_nf4:
        return []
    return [NOT_THE_BASE + (f": {_merge(facts)} is exact" if _merges(facts) else "")]


def _gguf(facts: Facts) -> str:
    return f"qlora-neft gguf {facts.source} adapter.gguf"
