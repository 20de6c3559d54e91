"""The page of the committed counts.

python -m benchmarks.step_counter.page > docs/results/step_counts.md
"""

from __future__ import annotations

from typing import Any

from .arms import FAMILIES
from .counter import ATTENTION, BASE, OTHER
from .recorded import recorded, recorded_with

SCALE = 8 / 1024  # an eighth of Llama-2-7B in every width: eight times the bytes, in KB
# What is counted, its arm, and the targets: KB moved, launches, KB kept.
ROWS = (
    ("plain TRL, half-precision LoRA", "llama, plain TRL", None),
    ("this trainer by PEFT's and transformers' modules", "llama, by modules", None),
    ("this trainer, as it runs on a CPU", "llama", (2400, 200, 170)),
    ("this trainer, as on CUDA", "llama, as on CUDA", (1700, 135, 130)),
)
MORE = (
    ("by modules, r 16, no dropout", "llama, by modules, r 2, no dropout"),
    ("as on CUDA, no dropout", "llama, no dropout, as on CUDA"),
    ("as on CUDA, rows joined (padding-free)", "llama, padding-free, as on CUDA"),
    ("as on CUDA, all blocks checkpointed", "llama, checkpointing, as on CUDA"),
    ("on a CPU, float32", "llama, float32"),
)

INTRO = """# What a training step costs, counted

Forward and backward, for one token in one decoder layer of Llama-2-7B's proportions, LoRA r 64 on all linear layers,
dropout 0.1, bfloat16, no checkpointing. Counted operation by operation on a CPU by `python -m benchmarks.step_counter`;
**no time is measured here, and nothing on a GPU**.
"""

BEFORE = (
    "Before its fused path this trainer moved 5,357 KB in 280 launches and kept 338 KB, dropout masks included "
    "(this counter, commit 3733335).\n\n"
    "Counted in the first step of a run. Of the launches, 14 are its own (copies of the adapters in half precision, "
    "made one by one) and on a CPU another 14 (the scales of NF4's blocks, unpacked once there); later steps have "
    "neither."
)

WHAT = """
## What is counted, and what is not

A real trainer with a real NF4 base takes one optimizer step of one micro-batch, two rows, with models of one and of two
layers and at two lengths. The second difference over layers and lengths is what one more token costs in one more layer;
what does not grow with the tokens (reading LoRA's weights, unpacking NF4) drops out of the bytes, while launches are
those of a whole layer. The model is an eighth of Llama-2-7B in every width, r 8 for 64, and its bytes are multiplied
by eight; counted once at full size, the modules' path moved 5,488 KB against 5,496 by this scale.

- **Moved**: bytes of the tensors that every operation reads and writes, views aside. Every read counts, as if it came
  from memory: what a cache saves is not seen. A repeated (expanded) dimension is read once. Products with the base's
  weights, attention and unpacking of NF4 stand apart: fusion changes little about them.
- **Launches**: operations that touch memory, all kinds together.
- **Kept**: storages that autograd holds from the forward to the backward pass, each once and whole, those on the
  contexts of autograd functions included; parameters, buffers and the base left out.
- **Waits**: places where the host has to wait for the device before it can go on: `.item()`, `nonzero`, indexing by a
  mask and the like, on tensors that would be on the device.
- **As on CUDA**: a function of `qlora_neft.fused.ops`, a fused norm and a rotary embedding (Liger's if not fused) count
  as one launch that reads its inputs and writes its outputs; masks are drawn inside. Otherwise what runs on the CPU is
  counted, masks that NumPy draws with their bytes. Not seen: what other libraries' kernels do inside themselves,
  such as the three passes of a flash-attention backward, or bitsandbytes' for one weight.

The same counts by family, with and without dropout and checkpointing, are in `benchmarks/step_counter/counts.json`.
`tests/integration/test_step_counts.py` counts again and fails if one rises;
`python -m benchmarks.step_counter --record` records them anew.
"""


def main() -> None:
    """Print the page."""
    print(text(), end="")


def text() -> str:
    """Return the page."""
    counts = recorded()
    versions = ", ".join(f"{name} {version}" for name, version in recorded_with().items())
    table = [
        "| | KB moved | launches | KB kept | waits a step | target: KB, launches, KB kept |",
        "|---|---:|---:|---:|---:|---|",
        *(_row(name, counts[arm], target) for name, arm, target in ROWS),
    ]
    kinds = [
        "| | base products, KB | attention, KB | most alive in a block, KB |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | {counts[arm]['bytes'][BASE] * SCALE:,.0f} | {counts[arm]['bytes'][ATTENTION] * SCALE:,.0f} | "
            f"{counts[arm]['peak'] * SCALE:,.0f} |"
            for name, arm, _ in ROWS
        ),
    ]
    more = [
        "| | KB moved | launches | KB kept | waits a step |",
        "|---|---:|---:|---:|---:|",
        *(_row(name, counts[arm]) for name, arm in MORE),
    ]
    families = [
        "| family, small | launches on a CPU | as on CUDA | KB moved on a CPU | as on CUDA | KB kept |",
        "|---|---:|---:|---:|---:|---:|",
        *(_family(name, counts[name], counts[f"{name}, as on CUDA"]) for name in FAMILIES),
    ]
    parts = (table, [BEFORE], kinds, ["## Other settings", "", *more], ["## Families", "", *families])
    body = "\n\n".join("\n".join(part) for part in parts)
    return f"{INTRO}\n{body}\n{WHAT}\nCounted with {versions}.\n"


def _row(name: str, counts: dict[str, Any], target: tuple[int, int, int] | str | None = "") -> str:
    cells = [
        f"{counts['bytes'][OTHER] * SCALE:,.0f}",
        str(sum(counts["launches"].values())),
        f"{counts['kept'] * SCALE:,.0f}",
        str(sum(counts["waits"].values())),
    ]
    if target != "":
        cells.append("" if target is None else ", ".join(f"{value:,}" for value in target))
    return f"| {name} | " + " | ".join(cells) + " |"


def _family(name: str, here: dict[str, Any], on_cuda: dict[str, Any]) -> str:
    launches = [str(sum(counts["launches"].values())) for counts in (here, on_cuda)]
    moved = [f"{counts['bytes'][OTHER] / 1024:,.0f}" for counts in (here, on_cuda)]
    return f"| {name} | " + " | ".join([*launches, *moved, f"{on_cuda['kept'] / 1024:,.1f}"]) + " |"


if __name__ == "__main__":
    main()
