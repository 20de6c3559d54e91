"""Ways to use a published adapter: code and commands to copy, only those that work for it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...adapter.folder import beyond_merging, beyond_plain
from ...adapter.prompts import Prompts
from ...data.templates import ALPACA_ENDINGS
from ...recipe.schema import Quantization
from ..abilities import Abilities
from ..consumers import Facts, verdict_for, vllm_rank_flag
from .public import PublicBase

QUESTION = "Give three tips for staying healthy."
TEXT = "Once upon a time"  # for a model that was trained on plain text

TRANSFORMERS = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer{bits}

{nf4}model = AutoModelForCausalLM.from_pretrained(
    "{base}",{revision}
    {weights},
    device_map="auto",
)
model.load_adapter("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{tokenizer}")
{ask}"""
PEFT = """\
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer{bits}

{nf4}model = AutoPeftModelForCausalLM.from_pretrained("{repo}", {weights}, device_map="auto").eval()
tokenizer = AutoTokenizer.from_pretrained("{tokenizer}")
{ask}"""
# Spelled out, not left to defaults: with other settings the base is other weights than the adapter was trained on.
NF4 = """\
nf4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant={double_quant},
    bnb_4bit_compute_dtype=torch.{dtype},
)
"""
# return_token_type_ids: `generate` rejects them on models that take none. The penalty and greedy decoding are
# NEFTune's.
ASK = """\
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False{special}).to(model.device)
output = model.generate(**inputs, max_new_tokens=256, do_sample=False, repetition_penalty=1.2{end})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""

PROMPT_NOTE = "The prompt template of the training run is applied automatically."
TEXT_PART_NOTE = (
    "Its layers are named after the text part of {base}. Programs that load the whole model, such as {others}, do not "
    "find them. Merge it for those; the merged model has the layout of the base."
)
VLLM_NOTE = (
    "`--quantization bitsandbytes` makes vLLM quantize the base to NF4. Without it, vLLM serves the adapter on the "
    "16-bit base, which is a different model from the one trained; a merged model avoids the question."
)
MERGE_NOTE = (
    "The adapter is added to the dequantized NF4 base, which is the model that was trained; the result needs neither "
    "bitsandbytes nor PEFT."
)
SYSTEM_NOTE = "Send the system message of the training with each request: {}"
GGUF_NOTE = "Made from the merged model above."
LORA_GGUF_NOTE = " The adapter alone, for a base in GGUF: `qlora-neft gguf {repo} adapter.gguf`."


@dataclass(frozen=True)
class Snippet:
    """Something to copy.

    Attributes:
        title: The program it is for.
        note: Shown before the code; may be empty.
        language: ``bash`` or ``python``.
        code: The text.
    """

    title: str
    note: str
    language: str
    code: str


def snippets(
    repo_id: str,
    base: PublicBase,
    config: Mapping[str, Any],
    quantization: Quantization | None,
    prompts: Prompts | None,
    eos_token_id: int | None,
    facts: Facts | None = None,
) -> list[Snippet]:
    """Return every way to use the adapter that works for it.

    Args:
        repo_id: Repository of the adapter.
        base: Its base on the Hub.
        config: Content of ``adapter_config.json``.
        quantization: How the base was stored in training, None for not quantized.
        prompts: Prompts of the training; None if no tokenizer is published.
        eos_token_id: End token of that tokenizer.
        facts: What is known of the adapter; without it its configuration decides.
    """
    in_nf4 = quantization is not None
    parts = {
        "repo": repo_id,
        "base": base.id,
        "revision": f'\n    revision="{base.commit}",' if base.commit else "",
        "tokenizer": repo_id if prompts is not None else base.id,
        **_weights(quantization),
        "ask": _ask(prompts, eos_token_id),
    }
    is_text_part = facts is not None and facts.is_of_text_part
    is_lost = facts is not None and facts.is_lost_to_peft
    others = "vLLM, PEFT and transformers' AutoModelForCausalLM" if is_lost else "vLLM"
    note = PROMPT_NOTE + (f" {TEXT_PART_NOTE.format(base=base.id, others=others)}" if is_text_part else "")
    ours = Snippet("qlora_neft", note, "bash", f"qlora-neft generate {repo_id} {shlex.quote(QUESTION)}")
    by_peft = [
        Snippet(f"PEFT, on the {'NF4 ' * in_nf4}base it was trained on", "", "python", PEFT.format(**parts)),
        Snippet("transformers, 4-bit" if in_nf4 else "transformers", "", "python", TRANSFORMERS.format(**parts)),
    ]
    return [
        ours,
        *([] if is_lost else by_peft),
        *_vllm(repo_id, base, config, facts, in_nf4=in_nf4, prompts=prompts),
        *_merged(repo_id, config, facts),
    ]


def _weights(quantization: Quantization | None) -> dict[str, str]:
    """Return how the base's weights are loaded, as parts of the code."""
    # "auto" is what the trainer chose for its device; for a reader's GPU bfloat16 is the likeliest.
    if quantization is None:
        return {"bits": "", "nf4": "", "weights": "dtype=torch.bfloat16"}
    dtype = quantization.bnb_4bit_compute_dtype
    nf4 = NF4.format(
        double_quant=quantization.bnb_4bit_use_double_quant, dtype="bfloat16" if dtype == "auto" else dtype
    )
    return {"bits": ", BitsAndBytesConfig", "nf4": nf4, "weights": "quantization_config=nf4"}


