"""A tokenizer as llama.cpp has it, token for token, or not at all.

llama.cpp splits text by code of its own that a GGUF only names. A tokenizer that does not match one of those names is
refused: under a wrong name everything seems to work, but the model reads other tokens than it was trained on.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...errors import UserInputError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

# The regular expressions of Llama 3 and of Qwen2 as their tokenizer.json have them; they differ in how many digits
# stay together.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_REGEX, QWEN2_REGEX = _WORDS % r"\p{N}{1,3}", _WORDS % r"\p{N}"
# llama.cpp's name by expression and by whether whole words are looked up before merging, which it ties to the name.
_NAME_OF_REGEX = {(LLAMA3_REGEX, True): "llama-bpe", (LLAMA3_REGEX, False): "dbrx", (QWEN2_REGEX, False): "qwen2"}
_DIGITS = {"type": "Digits", "individual_digits": True}
_UNDERLINE = "\u2581"  # SentencePiece's letter for a space
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# Tokens that llama.cpp takes for the end of a text by their spelling, whatever their type.
_ENDS = {
    "</s>", "<eos>", "[EOS]", "<EOT>", "_<EOT>", "[EOT]", "<|end|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>",
    "<|call|>", "<|return|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<end_of_utterance>",
}  # fmt: skip
_SPECIAL = ("bos", "eos", "unk", "pad")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as a GGUF describes it.

    Attributes:
        model: ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece's BPE).
        pre: llama.cpp's name for the way text is split first.
        tokens: Text of every token, by id.
        types: llama.cpp's type of every token, by id.
        merges: Merges of byte-level BPE.
        scores: Scores of SentencePiece's BPE: the higher, the earlier a token is merged.
        special: Ids by role.
        flags: ``add_bos_token``, ``add_eos_token``, ``add_space_prefix``.
        chat_template: Jinja, None without one.
        notes: Differences in llama.cpp.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float] | None
    special: dict[str, int]
    flags: dict[str, bool]
    chat_template: str | None
    notes: list[str]

    @property
    def eos(self) -> int:
        """Id of the token that ends a text."""
        return self.special["eos"]

    def add_to(self, writer: GGUFWriter) -> None:
        """Write it into a GGUF's metadata."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        else:
            # llama.cpp wants the list, but the library writes no empty one: " " stands for no pair of tokens.
            writer.add_token_merges(self.merges or [" "])
        for role, token in self.special.items():
            getattr(writer, f"add_{role}_token_id")(token)
        for flag, value in self.flags.items():
            getattr(writer, f"add_{flag}")(value)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, num_rows: int, source: str) -> Vocabulary:
    """Return a tokenizer's vocabulary for llama.cpp.

    Args:
        tokenizer: A fast tokenizer of transformers.
        num_rows: Rows of the embedding; ids without a token get a placeholder.
        source: Name the caller gave, for messages.

    Raises:
        UserInputError: If llama.cpp would split text differently.
    """
    if not tokenizer.is_fast:
        raise _Unlike(source, "it has no tokenizer.json")
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    if len(tokenizer) > num_rows:
        raise UserInputError(f"{source}: the tokenizer has {len(tokenizer)} tokens, the embedding {num_rows} rows.")
    splitting = splitting_of(stored, source)
    scores = splitting.scores
    tokens = {id: token for token, id in tokenizer.get_vocab().items()}
    special = {role: getattr(tokenizer, f"{role}_token_id") for role in _SPECIAL}
    return Vocabulary(
        model="gpt2" if scores is None else "llama",
        pre=splitting.pre,
        # One entry for each row of the embedding: many models have more rows than tokens, rounded up for speed.
        tokens=[_text(tokens, stored, id) for id in range(num_rows)],
        types=[_type(tokens, stored, id, special["unk"]) for id in range(num_rows)],
        merges=splitting.merges,
        # -1e9: a token that no merge makes is never preferred to one that a merge makes.
        scores=None if scores is None else [scores.get(tokens.get(id, ""), -1e9) for id in range(num_rows)],
        special={role: token for role, token in special.items() if token is not None},
        flags=_special_flags(tokenizer, source) | splitting.flags,
        chat_template=_chat_template(tokenizer),
        notes=splitting.notes + _notes_on_added(stored),
    )


