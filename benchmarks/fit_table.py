"""The planner's answers for four model sizes on many cards, beside published peaks. No GPU, no network, seconds.

python benchmarks/fit_table.py > docs/results/fit.md
"""

from __future__ import annotations

from qlora_neft import Recipe, load_recipe
from qlora_neft.fit import card_of, choose
from qlora_neft.fit.estimate import Step, memory_terms
from qlora_neft.fit.geometry import Geometry, geometry_of, shipped_config

BASES = {
    "7B": "meta-llama/Llama-2-7b-hf",
    "13B": "meta-llama/Llama-2-13b-hf",
    "30B": "huggyllama/llama-30b",
    "70B": "meta-llama/Llama-2-70b-hf",
}
CARDS = (6, 8, 12, 16, 24, 40, 48, 80)
# Who, base, r, micro-batch in tokens, checkpointing, optimizer, published bytes.
PUBLISHED = (
    ("LLaMA-Factory's wiki, Hugging Face, A100: batch 4 x 1024, r 8", "7B", 8, 4096, True, "adamw_torch", 9e9),
    ("litgpt, A100: batch 1, Alpaca, r 8", "7B", 8, 512, False, "adamw_torch", 13.84e9),
    ("litgpt, A100: batch 1, Alpaca, r 8", "13B", 8, 512, False, "adamw_torch", 22.55e9),
    ("LLaMA-Factory's README, QLoRA 4-bit", "7B", 8, 512, True, "adamw_torch", 6e9),
    ("LLaMA-Factory's README, QLoRA 4-bit", "30B", 8, 512, True, "adamw_torch", 24e9),
    ("LLaMA-Factory's README, QLoRA 4-bit", "70B", 8, 512, True, "adamw_torch", 48e9),
)


def main() -> None:
    """Print the page."""
    print("# What fits where, by the planner\n")
    print("How large a micro-batch each size of memory holds, by counts and a model of memory")
    print("(`benchmarks/fit_table.py`).")
    print("**No figure of the model is measured on a GPU.**")
    for r in (64, 16):
        print(f"\n## 512 tokens, 16 sequences a step, LoRA r {r} on all linear layers, paged AdamW in 32 bits\n")
        print(
            "Tokens of the largest micro-batch; `c`: activation checkpointing, `c8`: in 8 blocks; `p`: optimizer states"
        )
        print("paged out; `o`: activations kept in host memory.\n")
        print("| GiB | " + " | ".join(BASES) + " |\n|---|" + "---|" * len(BASES))
        for memory in CARDS:
            cells = [_cell(name, r, memory) for name in BASES.values()]
            print(f"| {memory} | " + " | ".join(cells) + " |")
    print("\n## Beside published peaks\n")
    print("| published | base | there, GB | planner, GB | planner / published |\n|---|---|---:|---:|---:|")
    for who, base, r, tokens, checkpointing, optim, published in PUBLISHED:
        ours = _peak(BASES[base], r, tokens, checkpointing, optim)
        print(f"| {who} | {base} | {published / 1e9:.1f} | {ours / 1e9:.1f} | {ours / published:.2f} |")
    print(NOTES)


NOTES = """
The settings of the published runs are known only in part, and their frameworks are others. litgpt publishes what the
allocator reserved, and keeps the whole of the logits and more of each block; Hugging Face's figure is of an older stack
that kept the whole of the logits too, which TRL 1.16 does not; LLaMA-Factory's README names cards that suffice, not
peaks. The planner lies below all of them, and says "not measured" until a GPU has been asked. What is exact is the
weights: see `tests/integration/test_geometry.py`."""


def _cell(name: str, r: int, memory: int) -> str:
    choice, fits = choose(_recipe(r), _geometry(name), card_of(f"{memory}GiB"))
    if not fits:
        return "-"
    blocks = choice.step.checkpointed_blocks
    checkpointed = " c" if blocks == choice.num_layers else f" c{blocks}" if blocks else ""
    marks = checkpointed + " p" * bool(choice.paged_out) + " o" * choice.step.offloading
    return f"{choice.step.tokens}{marks}"


def _peak(name: str, r: int, tokens: int, checkpointing: bool, optim: str) -> int:
    geometry = _geometry(name)
    # Their frameworks compute a block by its modules.
    step = Step(tokens, 0, geometry.num_layers * checkpointing, optim=optim, fused_lora=False, fused_norms=False)
    return sum(memory_terms(geometry, _recipe(r).lora, step, double_quant=True).values())


def _recipe(r: int) -> Recipe:
    """Return 512 tokens, 16 sequences per step, all linear layers, with held-out rows, which take memory too."""
    return load_recipe("llama2-7b-alpaca", [f"lora.r={r}", "data.eval_fraction=0.1"])


def _geometry(name: str) -> Geometry:
    config = shipped_config(name)
    assert config is not None
    return geometry_of(config)


if __name__ == "__main__":
    main()
