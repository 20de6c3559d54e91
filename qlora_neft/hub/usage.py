"""How to use a published adapter: commands and code to copy, one for each program."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import Any

from ..trained import Prompts
from ..trained.kinds import beyond_plain

QUESTION = "Give three tips for staying healthy."
TEXT = "Once upon a time"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values --max-lora-rank takes

TRANSFORMERS = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

{nf4}
model = AutoModelForCausalLM.from_pretrained(
    "{base}",{revision}
    quantization_config=nf4,
    device_map="auto",
)
model.load_adapter("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{tokenizer}")
{ask}"""
PEFT = """\
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, BitsAndBytesConfig

{nf4}
model = AutoPeftModelForCausalLM.from_pretrained("{repo}", quantization_config=nf4, device_map="auto").eval()
tokenizer = AutoTokenizer.from_pretrained("{tokenizer}")
{ask}"""
NF4 = """\
nf4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant={double_quant},
    bnb_4bit_compute_dtype=torch.{dtype},
)"""
ASK = """\
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False{special}).to(model.device)
output = model.generate(**inputs, max_new_tokens=256, do_sample=False, repetition_penalty=1.2{end})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


@dataclass(frozen=True)
class Snippet:
    """Something to copy: for which program, what to know before, and the text, a shell's or Python's."""

    title: str
    note: str
    language: str
    code: str


def snippets(
    repo_id: str, summary: dict[str, Any], config: dict[str, Any], prompts: Prompts | None, eos_token_id: int | None
) -> list[Snippet]:
    """Every way to use the adapter that holds for it.

    Args:
        repo_id: Where it is.
        summary: As `training_summary` made it.
        config: ``adapter_config.json``.
        prompts: Of the training, None without a tokenizer of its own.
        eos_token_id: Of that tokenizer.
    """
    base, revision = summary["base"]["id"], summary["base"]["revision"]
    quantization = summary.get("quantization", {})
    dtype = quantization.get("bnb_4bit_compute_dtype", "auto")
    nf4 = NF4.format(
        double_quant=quantization.get("bnb_4bit_use_double_quant", True),
        dtype="bfloat16" if dtype == "auto" else dtype,
    )
    parts = {
        "repo": repo_id,
        "base": base,
        "revision": f'\n    revision="{revision}",' if revision else "",
        "tokenizer": repo_id if prompts is not None else base,
        "nf4": nf4,
        "ask": _ask(prompts, eos_token_id),
    }
    return [
        Snippet("qlora_neft", PROMPT_NOTE, "bash", f"qlora-neft generate {repo_id} {shlex.quote(QUESTION)}"),
        Snippet("PEFT, on the NF4 base it was trained on", "", "python", PEFT.format(**parts)),
        Snippet("transformers, 4-bit", "", "python", TRANSFORMERS.format(**parts)),
        *_vllm(repo_id, base, revision, config),
        *_merged(repo_id, config),
    ]


PROMPT_NOTE = "The prompt template of the training is applied by itself."
MERGE_NOTE = (
    "The adapter is added to the dequantized NF4 base, which is the model that was trained; the result needs neither "
    "bitsandbytes nor PEFT."
)
GGUF_NOTE = "Of the merged model above."
LORA_GGUF_NOTE = " The adapter alone, for a base in GGUF: `qlora-neft gguf {repo} adapter.gguf`."
GGUF = "qlora-neft gguf merged model.gguf --modelfile"
VLLM_NOTE = (
    "`--quantization bitsandbytes` makes vLLM quantize the base to NF4. Without it vLLM serves the adapter on the "
    "16-bit base, which is another model than the one trained; a merged model avoids the question."
)


def _vllm(repo_id: str, base: str, revision: str | None, config: dict[str, Any]) -> list[Snippet]:
    """vLLM takes matrices A and B alone, of one rank and one alpha."""
    rank = next((rank for rank in VLLM_RANKS if rank >= int(config.get("r", 0))), None)
    others = [key for key in ("modules_to_save", "rank_pattern", "alpha_pattern") if config.get(key)]
    if others or beyond_plain(config) or rank is None:
        return []
    words = ["vllm", "serve", base, *(["--revision", revision] if revision else []), "--quantization", "bitsandbytes"]
    words += ["--enable-lora", "--max-lora-rank", str(rank)]
    words += ["--lora-modules", f"{repo_id.split('/')[-1]}={repo_id}"]
    return [Snippet("vLLM", VLLM_NOTE, "bash", shlex.join(words))]


def _merged(repo_id: str, config: dict[str, Any]) -> list[Snippet]:
    """`qlora-neft merge` refuses what is no plain LoRA, and a LoRA GGUF has no place for whole modules."""
    if beyond_plain(config):
        return []
    note = GGUF_NOTE + ("" if config.get("modules_to_save") else LORA_GGUF_NOTE.format(repo=repo_id))
    return [
        Snippet("Merged into a plain 16-bit model", MERGE_NOTE, "bash", f"qlora-neft merge {repo_id} merged"),
        Snippet("GGUF, for llama.cpp and Ollama", note, "bash", GGUF),
    ]


def _ask(prompts: Prompts | None, eos_token_id: int | None) -> str:
    """Code from a request to its answer, with the prompt of the training."""
    if prompts is None:
        return f'prompt = "{QUESTION}"\n' + ASK.format(special="", end="")
    end, special = "", ""
    if prompts.name == "none":
        prompt = json.dumps(TEXT)
    elif prompts.name in ("alpaca", "vicuna"):
        prompt = json.dumps(prompts.text([{"role": "user", "content": QUESTION}]), ensure_ascii=False)
    else:
        messages = f'[{{"role": "user", "content": {json.dumps(QUESTION)}}}]'
        prompt = f"tokenizer.apply_chat_template(\n    {messages}, add_generation_prompt=True, tokenize=False\n)"
        special = ", add_special_tokens=False"
    if prompts.stop_token_ids != (eos_token_id,):
        end = f", eos_token_id={list(prompts.stop_token_ids)}"
    return f"prompt = {prompt}\n" + ASK.format(special=special, end=end)