class _Unlike(UserInputError):
    """A tokenizer that llama.cpp does not have."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(
            f"{source}: llama.cpp cannot split text as this tokenizer does: {reason}. A GGUF would be read as other "
            "tokens than the model was trained on, so none is written."
        )


# ---- How text is split: the parts of tokenizer.json that llama.cpp replaces ----


@dataclass(frozen=True)
class _Splitting:
    """See `Vocabulary` for the attributes; ``scores`` is by token here."""

    pre: str
    merges: list[str] = field(default_factory=list)
    scores: dict[str, float] | None = None
    flags: dict[str, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def splitting_of(stored: dict[str, Any], source: str) -> _Splitting:
    """Return how llama.cpp splits text as a tokenizer does.

    Args:
        stored: Content of ``tokenizer.json``.
        source: Name the caller gave, for messages.

    Raises:
        UserInputError: If it cannot.
    """
    model = stored["model"]
    if model["type"] != "BPE":
        raise _Unlike(source, f"its model is {model['type']}, and only BPE is supported")
    # Features of a BPE that llama.cpp does not have.
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise _Unlike(source, f"its BPE has {key}")
    return (_sentencepiece if model.get("byte_fallback") else _byte_level)(stored, source)


def _byte_level(stored: dict[str, Any], source: str) -> _Splitting:
    from tokenizers.pre_tokenizers import ByteLevel

    model, notes = stored["model"], []
    if (stored["normalizer"] or {}).get("type") == "NFC":
        notes.append("llama.cpp does not normalize text to Unicode NFC, as this tokenizer does; most text is NFC.")
    elif stored["normalizer"] is not None:
        raise _Unlike(source, f"its normalizer is {stored['normalizer']['type']}")
    pre = _byte_level_name(stored["pre_tokenizer"], bool(model.get("ignore_merges")))
    if pre is None:
        raise _Unlike(source, "its pre-tokenizer is not that of GPT-2, Llama 3, Qwen2 or SmolLM")
    # Text that no merge covers falls back to single bytes: each must be a token.
    missing = [letter for letter in ByteLevel.alphabet() if letter not in model["vocab"]]
    if missing:
        raise _Unlike(source, f"{len(missing)} of the 256 bytes have no token")
    return _Splitting(pre, merges=[" ".join(_pair(merge)) for merge in model["merges"]], notes=notes)


def _byte_level_name(pre_tokenizer: dict[str, Any] | None, ignore_merges: bool) -> str | None:
    """Return llama.cpp's name of a byte-level pre-tokenizer, None if it has none.

    Args:
        pre_tokenizer: As in ``tokenizer.json``.
        ignore_merges: Whether a word that is a token is taken whole.
    """
    if pre_tokenizer is None:
        return None
    *before, last = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    # ByteLevel splits with GPT-2's expression by itself, unless a Split before it has done so with another.
    uses_regex = last.get("use_regex", True)  # of GPT-2
    if uses_regex and not ignore_merges:
        return {0: "gpt-2", 1: "smollm"}.get(len(before)) if all(step == _DIGITS for step in before) else None
    if uses_regex or len(before) != 1 or before[0].get("type") != "Split":
        return None
    split = before[0]
    if split.get("behavior") != "Isolated" or split.get("invert"):
        return None
    return _NAME_OF_REGEX.get((split["pattern"].get("Regex"), ignore_merges))


def _sentencepiece(stored: dict[str, Any], source: str) -> _Splitting:
    model = stored["model"]
    found = _sentencepiece_adds_space(stored["normalizer"], stored["pre_tokenizer"])
    if found is None:
        raise _Unlike(source, "its normalizer and pre-tokenizer are not those of SentencePiece")
    if sum(bool(_BYTE.fullmatch(token)) for token in model["vocab"]) != 256:
        raise _Unlike(source, "it does not have one token for each byte")
    adds_space, notes = found
    return _Splitting("default", scores=_scores(model, source), flags={"add_space_prefix": adds_space}, notes=notes)


def _sentencepiece_adds_space(
    normalizer: dict[str, Any] | None, pre_tokenizer: dict[str, Any] | None
) -> tuple[bool, list[str]] | None:
    """Return whether a SentencePiece tokenizer puts a space before a text, and what llama.cpp does differently.

    None if the two parts of ``tokenizer.json`` are not SentencePiece's.
    """
    steps = [] if normalizer is None else normalizer.get("normalizers") or [normalizer]
    if pre_tokenizer is None:
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": _UNDERLINE}
        if steps == [{"type": "Prepend", "prepend": _UNDERLINE}, replace]:
            return True, []
        return (False, []) if steps == [replace] else None
    # Newer conversions say the same with a pre-tokenizer in place of a normalizer.
    if steps or pre_tokenizer.get("type") != "Metaspace" or pre_tokenizer.get("split", True):
        return None
    scheme = pre_tokenizer.get("prepend_scheme", "always")
    if scheme == "first":
        return True, ["after a special token inside a text, llama.cpp puts a space that this tokenizer does not."]
    return scheme == "always", []


def _scores(model: dict[str, Any], source: str) -> dict[str, float]:
    """Score each token by minus the rank of its first merge.

    SentencePiece merges any two neighbours that form a token, those of the highest score first. So the list of merges
    must have every such pair, and all pairs of one token together.
    """
    merges = [_pair(merge) for merge in model["merges"]]
    scores: dict[str, float] = {}
    previous = None
    for rank, (left, right) in enumerate(merges):
        token = left + right
        # A score belongs to a token, not to a pair: pairs of one token at different ranks have no score that orders
        # both.
        if token in scores and token != previous:
            raise _Unlike(source, f"the merges of {token!r} do not stand together")
        scores.setdefault(token, -float(rank))
        previous = token
    listed, vocab = set(merges), model["vocab"]
    for token in vocab:
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair[0] in vocab and pair[1] in vocab and pair not in listed:
                raise _Unlike(source, f"{pair[0]!r} and {pair[1]!r} are not merged, though {token!r} is a token")
    return scores


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge  # tokenizers before 0.20 wrote text
    return left, right


# ---- Tokens ----


def _text(tokens: dict[int, str], stored: dict[str, Any], id: int) -> str:
    if id not in tokens:
        return f"[PAD{id}]"
    # llama.cpp looks for an added token in the text as it is written, before spaces become SentencePiece's letter.
    is_written = stored["model"].get("byte_fallback") and id in _added(stored)
    return tokens[id].replace(_UNDERLINE, " ") if is_written else tokens[id]


def _type(tokens: dict[int, str], stored: dict[str, Any], id: int, unknown: int | None) -> int:
    from .file import gguf_library  # imports torch, which nothing else here needs

    types, added = gguf_library().TokenType, _added(stored)
    if id not in tokens:
        return types.UNUSED
    if id in added and stored["model"].get("byte_fallback") and id == unknown:
        return types.UNKNOWN
    if id in added:
        # llama.cpp prints USER_DEFINED tokens and hides CONTROL ones.
        return types.CONTROL if added[id]["special"] else types.USER_DEFINED
    return types.BYTE if stored["model"].get("byte_fallback") and _BYTE.fullmatch(tokens[id]) else types.NORMAL


def _added(stored: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {token["id"]: token for token in stored["added_tokens"]}


def _special_flags(tokenizer: PreTrainedTokenizerBase, source: str) -> dict[str, bool]:
    """Return whether the tokenizer puts its begin and end token around a text."""
    # Asked, not read from the settings: post-processors, flags and classes may each add tokens, or override another.
    bare, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), None)
    before, after = (None, None) if at is None else (whole[:at], whole[at + len(bare) :])
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        raise _Unlike(source, f"around a text it puts {tokenizer.convert_ids_to_tokens(whole)}")
    return {"add_bos_token": bool(before), "add_eos_token": bool(after)}


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _notes_on_added(stored: dict[str, Any]) -> list[str]:
    added, notes = stored["added_tokens"], []
    spaced = [token["content"] for token in added if token["lstrip"] or token["rstrip"] or token["single_word"]]
    if spaced:
        notes.append(f"llama.cpp keeps the spaces around {', '.join(spaced[:3])}, which this tokenizer strips.")
    plain = sorted(_ENDS & stored["model"]["vocab"].keys() - {token["content"] for token in added if token["special"]})
    if plain:
        notes.append(
            f"llama.cpp takes {', '.join(plain)} for the end of a text, but it is plain text to this tokenizer."
        )
    return notes