def _ask(prompts: Prompts | None, eos_token_id: int | None) -> str:
    """Return code from a request to its answer, with the prompt of the training."""
    if prompts is None:
        return f'prompt = "{QUESTION}"\n' + ASK.format(special="", end="")
    end, special, request = "", "", {"role": "user", "content": QUESTION}
    if prompts.name == "none":
        # JSON's quotes and escapes are Python's too.
        prompt = json.dumps(TEXT)
    elif prompts.name in (*ALPACA_ENDINGS, "vicuna"):
        prompt = json.dumps(prompts.text(prompts.with_system([request])), ensure_ascii=False)
    else:
        messages = json.dumps(prompts.with_system([request]), ensure_ascii=False)
        given = "".join(f", {name}={value!r}" for name, value in prompts.kwargs.items())
        prompt = f"tokenizer.apply_chat_template(\n    {messages}, add_generation_prompt=True, tokenize=False{given}\n)"
        special = ", add_special_tokens=False"  # the template writes them
    # `generate` stops at the model's own end token; the training may have ended its answers with another.
    if prompts.stop_token_ids != (eos_token_id,):
        end = f", eos_token_id={list(prompts.stop_token_ids)}"
    return f"prompt = {prompt}\n" + ASK.format(special=special, end=end)


def _vllm(
    repo_id: str,
    base: PublicBase,
    config: Mapping[str, Any],
    facts: Facts | None,
    *,
    in_nf4: bool,
    prompts: Prompts | None,
) -> list[Snippet]:
    """Return the command for vLLM, which takes the matrices A and B only, of one rank and one alpha."""
    rank = int(config.get("r", 0)) if facts is None else facts.rank
    if facts is not None and not verdict_for("vllm", facts).is_usable:
        return []
    rank_flag = vllm_rank_flag(rank)
    others = [key for key in ("modules_to_save", "rank_pattern", "alpha_pattern") if config.get(key)]
    if others or beyond_plain(config) or rank_flag is None:
        return []
    words = ["vllm", "serve", base.id, *(["--revision", base.commit] if base.commit else [])]
    # vLLM quantizes the base as it loads it; without these words it would serve the adapter on the 16-bit base.
    words += [*(["--quantization", "bitsandbytes"] if in_nf4 else []), "--enable-lora", *rank_flag.split()]
    given, system = (prompts.kwargs, prompts.system) if prompts else ({}, None)
    words += ["--default-chat-template-kwargs", json.dumps(given)] if given else []
    words += ["--lora-modules", f"{repo_id.split('/')[-1]}={repo_id}"]
    notes = [VLLM_NOTE] * in_nf4 + ([SYSTEM_NOTE.format(json.dumps(system, ensure_ascii=False))] if system else [])
    return [Snippet("vLLM", " ".join(notes), "bash", shlex.join(words))]


def _merged(repo_id: str, config: Mapping[str, Any], facts: Facts | None) -> list[Snippet]:
    """Return the ways that go through a merged model, if the verbs accept it."""
    can = Abilities() if facts is None or facts.abilities is None else facts.abilities
    if beyond_merging(config) or can.merge is not None:
        return []
    # A LoRA GGUF has no place for whole modules.
    alone = can.adapter_gguf is None and not config.get("modules_to_save")
    note = GGUF_NOTE + (LORA_GGUF_NOTE.format(repo=repo_id) if alone else "")
    gguf = Snippet("GGUF, for llama.cpp and Ollama", note, "bash", "qlora-neft gguf merged model.gguf --modelfile")
    return [
        Snippet("Merged into a plain 16-bit model", MERGE_NOTE, "bash", f"qlora-neft merge {repo_id} merged"),
        *([gguf] if can.merged_gguf is None else []),
    ]
