"""The list of committed measurements: each page, its main figure computed from raw data, and the files beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu import report as gpu_report

from . import DOCS, ROOT

RESULTS = DOCS / "results"
INTRO = """# Results

Every measurement that this project states, with the program that made it, the data and the machine. What is not here
has not been measured. In particular, **nothing has been measured on a GPU** unless a page below says so. The figures in
the list are computed from the raw files beside the pages.

The pages on `stories260K` and `babyllama361` (ablations, figure 4, signature, merging, GGUF) were measured before
bitsandbytes' unpacking on CPUs was corrected here. The MLPs of these two models have 172 and 352 inputs, no multiples
of 64, so their `down_proj` computed with wrong scales, the same in every arm of a comparison. The demo's base is not
concerned.

| page | in short | raw |
|---|---|---|
"""


def text() -> str:
    """Return the page."""
    return INTRO + "".join(_line(path) for path in sorted(RESULTS.glob("*.md")) if path.name != "index.md")


def _line(page: Path) -> str:
    title, _, rest = page.read_text(encoding="utf-8").partition("\n")
    beside = sorted(path for path in RESULTS.glob(f"{page.stem}*") if path.suffix != ".md")
    files = ", ".join(f"[{path.suffix[1:]}]({path.name})" for path in beside)
    headline = HEADLINES[page.stem]() if page.stem in HEADLINES else _first_sentence(rest)
    return f"| [{title.removeprefix('# ')}]({page.name}) | {headline} | {files} |\n"


def _first_sentence(body: str) -> str:
    """Return the first sentence of running text, links without their targets."""
    paragraphs = [block.replace("\n", " ").strip() for block in body.split("\n\n")]
    prose = next(block for block in paragraphs if block and block[0] not in "#|`!<")
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", prose)
    return re.split(r"(?<=[.:])\s", plain, maxsplit=1)[0].rstrip(":")


def _raw(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


# ---- What the raw figures say, in short ----


def _figure4() -> str:
    arms = _raw("figure4")["arms"]
    ours, theirs = (arms[name]["mean_difference_to_no_noise"] for name in ("published", "transformers"))
    losses = ("clean_train_loss", "held_out_loss")
    said = [", ".join(f"{arm[loss]:+.2f}" for loss in losses) for arm in (ours, theirs)]
    return f"alpha 15 against no noise, clean train and held-out loss: {said[0]}; transformers' hook: {said[1]}"


def _cpu_step() -> str:
    without, with_bf16 = (_raw(f"cpu_step_{name}")["plain_over_ours"] for name in ("without_bf16", "with_bf16"))
    return f"{without:.0f} times as fast on AVX2, {with_bf16:.1f} times with AVX512-BF16"


def _busy_machine() -> str:
    arms = _raw("busy_machine")["times_idle"]  # beside no loop, one and two
    sleeping, spinning = (" and ".join(f"{value:.1f}" for value in arms[arm][1:]) for arm in ("sleeping", "spinning"))
    return f"beside one and two busy loops {sleeping} times the idle step; with spinning threads {spinning}"


def _prepare_data() -> str:
    raw = _raw("prepare_data")
    seconds = raw["first_start_seconds"]
    two = f"{seconds['ours, 2 processes']:.0f} s against {seconds['plain, 2 processes']:.0f} s with two processes"
    return f"{two}, then {raw['second_start_seconds']['ours, 2 processes']:.2f} s from the cache"


def _faults() -> str:
    rows = _raw("faults")
    tried = [row for row in rows if row["held"] is not None]
    held, lost = sum(row["held"] for row in tried), max(row["lost"] for row in tried)
    return f"{held} of {len(tried)} faults tried held to the byte (of {len(rows)}), at most {lost} steps taken again"


def _gguf() -> str:
    arms = [arm for model in _raw("gguf").values() for name, arm in model["arms"].items() if name == "merged, f32"]
    alike, tokens = (sum(arm[key] for arm in arms) for key in ("tokens_alike", "tokens"))
    return f"merged in float32: {alike:,} of {tokens:,} greedy tokens alike"


def _merge() -> str:
    runs = [run["dtypes"][dtype] for run in _raw("merge")["runs"].values() for dtype in ("float16", "bfloat16")]
    kl = {name: [run["strategies"][name]["kl"] for run in runs] for name in ("dequantized", "original", "nf4")}
    ranges = [f"{name} {min(values):.1g} to {max(values):.1g}" for name, values in kl.items()]
    return f"KL to the trained model, three models, 16 bits: {'; '.join(ranges)}"


def _signature() -> str:
    def at_15(regime: str, measure: str, form: str) -> str:
        found = [_raw(f"signature_{model}_{regime}")["measures"][measure]["arms"][-1] for model in ("stories", "baby")]
        return ", ".join(f"{arm['difference']['mean']:{form}}" for arm in found)

    loss, rouge = "held_out_loss", "overfit.train_prompts_rouge_l"
    by_heart = f"held-out loss {at_15('memorise', loss, '+.2f')}, ROUGE-L {at_15('memorise', rouge, '+.0f')} points"
    many = f"where they see 800 rows once: {at_15('paper', loss, '+.2f')}"
    return f"alpha 15 where two models memorise: {by_heart}; {many}"


def _tune() -> str:
    found = _raw("tune").values()
    above = ", ".join(f"{result['above']:+.3f}" for result in found)
    return f"whole runs at the rates found by four searches, against the best of a grid, held-out loss: {above}"


def _gpu() -> str:
    return gpu_report.headline(_raw("gpu") if (RESULTS / "gpu.json").exists() else {})


def _step_counts() -> str:
    counts = json.loads((ROOT / "benchmarks" / "step_counter" / "counts.json").read_text(encoding="utf-8"))["counts"]
    said = []
    for arm in ("llama, as on CUDA", "llama, plain TRL"):
        moved, kept = (size * 8 / 1024 for size in (counts[arm]["bytes"]["other"], counts[arm]["kept"]))
        said.append(f"{moved:,.0f} KB moved in {sum(counts[arm]['launches'].values())} launches, {kept:,.0f} KB kept")
    return f"a token and layer of Llama-2-7B, as on CUDA: {said[0]}; plain TRL: {said[1]}. Counted, not timed"


HEADLINES: dict[str, Callable[[], str]] = {
    "figure4": _figure4,
    "cpu_step": _cpu_step,
    "step_counts": _step_counts,
    "gpu": _gpu,
    "busy_machine": _busy_machine,
    "prepare_data": _prepare_data,
    "faults": _faults,
    "gguf": _gguf,
    "merge": _merge,
    "signature": _signature,
    "tune": _tune,
}
