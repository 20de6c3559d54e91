"""The model card: a receipt, from which the training can be repeated. Every line comes from a record."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from ...adapter.folder import beyond_plain
from ...adapter.prompts import Prompts
from ...noise.neftune import expected_norm
from ..consumers import vllm_rank_flag
from .records import TEMPLATE_FILE, data_paths, is_hub_id, is_public, public_path, uses_template_file

LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}  # as `datasets` names them


def card_data(
    repo_id: str, summary: dict[str, Any], recipe: dict[str, Any] | None, license: dict[str, str]
) -> ModelCardData:
    """The front matter, in the Hub's own objects.

    Args:
        repo_id: Where the adapter goes.
        summary: As `training_summary` made it.
        recipe: The public recipe, None if there is none.
        license: ``license``, ``license_name`` and ``license_link``, empty if it is not known.
    """
    name, results = repo_id.split("/")[-1], _results(summary, recipe)
    return ModelCardData(
        library_name="peft",
        base_model=summary["base"]["id"],
        base_model_relation="adapter",
        pipeline_tag="text-generation",
        tags=tags(summary, recipe),
        datasets=_datasets(recipe) or None,
        **license,
        **({"model_name": name, "eval_results": results} if results else {}),
    )


def tags(summary: dict[str, Any], recipe: dict[str, Any] | None) -> list[str]:
    """What the adapter can be found by."""
    found = ["lora", "text-generation", f"base_model:adapter:{summary['base']['id']}"]
    if recipe is None:
        return found
    noisy = ["neftune"] if summary["neftune"]["noise_alpha"] or summary["neftune"].get("final_alpha") else []
    return ["qlora_neft", "qlora", *noisy, "bitsandbytes", recipe["quantization"]["bnb_4bit_quant_type"], *found]


def held_out_name(recipe: dict[str, Any]) -> str:
    """How readers are told which rows were held out."""
    data = recipe["data"]
    if data.get("eval_fraction") is not None:
        return f"{data['path']}, {data['eval_fraction']:.3g} of its rows, held out"
    path = data.get("eval_path") or data["path"]
    return f"{path}, split {data.get('eval_split') or 'train'}" if is_hub_id(path) else path


def _datasets(recipe: dict[str, Any] | None) -> list[str]:
    data = (recipe or {}).get("data")
    if not data:
        return []
    paths = [data["path"], *(source["path"] for source in data.get("mixture", []))]
    return list(dict.fromkeys(path for path in paths if is_hub_id(path)))


def _results(summary: dict[str, Any], recipe: dict[str, Any] | None) -> list[EvalResult]:
    """What was measured on held-out rows; after the run, or at the last evaluation before a checkpoint."""
    after = summary.get("after") or {}
    loss = after.get("held_out_loss", summary.get("latest", {}).get("held_out_loss", {}).get("value"))
    measured = [("loss", "held-out loss (nats per token)", loss)]
    measured.append(("exact_match", "exact answers (share)", after.get("exact_match")))
    if recipe is None:
        return []
    return [
        EvalResult(**_place(recipe), metric_type=kind, metric_name=name, metric_value=value)
        for kind, name, value in measured
        if value is not None
    ]


def _place(recipe: dict[str, Any]) -> dict[str, Any]:
    """Task and data of a result. Files that are not on the Hub go by the loader that reads them."""
    data = recipe["data"]
    path = data.get("eval_path") or data["path"]
    on_hub, own = is_hub_id(path), not data.get("eval_path")
    return {
        "task_type": "text-generation",
        "task_name": "Text generation",
        "dataset_type": path if on_hub else LOADERS.get(PurePath(path).suffix.lower(), "text"),
        "dataset_name": held_out_name({"data": data | {"path": public_path(data["path"])}}),
        "dataset_split": data.get("eval_split") or data["split"] if own else data.get("eval_split") or "train",
        "dataset_revision": data.get("revision") if on_hub and own else None,
    }


QUESTION = "Give three tips for staying healthy."
TEXT = "Once upon a time"

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
    rank_flag = vllm_rank_flag(int(config.get("r", 0)))
    others = [key for key in ("modules_to_save", "rank_pattern", "alpha_pattern") if config.get(key)]
    if others or beyond_plain(config) or rank_flag is None:
        return []
    words = ["vllm", "serve", base, *(["--revision", revision] if revision else []), "--quantization", "bitsandbytes"]
    words += ["--enable-lora", *rank_flag.split()]
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


TEMPLATE = Path(__file__).with_name("card.md.jinja")
LOSSES = (
    ("clean_train_loss", "clean train loss (no noise, no dropout; nats per token)", "{:.4f}"),
    ("held_out_loss", "held-out loss (nats per token)", "{:.4f}"),
    ("exact_match", "exact answers, held out", "{:.1%}"),
)


def render_card(
    repo_id: str,
    data: ModelCardData,
    summary: dict[str, Any],
    recipe: dict[str, Any] | None,
    config: dict[str, Any],
    snippets: list[Snippet],
    *,
    has_curves: bool,
    license_is_bases: bool,
) -> str:
    """The card's text.

    Args:
        repo_id: Where the adapter goes.
        data: Its front matter.
        summary: As `training_summary` made it.
        recipe: The public recipe, None if there is none.
        config: ``adapter_config.json``.
        snippets: How it is used.
        has_curves: Whether ``loss.png`` lies beside it.
        license_is_bases: Whether the license is that of the base, as the Hub has it.
    """
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.ChainableUndefined)
    environment.filters |= {"count": _count, "size": _size, "time": _time, "number": _number}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    body = template.render(
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        base=summary["base"],
        summary=summary,
        recipe=recipe,
        config=config,
        license=data.license_name or data.license,
        noise=_noise(summary),
        losses=_losses(summary),
        held_out=held_out_name(recipe) if recipe else None,
        license_is_bases=license_is_bases,
        files_to_rerun=["recipe.yaml", *([TEMPLATE_FILE] if recipe and uses_template_file(recipe) else [])],
        unpublished_files=[path for path in data_paths(recipe) if not is_public(path)],
        snippets=snippets,
        has_curves=has_curves,
        targets=_targets(config.get("target_modules")),
    )
    return f"---\n{data.to_yaml(line_break=chr(10))}\n---\n\n{body.strip()}\n"


def _noise(summary: dict[str, Any]) -> dict[str, Any] | None:
    """The noise with its expected norm; None if there was none or it is not known."""
    noise = summary.get("neftune", {})
    if not (noise.get("noise_alpha") or noise.get("final_alpha")):
        return None
    return {**noise, "norm": expected_norm(noise["noise_alpha"], noise["distribution"])}


def _losses(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of a table: what, before, after; of a checkpoint what was measured last, with its step."""
    before, after, latest = (summary.get(key) or {} for key in ("before", "after", "latest"))
    rows = []
    for key, label, form in LOSSES:
        first = form.format(before[key]) if before.get(key) is not None else ""
        last = form.format(after[key]) if after.get(key) is not None else ""
        if key in latest:
            last = f"{form.format(latest[key]['value'])} (step {latest[key]['step']})"
        if first or last:
            rows.append((label, first, last))
    return rows


def _targets(modules: Any) -> str:
    """Which layers carry the adapter, each kind of layer once."""
    if isinstance(modules, str):
        return modules
    return ", ".join(sorted({name.split(".")[-1] for name in modules or []}))


def _count(value: float) -> str:
    return f"{value:,}"


def _number(value: float) -> str:
    return f"{value:g}"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 / 10 else f"{num_bytes / 2**20:.0f} MiB"


def _time(seconds: float) -> str:
    minutes = math.floor(seconds / 60)
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
