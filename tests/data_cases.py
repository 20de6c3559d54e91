"""Generated rows of every format, tokenizers of several kinds and chat templates, for properties of the data's way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import ByteLevel
from transformers import PreTrainedTokenizerFast

from qlora_neft.data.sources import Row
from qlora_neft.data.worker import RowWorker
from qlora_neft.recipe.schema import Data

LONG = 10**6  # tokens; nothing is cut
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHAT_TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2}


# What is trained of a response, by the template; what FastChat, Stanford and the two Jinja texts write.
def ended(response):
    """With its end token, which is not doubled where the response spells it already."""
    said = response.rstrip()
    return said if said.endswith("</s>") else f"{response}</s>"


TRAINED = {
    "none": ended,
    "alpaca": ended,
    "vicuna": lambda response: ended(f" {response}"),
    "chatml": "{}<|im_end|>".format,
    "llama2": lambda response: f" {response.strip()} </s>",
}
WAYS = [  # formats and the templates that have room for them
    ("alpaca", "alpaca"),
    ("alpaca", "vicuna"),
    ("alpaca", "chatml"),
    ("alpaca", "llama2"),
    ("prompt-completion", "none"),
    ("prompt-completion", "vicuna"),
    ("prompt-completion", "chatml"),
    ("sharegpt", "vicuna"),
    ("sharegpt", "chatml"),
    ("sharegpt", "llama2"),
    ("messages", "vicuna"),
    ("messages", "chatml"),
    ("messages", "llama2"),
]
BYTE_LEVEL = ("bytes", "bpe", "bpe-trimmed", "bpe-across")
TOKENIZERS = (*BYTE_LEVEL, "sentencepiece")


# ---- Tokenizers ----


@cache
def tokenizer_of(kind, template):
    tokenizer = {"bytes": byte_tokenizer, "sentencepiece": sentencepiece}.get(kind, lambda: merging(kind))()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT_TEMPLATES.get(template)
    return tokenizer


def merging(kind):
    """Byte-level BPE. ``bpe-across`` has no word boundaries: tokens reach from the prompt into the response."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "Ġ"), ("Ċ", "Ċ"), ("Ġ", "b"), ("a", "b"), ("Ð", "\u00b4"), (":", "=")]
    if kind == "bpe-across":
        merges += [(":", "Ġ"), ("ĊĊ", "a"), (":", "b"), ("Ċ", "Ð"), ("]", "Ġ"), ("Ċ", "0"), (":", "1")]
    words = [*alphabet, *dict.fromkeys("".join(pair) for pair in merges), "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "bpe-across")
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = ByteLevel(trim_offsets=kind == "bpe-trimmed")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def sentencepiece():
    """Puts a space in front of every text and spells unknown characters in bytes, as Llama 2's does."""
    words = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127)), "▁a", "▁b"]
    merges = [("▁", letter) for letter in "ab"]
    words += ["<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def worker_of(kind, format, template, chosen):
    return _worker_of(kind, format, template, _Hashed(chosen))


@dataclass(frozen=True)
class _Hashed:
    """A data section, equal to another that states the same; its mappings have no hash of their own."""

    section: Data

    def __hash__(self):
        return hash(repr(self.section))


@cache
def _worker_of(kind, format, template, hashed):
    chosen = hashed.section
    name = "auto" if template == "none" else "chat" if template in CHAT_TEMPLATES else template
    return RowWorker(tokenizer_of(kind, template), format, name, chosen)


# ---- Texts and rows ----

BLANKS = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2028", "\x85"]
LITERALS = [
    "ASSISTANT:", " ASSISTANT: ", "USER:", "### Response:", "\n\n### Response:", "### Instruction:\n", "</s>", "<s>",
    "<|im_end|>", "<|im_end|>\n", "<|im_start|>assistant\n", "<|im_start|>", "[/INST]", "[INST] ", "<<SYS>>\n",
    "{input}", "{{ messages }}", "{% endfor %}", "{}", "\ufffd", "-100", "b", "=", ":", "ab",
]  # fmt: skip


def texts(alphabet, *, blank=True):
    """Texts of the alphabet's characters and white space."""
    found = st.lists(st.sampled_from([*alphabet, *BLANKS]), min_size=int(not blank), max_size=8).map("".join)
    return found if blank else found.filter(str.strip)


ASKED, ANSWERED = "ЯЮ中文🚀é#", "01жд🙂ß"  # no template writes one of the latter
HOSTILE = [*LITERALS, *"aд0🙂"]


@dataclass(frozen=True)
class Case:
    """A row of a format, and what it says."""

    format: str
    template: str
    row: dict
    system: str | None
    requests: list
    responses: list

    def messages(self):
        turns = [text for pair in zip(self.requests, self.responses, strict=True) for text in pair]
        found = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        return ([{"role": "system", "content": self.system}] if self.system is not None else []) + found


@st.composite
def cases(draw, asked, answered, ways=WAYS, max_exchanges=4):
    """A case whose requests (and system message) are of some texts, and whose responses are of others."""
    format, template = draw(st.sampled_from(ways))
    if format in ("alpaca", "prompt-completion"):
        request, response = draw(texts(asked, blank=False)), draw(texts(answered, blank=False))
        if format == "prompt-completion":
            row = {"prompt": request, "completion": response}
            if template != "none":  # white space at the joint is of neither turn
                request, response = request.strip(), response.strip()
        else:
            row = {"instruction": request, "input": draw(texts(asked)), "output": response}
            request = f"{request}\n{row['input']}" if row["input"] else request
        return Case(format, template, row, None, [request], [response])
    count = draw(st.integers(1, max_exchanges))
    requests = [draw(texts(asked)) for _ in range(count)]
    responses = [draw(texts(answered, blank=False)) for _ in range(count)]
    case = Case(format, template, {}, draw(st.none() | texts(asked, blank=False)), requests, responses)
    speakers = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [{"from": speakers[m["role"]], "value": m["content"]} for m in case.messages()]
    row = {"conversations": shared} if format == "sharegpt" else {"messages": case.messages()}
    return replace(case, row=row)


def section(max_length, **stated):
    """A data section of any length, also of fewer tokens than a recipe may state."""
    return Data.model_construct(path="rows.jsonl", max_length=max_length, mixture=(), chat_template_kwargs=(), **stated)


def outcome_of(case, kind, chosen=None):
    worker = worker_of(kind, case.format, case.template, chosen or section(LONG))
    [outcome] = worker([Row(1, "line 1", case.row)])
    return outcome


def spelled(ids, kind, template):
    """The text of tokens, without the spaces that a SentencePiece tokenizer puts in front."""
    tokenizer = tokenizer_of(kind, template)
    if kind != "sentencepiece":
        return tokenizer.decode(ids)
    words = tokenizer.convert_ids_to_tokens(list(ids))
    raw = [bytes([int(w[3:5], 16)]) if w.startswith("<0x") else w.replace("▁", " ").encode() for w in words]
    return b"".join(raw).decode()


def stretches(sequence):
    """The token ids of each trained stretch."""
    pairs = zip(sequence.ids.tolist(), sequence.trained.tolist(), strict=True)
    return [[i for i, _ in found] for trained, found in groupby(pairs, lambda pair: pair[1]) if trained]


def examples(count):
    """Any examples, the same in every run."""
    checks = (HealthCheck.too_slow, HealthCheck.filter_too_much)
    return settings(derandomize=True, deadline=None, max_examples=count, database=None, suppress_health_check=checks)
