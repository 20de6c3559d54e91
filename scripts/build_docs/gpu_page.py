"""Which recipe for which card: the planner's answer for every shipped recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qlora_neft import list_recipes, load_recipe
from qlora_neft.fit import plan_recipe

GIB = 2**30
CARDS = ("rtx4070-12g", "t4", "rtx4080-16g", "l4", "rtx4090", "rtx5090", "a100-40g", "a6000-48g", "a100-80g", "h200")
CLOSE = 0.5  # GiB; what fits with less to spare is marked

INTRO = """# Which recipe for my GPU

```
qlora-neft fit qwen3-4b-chat --vram t4
qlora-neft fit llama2-7b-alpaca --vram 12GiB
```

gives the answer for one recipe and one card, at once and before any download; without `--vram`, for your own card.
This page has the same answers for every shipped recipe.

!!! warning "Planned, not measured"
    Weights are counted to the byte. All other terms of memory, and every speed, are a model that has **not been
    measured on a GPU**. If little memory is left to spare, try it: `train` starts with the plan, reads the real peak
    after the first step, and halves the micro-batch if memory runs out, which changes nothing that is learned.

A cell is the planned peak in GiB. **-**: not even the smallest plan fits. `c`: with activation checkpointing, `c8`: in
8 blocks. `p`: optimizer states are paged out to the host. `o`: activations are kept in host memory. `!`: less than
0.5 GiB to spare. Of each card 94% is used.
"""

ADVICE = """
Recipes in one row have the same plan: the same base, rank and length, with other data. They are explained in
[recipes](recipes.md). Without a GPU: `demo`, or a recipe of your own with an equally small base.

## It does not fit

1. `machine.activation_checkpointing=true`: costs time, changes nothing that is learned; `auto` uses it where it helps
2. a shorter `data.max_length`, if `qlora-neft preview` shows that few rows are cut by it
3. `train.optim=paged_adamw_8bit`
4. a smaller `lora.r`
5. a smaller base

`qlora-neft fit` says which of these is enough in your case. All but the first change what is learned.

## Planned speed

Tokens per second in a training step, low to high: counted operations over 35% to 60% of the datasheet's speed. **Not
measured.**
"""

MADE = """
## How this page was made

`python -m scripts.build_docs` asks the planner (`qlora_neft.fit`) for each recipe as it ships, with `machine: {}`,
and each card; `tests/unit/test_docs_generated.py` does it again and compares. The model of memory, and what it is
compared with: [does it fit?](fit.md), [results](results/fit.md).
"""

Plans = dict[str, dict[str, dict[str, Any]]]  # by recipe, by card


def text() -> str:
    """Return the page."""
    plans = {name: {card: plan_recipe(load_recipe(name), card) for card in CARDS} for name in list_recipes()}
    memory = _table(plans, _peak)
    speed = _table({name: row for name, row in plans.items() if name != "demo"}, _speed)
    return f"{INTRO}\n{memory}\n{ADVICE}\n{speed}\n{MADE}"


def _table(plans: Plans, cell: Callable[[dict[str, Any]], str]) -> str:
    """One column per card, one row per group of recipes with the same plans, smaller bases first."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in sorted(plans, key=lambda name: (plans[name]["t4"]["parameters"], name)):
        groups.setdefault(tuple(cell(plans[name][card]) for card in CARDS), []).append(name)
    some = next(iter(plans.values()))
    heads = [f"{card}, {some[card]['card']['memory'] / GIB:.1f}" for card in CARDS]
    lines = ["| recipe \\ card, GiB | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(CARDS)]
    for cells, names in groups.items():
        lines.append(f"| {'<br>'.join(f'`{name}`' for name in names)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _peak(plan: dict[str, Any]) -> str:
    if not plan["fits"]:
        return "-"
    blocks = plan["plan"]["activation_checkpointing"]
    checkpointed = "c" * blocks if isinstance(blocks, bool) else f"c{blocks}"
    marks = checkpointed + "p" * bool(plan["paged_out_bytes"]) + "o" * (plan["plan"]["activation_offloading"] is True)
    close = "!" * (plan["margin_bytes"] < CLOSE * GIB)
    return " ".join(filter(None, (f"{plan['peak_bytes'] / GIB:.1f}", marks, close)))


def _speed(plan: dict[str, Any]) -> str:
    low, high = plan["tokens_per_second"]
    return f"{low:,} - {high:,}" if plan["fits"] else "-"
