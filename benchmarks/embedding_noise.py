"""Token flips and singular values under NEFTune's noise, and their cost for an embedding of Llama-2-7B's size.

    python benchmarks/embedding_noise.py --output docs/results [--data ALPACA.json] [MODEL_DIR ...]

Measures the demo's base on the demo's data, each MODEL_DIR on its vocabulary and, with --data, on those rows; then
32,000 x 4,096 random numbers, only for time and memory. Each is one `qlora-neft eval flips`, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ALPHAS, LENGTHS = "5,10,15,25", "50,100,200,500"
ROWS = "1000"
# With a small tokenizer some prompts fill the 512 tokens; those rows are left out.
ALL_ROWS = ("data.max_dropped_fraction=0.5", "data.max_truncated_fraction=1.0")
RECIPE = "llama2-7b-alpaca"  # Alpaca's prompt, rows of 512 tokens at most
RANDOM_SIZE = (32_000, 4_096)
# The paper's strongest noise, and one at which every token has to be compared with every other.
RANDOM_OPTIONS = ("--alpha", "15,100", "--length", "50")


def main() -> None:
    """Measure, then write ``embedding_noise.json`` and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, help="folders of models")
    parser.add_argument("--data", type=Path, help="Alpaca rows as .json or .jsonl")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--skip-random", action="store_true", help="omit the large embedding")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    results = {"demo": measured("demo", "--alpha", ALPHAS, "--length", LENGTHS, *picture(options.output, "demo"))}
    for model in options.models:
        what = (str(model),)
        if options.data is not None:
            changes = (f"model.name_or_path={model}", "model.revision=main", f"data.path={options.data}")
            what = (RECIPE, *changes, *ALL_ROWS)
        results[model.name] = measured(
            *what, "--rows", ROWS, "--alpha", ALPHAS, "--length", LENGTHS, *picture(options.output, model.name)
        )
    if not options.skip_random:
        with tempfile.TemporaryDirectory() as folder:
            save_random(Path(folder))
            results["random"] = measured(folder, *RANDOM_OPTIONS)
    for name, result in results.items():
        result["model"] = name  # the folder is of this machine only
    content = {"machine": f"{platform.machine()}, {os.environ.get('OMP_NUM_THREADS', 'all')} threads", **results}
    path = options.output / "embedding_noise.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for name, result in results.items():
        print(f"{name}: {result['seconds']:.0f} s, {result['cpu_seconds']:.0f} s of CPU, {result['peak_gib']:.2f} GiB")


def picture(folder: Path, name: str) -> tuple[str, str]:
    """Return the options for a picture."""
    return "--picture", str(folder / f"embedding_noise_{name}.png")


def measured(*arguments: str) -> dict[str, Any]:
    """Run the command; return what it prints, its wall and CPU time in seconds, and its peak memory in GiB."""
    command = [sys.executable, "-m", "qlora_neft", "eval", "flips", *arguments, "--device", "cpu", "--json"]
    start = time.monotonic()
    with tempfile.TemporaryFile() as stdout:
        process = subprocess.Popen(command, stdout=stdout)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"failed: {' '.join(command)}")
        stdout.seek(0)
        report = json.loads(stdout.read())
    for entry in report["flips"]:
        del entry["pairs"]
    seconds = {"seconds": time.monotonic() - start, "cpu_seconds": usage.ru_utime + usage.ru_stime}
    return {**report, **seconds, "peak_gib": usage.ru_maxrss / 2**20}


def save_random(folder: Path) -> None:
    """Save a checkpoint with nothing but an embedding, float32, N(0, 0.02^2), under Llama's names."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    vocabulary, width = RANDOM_SIZE
    LlamaConfig(vocab_size=vocabulary, hidden_size=width, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    weight = torch.empty(vocabulary, width).normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    save_file({"model.embed_tokens.weight": weight}, folder / "model.safetensors")


if __name__ == "__main__":
    main()
