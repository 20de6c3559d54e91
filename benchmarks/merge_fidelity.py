"""How far each merge strategy is from the trained model, and how much memory merging takes.

    python benchmarks/merge_fidelity.py NAME=RUN_DIR ... --output docs/results

Merges every run in three dtypes, each with the proof that `qlora-neft merge` makes: all strategies against the NF4 base
with its adapter, in float32, on the run's held-out rows. Then merges a random Llama in a process of its own and watches
the memory that belongs to that process alone (without mapped files).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

DTYPES = ("bfloat16", "float16", "float32")
SYNTHETIC = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 22, "num_attention_heads": 16}
SHARD = 100_000_000  # bytes


def main() -> None:
    """Measure, then write merge.json and merge.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="NAME=RUN_DIR", help="finished runs and their names in the table")
    parser.add_argument("--output", type=Path, required=True, help="folder for merge.json and merge.md")
    parser.add_argument("--rows", type=int, default=64, help="maximum number of held-out rows")
    parser.add_argument("--only-memory", nargs=2, metavar=("BASE", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_memory:
        print(json.dumps(watched_merge(*map(Path, options.only_memory))))
        return
    runs = dict(run.split("=", 1) for run in options.runs)
    result = {"runs": {name: fidelity(folder, options.rows) for name, folder in runs.items()}, "memory": memory()}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "merge.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (options.output / "merge.md").write_text(page(result), encoding="utf-8")


def fidelity(run: str, rows: int) -> dict[str, Any]:
    """Return a run's merge reports by dtype."""
    found = {}
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            arguments = ["merge", run, f"{folder}/out", "--dtype", dtype, "--proof-rows", str(rows), "--device", "cpu"]
            subprocess.run([sys.executable, "-m", "qlora_neft", *arguments], check=False, stdout=subprocess.DEVNULL)
            [path] = Path(folder).glob("out*/merge_report.json")  # one that fails is kept as out.failed
            report = json.loads(path.read_text(encoding="utf-8"))
        about = {key: value for key, value in report["proof"].items() if key != "rows_from"}
        found[dtype] = {"status": report["status"], "strategies": report["strategies"], **about}
    return {"dtypes": found, "versions": report["versions"]}


def memory() -> dict[str, Any]:
    """Measure the merge of a random Llama."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SYNTHETIC, dtype="float16"))
        model.half().save_pretrained(base, max_shard_size="500MB")
        command = [sys.executable, __file__, "--output", folder, "--only-memory", str(base), f"{folder}/out"]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def watched_merge(base: Path, out: Path) -> dict[str, Any]:
    """Merge nothing into a base, which costs as much as merging something, and watch this process's memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from qlora_neft.adapter.folder import AdapterFolder
    from qlora_neft.adapter.weights import Update
    from qlora_neft.base.checkpoint import Checkpoint, ShardWriter
    from qlora_neft.export.merge.plan import DEQUANTIZED, Merge, quantized_names

    out.mkdir()
    save_file({}, out / "adapter_model.safetensors")
    files = Checkpoint(base, AutoConfig.from_pretrained(base), str(base))
    adapter = AdapterFolder("none", out, {"lora_alpha": 1})
    merge = Merge(files, Update(adapter, files.shapes, set(), set()), quantized_names(files), True)
    begin, highest, stop, started = own_bytes(), [0], threading.Event(), time.monotonic()

    def watch() -> None:
        while not stop.wait(0.005):
            highest[0] = max(highest[0], own_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    writer = ShardWriter(out, SHARD, lambda total: None)
    for name, key in files.parameters().items():
        writer.add(key, merge.stored(name, DEQUANTIZED, torch.float16))
    writer.close()
    stop.set()
    thread.join()
    largest = max(torch.Size(shape).numel() for shape in files.shapes.values())
    return {
        "model_bytes": writer.total_bytes,
        "shard_bytes": SHARD,
        "largest_tensor": largest,
        "peak_growth_bytes": highest[0] - begin,
        "seconds": round(time.monotonic() - started, 1),
        "threads": torch.get_num_threads(),
    }


def own_bytes() -> int:
    """Return the memory of this process alone (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def page(result: dict[str, Any]) -> str:
    """Return the measurements as Markdown."""
    lines = [
        "# Merging: how far from the model that was trained",
        "",
        "Made by `benchmarks/merge_fidelity.py`. The reference is the NF4 base with its adapter, in float32 on a CPU.",
        "KL is KL(reference to merged) in nats per trained token; top-1 is the share of tokens for which both models",
        "find the same token the likeliest. The default strategy is measured on the files as written. *no adapter* is",
        "the NF4 base alone.",
        "",
    ]
    for name, run in result["runs"].items():
        first = run["dtypes"][DTYPES[0]]
        lines += [f"## {name}", "", f"{first['tokens']} trained tokens of {first['rows']} held-out rows.", ""]
        lines += ["| weights | strategy | KL | top-1 | loss |", "|---|---|---|---|---|"]
        lines.append(f"| | trained model | 0 | 100% | {first['reference_loss']:.4f} |")
        for dtype, found in run["dtypes"].items():
            lines += [_row(dtype, strategy, values) for strategy, values in found["strategies"].items()]
        lines += [_row("", "no adapter", first["no_adapter"]), ""]
    took = result["memory"]
    lines += [
        "## Memory",
        "",
        f"A random Llama of {took['model_bytes'] / 1e6:.0f} MB (16-bit), shards of {took['shard_bytes'] / 1e6:.0f} MB: "
        f"merging took {took['peak_growth_bytes'] / 1e6:.0f} MB",
        f"more than the process had at its start (mapped files not counted) and {took['seconds']:.0f} s with "
        f"{took['threads']} thread(s) of a shared CPU.",
        f"Its largest tensor has {took['largest_tensor'] / 1e6:.0f} million numbers.",
    ]
    return "\n".join(lines) + "\n"


def _row(dtype: str, strategy: str, values: dict[str, float]) -> str:
    return f"| {dtype} | {strategy} | {values['kl']:.2g} | {values['top1']:.2%} | {values['loss']:.4f} |"


if __name__ == "__main__":
    main()
