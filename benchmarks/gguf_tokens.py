"""Greedy tokens of a real llama.cpp against ours, for finished runs: the merged model, and base with LoRA, as GGUF.

    python benchmarks/gguf_tokens.py out-demo out-other --output gguf.json

Ours is transformers on a CPU in float32, NF4 base and adapter as trained, on the run's held-out prompts. Needs the
extra gguf, and llama-cpp-python. An answer is followed to its stop token or to ``--tokens``. From the first
different token on, two answers are not comparable, so the rest of that answer counts as disagreement.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch

from qlora_neft.adapter.load import Trained, base_of_adapter, load_trained, with_adapter
from qlora_neft.data.templates import alpaca_prompt
from qlora_neft.export.gguf.lora import write_lora_gguf
from qlora_neft.export.gguf.model import write_model_gguf
from qlora_neft.generation.decode import Decoding, generate_ids
from qlora_neft.paths import resolve_bundled

F32_CACHE = {"type_k": 0, "type_v": 0, "flash_attn": False}  # llama.cpp's own default is a cache in f16
ARMS = {
    "merged, f32": ("merged", "f32", F32_CACHE),
    "merged, f16": ("merged", "f16", {}),
    "base f32 + LoRA": ("base", "f32", F32_CACHE),
    "base f16 + LoRA": ("base", "f16", {}),
}


def main() -> None:
    """Compare all runs and print, and optionally write, the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="--output-dir of finished runs on Alpaca rows")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts per run")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer at most")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    found = {Path(run).name: compare(run, options.prompts, options.tokens) for run in options.runs}
    print(json.dumps(found, indent=2))
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n")


def compare(run: str, num_prompts: int, num_tokens: int) -> dict[str, Any]:
    """Compare one run's arms."""
    trained = load_trained(run, device="cpu", precision="fp32")
    context = trained.model.config.max_position_embeddings
    encoded = {text: trained.prompts.ids_of_text(text) for text in prompts_of(trained, num_prompts)}
    texts = [text for text, ids in encoded.items() if len(ids) + num_tokens <= context]  # an answer has all its room
    prompts = [encoded[text] for text in texts]
    stops = trained.prompts.stop_token_ids
    answers = dict(
        generate_ids(
            trained.model, trained.tokenizer, prompts, Decoding(num_tokens), batch_size=1, stop_token_ids=stops
        )
    )
    found: dict[str, Any] = {"prompts": len(answers), "arms": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_models(trained, folder)
        for arm, (name, dtype, options) in ARMS.items():
            path = folder / f"{name}.{dtype}.gguf"
            lora = {"lora_path": str(folder / "lora.gguf")} if name == "base" else {}
            model = llama_cpp.Llama(
                str(path), n_ctx=0, n_threads=1, n_threads_batch=1, verbose=False, logits_all=True, **lora, **options
            )
            pairs = zip(texts, prompts, strict=True)
            same = [model.tokenize(text.encode(), add_bos=True, special=True) == ids for text, ids in pairs]
            found["arms"][arm] = {"prompts_tokenized_alike": sum(same)} | tally(
                trained, model, {i: prompts[i] for i in answers}, answers, num_tokens
            )
            model.close()
    return found


def write_models(trained: Trained, folder: Path) -> None:
    """Write the dequantized NF4 base, alone and merged, as model folders and as GGUF, and the adapter as GGUF."""
    base = base_of_adapter(trained.folder, trained.policy).dequantize()
    base.save_pretrained(folder / "base")
    with_adapter(base, trained.folder).merge_and_unload().save_pretrained(folder / "merged")
    for name in ("base", "merged"):
        trained.tokenizer.save_pretrained(folder / name)
        for dtype in ("f32", "f16"):
            write_model_gguf(folder / name, folder / f"{name}.{dtype}.gguf", dtype)
    write_lora_gguf(trained.folder, folder / "lora.gguf")


def prompts_of(trained: Trained, count: int) -> list[str]:
    """Return the run's held-out rows as prompts, or its training rows if it has none."""
    recipe = trained.folder.recipe
    assert recipe is not None  # the benchmark trained it itself
    path = Path(resolve_bundled(recipe.data.eval_path or recipe.data.path))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]
    return [alpaca_prompt(row["instruction"], row.get("input")) for row in rows]


def tally(trained: Trained, model: Any, prompts: dict, answers: dict, num_tokens: int) -> dict[str, Any]:
    """Count how far llama.cpp's answers agree with ours."""
    stops, counts = trained.prompts.stop_token_ids, {"answers_alike": 0, "tokens": 0, "tokens_alike": 0}
    largest, divergences = 0.0, []
    for number, prompt in prompts.items():
        ours = answers[number] + [stops[0]] * (len(answers[number]) < num_tokens)  # its stop token counts
        theirs = greedy(model, prompt, len(ours), stops)
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        counts["tokens"] += len(ours)
        counts["tokens_alike"] += at
        counts["answers_alike"] += at == len(ours)
        whole = prompt + ours[:-1]
        logits = logits_of(trained, whole)
        largest = max(largest, (logits - their_logits(model, whole)).abs().max().item())
        if at < len(ours):
            row = logits[len(prompt) + at - 1]
            gap = (row[ours[at]] - row[theirs[at]]).item() if at < len(theirs) else None
            divergences.append({"prompt": number, "token": at, "our_logit_gap": gap})
    return {**counts, "largest_logit_difference": largest, "divergences": divergences}


def greedy(model: Any, prompt: list[int], count: int, stops: tuple[int, ...]) -> list[int]:
    """llama.cpp's most likely tokens, one stop token included."""
    model.reset()
    found: list[int] = []
    for token in model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
        found.append(stops[0] if token in stops else token)
        if token in stops or len(found) == count:
            break
    return found


def logits_of(trained: Trained, ids: list[int]) -> torch.Tensor:
    """Return our logits, (T, V)."""
    with torch.no_grad():
        return trained.model(input_ids=torch.tensor([ids])).logits[0]


def their_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """llama.cpp's, (T, V)."""
    model.reset()
    model.eval(ids)
    return torch.from_numpy(np.array(model.scores[: len(ids)]))


if __name__ == "__main__":
    main()
