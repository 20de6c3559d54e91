"""The page and the raw file of a measurement; what was not measured is said to be so, figure by figure. No torch.

python -m benchmarks.gpu.report docs/results    # the page again, from the raw file that is there, or from none
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import figures
from .figures import Parts
from .lengths import NAMES, distribution
from .parts import read_parts, write_whole
from .plan import ARMS, CAPPED, LORA, MAIN, NOISE_ALPHA, SHORT, STEPS, TOKENS, WARM_UP

RAW, PAGE = "gpu.json", "gpu.md"
GIB = 2**30
LOG_END = 4000  # characters
NOT_MEASURED = "not measured"
TARGETS = (
    ("fused, as fast as TRL tuned, 7B, Alpaca lengths", "at least 1.5 times"),
    ("fused, share of the ceiling, 7B, about 4,096 tokens a forward pass", "at least 0.75"),
    ("fused, peak memory against the planner's estimate, every run", "within 5%"),
)


def write_report(output: Path, state: Path, failed: Mapping[str, str], skipped: list[str]) -> dict[str, Any]:
    """Write page and raw file; return the raw content."""
    parts = read_parts(state)
    # The end of what a failed session printed, for those who see the raw file and not the machine.
    files = {name: state / "logs" / f"{name}.log" for name in failed}
    logs = {
        name: file.read_text(encoding="utf-8", errors="replace")[-LOG_END:]
        for name, file in files.items()
        if file.exists()
    }
    identity = parts.pop("identity", {})
    raw = {"identity": identity, "failed": dict(failed), "skipped": skipped, "parts": parts, "logs": logs}
    write_whole(output / RAW, json.dumps(raw, indent=1) + "\n")
    write_whole(output / PAGE, page(raw))
    return raw


def page(raw: Mapping[str, Any]) -> str:
    """Return the page of a raw file; of an empty one, the page that says that nothing was measured."""
    parts: Parts = {**raw.get("parts", {}), "identity": raw.get("identity", {})}
    wrong = figures.void(parts)
    blocks = (
        _head(raw, parts),
        _section("Targets", _targets(parts, wrong)),
        _section("Speed", _speeds(parts, wrong)),
        _section("Is it the same computation?", _checks(parts, wrong)),
        _section("Memory", _memory(parts)),
        _section("Launches and waits of one step", _profiles(parts)),
        _section("What was on", _switches(parts)),
        _section("Tests on the device", _tests(parts.get("tests"))),
        _section("What is missing", _missing(raw)),
        _section("How", _how()),
    )
    return "\n".join(blocks)


def headline(raw: Mapping[str, Any]) -> str:
    """Return the main figures in a line."""
    parts: Parts = {**raw.get("parts", {}), "identity": raw.get("identity", {})}
    found = [(name, figures.ratio(parts, "fused", "7b", name)) for name in NAMES]
    said = [f"{ratio:.2f} at {name} lengths" for name, ratio in found if ratio is not None]
    if not said or "fused" in figures.void(parts):
        return f"{NOT_MEASURED}: no CUDA device has been at hand"
    return f"{parts['probe']['device']}, 7B: fused against TRL tuned {', '.join(said)}"


def _section(title: str, lines: Iterator[str]) -> str:
    return "\n".join([f"## {title}\n", *lines, ""])


def _table(columns: str, rows: list[str]) -> Iterator[str]:
    yield f"| {columns} |"
    yield "|" + "---|" * (columns.count("|") + 1)
    yield from rows


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


# ---- What came out ----


def _head(raw: Mapping[str, Any], parts: Parts) -> str:
    title = "# A training step on a GPU\n"
    probe = parts.get("probe")
    if probe is None:
        return (
            f"{title}\n"
            "Not measured: no CUDA device has been at hand. On the first that is, one command measures every figure "
            "of this page and writes it again:\n\n"
            "```\npython -m benchmarks.gpu docs/results\n```\n\n"
            "How to run it: [Measuring on a GPU](../measuring_on_a_gpu.md). It has been rehearsed on a CPU with tiny "
            "models, in `tests/integration/test_gpu_benchmark.py`.\n"
        )
    versions = ", ".join(f"{name} {version}" for name, version in raw["identity"]["versions"].items())
    tiny = "**A rehearsal with tiny models: none of these figures means anything.** " if raw["identity"]["tiny"] else ""
    memory = f", {probe['memory_bytes'] / GIB:.0f} GiB" if "memory_bytes" in probe else ""
    return (
        f"{title}\n"
        f"{tiny}Measured on {probe['device']}{memory}: a matrix product of {probe['flops'] / 1e12:.0f} TFLOP/s and a "
        f"copy of {probe['bandwidth'] / 1e12:.2f} TB/s, read and written, are what it does at its best. {versions}. "
        f"Code {raw['identity']['code']}. Raw figures: [{RAW}]({RAW}).\n"
    )


def _targets(parts: Parts, wrong: Mapping[str, str]) -> Iterator[str]:
    ratio, fused = figures.ratio(parts, "fused", "7b", "alpaca"), figures.speed(parts, "fused", "7b", "long")
    share = None if fused is None else fused.share
    gaps = [gap for run in _fused_runs(parts) if (gap := figures.estimate_gap(parts, run)) is not None]
    found = (
        _number(ratio, "{:.2f} times"),
        _number(share, "{:.2f}"),
        _number(max(gaps, key=abs, default=None), "{:+.1%} at worst"),
    )
    mark = f" (void: {wrong['fused']})" if "fused" in wrong else ""
    rows = [_row(what, goal, f"{got}{mark}") for (what, goal), got in zip(TARGETS, found, strict=True)]
    yield from _table("target | | measured", rows)


def _speeds(parts: Parts, wrong: Mapping[str, str]) -> Iterator[str]:
    yield (
        "Trained tokens per second, padding not counted: the median of all counted steps, the slowest and the fastest "
        "in brackets; then as a multiple of TRL tuned, and as a share of the ceiling.\n"
    )
    header = "base, lengths | arm | tokens/s | of TRL tuned | of the ceiling | tokens a forward pass | runs"
    rows = []
    for base, arms in (("7b", _with_extras(parts, MAIN)), ("13b", SHORT)):
        for lengths in NAMES if base == "7b" else NAMES[:1]:
            rows += [_speed_row(parts, base, lengths, arm, wrong) for arm in arms]
    yield from _table(header, rows)


def _with_extras(parts: Parts, arms: tuple[str, ...]) -> list[str]:
    return [*arms, *(arm for arm in figures.arms_in(parts) if arm not in arms)]


def _speed_row(parts: Parts, base: str, lengths: str, arm: str, wrong: Mapping[str, str]) -> str:
    found = figures.speed(parts, arm, base, lengths)
    first = f"{base.upper()}, {lengths}"
    if found is None:
        return _row(first, arm, *[NOT_MEASURED] * 3, "", "")
    if arm in wrong:
        return _row(first, arm, f"void: {wrong[arm]}", "", "", "", str(len(found.runs)))
    return _row(
        first,
        arm,
        f"{found.median:,.0f} ({found.least:,.0f} to {found.most:,.0f})",
        _number(figures.ratio(parts, arm, base, lengths), "{:.2f}"),
        _number(found.share, "{:.2f}"),
        f"{found.forward_tokens:,.0f}",
        str(len(found.runs)),
    )


def _checks(parts: Parts, wrong: Mapping[str, str]) -> Iterator[str]:
    yield (
        "Loss and LoRA gradient of the first step at 7B, without noise and dropout, against float32 one sequence at a "
        f"time. An arm is void whose loss is off by more than {figures.LOSS_TOLERANCE:.0%}, or whose gradient is off "
        f"by more than {figures.GRADIENT_TOLERANCE:.0%} and more than twice as much as upstream's own paths.\n"
    )
    rows = []
    for arm in _with_extras(parts, MAIN):
        check = figures.checks(parts).get(arm, {"problem": NOT_MEASURED})
        if "problem" in check:
            rows.append(_row(arm, check["problem"], "", "", ""))
            continue
        worst = f"{check['worst_gradient_error']:.2%}, {check['worst_weight']}"
        errors = (f"{check['loss_error']:.4%}", f"{check['gradient_error']:.2%}", worst)
        rows.append(_row(arm, *errors, wrong.get(arm, "as it should be")))
    yield from _table("arm | loss off by | gradient off by | worst weight | ", rows)


def _memory(parts: Parts) -> Iterator[str]:
    yield (
        "GiB at the peak: allocated, reserved by the allocator, and taken of the card (reserved and the context); "
        "against the planner's estimate (`qlora-neft fit`) of what is taken. Under a limit the allocator gets no more: "
        "a proof that it fits, not of how fast a smaller card is.\n"
    )
    rows = []
    for base, cap in (*CAPPED, ("13b", None), ("7b", None)):
        for lengths in NAMES if (base, cap) == ("7b", None) else NAMES[:1]:
            arms = _with_extras(parts, MAIN) if base == "7b" and cap is None else SHORT if cap is None else ("fused",)
            rows += [_memory_row(parts, base, cap, lengths, arm) for arm in arms]
    yield from _table("base, lengths | limit | arm | allocated | reserved | taken | estimate | off by", rows)


def _memory_row(parts: Parts, base: str, cap: float | None, lengths: str, arm: str) -> str:
    runs = figures.runs_of(parts, arm, base, lengths, cap)
    first = (f"{base.upper()}, {lengths}", "none" if cap is None else f"{cap:g}", arm)
    taken = figures.peak(parts, runs[0]) if runs else None
    if taken is None:
        return _row(*first, NOT_MEASURED, "", "", "", "")
    memory, estimate = runs[0]["memory"], runs[0].get("estimate")
    shrunk = f", after it ran out of memory ({runs[0]['shrunk']})" if "shrunk" in runs[0] else ""
    return _row(
        *first,
        f"{memory['peak_allocated_bytes'] / GIB:.2f}",
        f"{memory['peak_reserved_bytes'] / GIB:.2f}",
        f"{taken / GIB:.2f}{shrunk}",
        "none" if estimate is None else f"{estimate['peak'] / GIB:.2f}",
        _number(figures.estimate_gap(parts, runs[0]), "{:+.1%}"),
    )


def _fused_runs(parts: Parts) -> list[Mapping[str, Any]]:
    return [part for part in parts.values() if part.get("run", {}).get("arm") == "fused"]


def _profiles(parts: Parts) -> Iterator[str]:
    yield (
        "One step at 7B and Alpaca lengths under torch's profiler: kernels launched, times that the host waited for "
        "the device, values it read, and the share of the step in which the device was busy.\n"
    )
    rows = []
    for arm in _with_extras(parts, MAIN):
        runs = figures.runs_of(parts, arm, "7b", "alpaca")
        found = next((run["profile"] for run in runs if "profile" in run), {"problem": NOT_MEASURED})
        if "problem" in found:
            rows.append(_row(arm, found["problem"], "", "", ""))
            continue
        busy = found["device_busy_seconds"] / found["seconds"]
        counts = (f"{found[key]:,}" for key in ("launches", "host_waits", "values_read_by_the_host"))
        rows.append(_row(arm, *counts, f"{busy:.0%}"))
    yield from _table("arm | launches | host waits | values read | device busy", rows)


def _switches(parts: Parts) -> Iterator[str]:
    """Yield what each arm ran with, as its trainer recorded it after the fact."""
    rows = []
    for arm in _with_extras(parts, MAIN):
        runs = figures.runs_of(parts, arm, "7b", "alpaca")
        found = runs[0].get("fast_path") or runs[0]["switches"] if runs else {}
        said = "; ".join(f"{key}: {_plain(value)}" for key, value in found.items())
        rows.append(_row(arm, said or NOT_MEASURED))
    yield from _table("arm | pieces and switches", rows)


def _plain(value: Any) -> str:
    return json.dumps(value).replace("|", "/").replace('"', "")


def _tests(found: Mapping[str, Any] | None) -> Iterator[str]:
    if found is None:
        yield f"`tests/gpu`: {NOT_MEASURED}."
        return
    cut = "; ended before they were through" if found["cut_off"] else ""
    yield f"`tests/gpu`: {found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped{cut}."
    for test in found["tests"]:
        if test["outcome"] == "failed":
            last = [line for line in test["message"].splitlines() if line.strip()][-1:]
            yield f"\n- failed: `{test['test']}`: {' '.join(last)[:300]}"


def _missing(raw: Mapping[str, Any]) -> Iterator[str]:
    failed, skipped = raw.get("failed", {}), raw.get("skipped", [])
    if not raw.get("parts"):
        yield "Everything."
        return
    yield from (f"- `{name}` failed: {problem}" for name, problem in failed.items())
    yield from (f"- `{name}`: no time was left" for name in skipped)
    if not failed and not skipped:
        yield "Nothing."


# ---- How it is measured ----


def _how() -> Iterator[str]:
    yield (
        f"Random NF4 bases of Llama's sizes, the same bytes in every arm; LoRA r {LORA['r']} with dropout "
        f"{LORA['lora_dropout']} on all linear layers, noise alpha {NOISE_ALPHA:g}, 8-bit AdamW. Each arm runs in "
        "processes of its own, in the order A B B A, on the same token ids in the same order. A run is "
        f"{WARM_UP} steps that are not counted and {STEPS} that are, timed from end to end with the device waited for. "
        f"Ours and, by rows, TRL tuned make forward passes of at most about {TOKENS:,} tokens.\n"
    )
    yield from _table("arm | what it is", [_row(name, ARMS[name].about) for name in (*MAIN, "unsloth")])
    yield ""
    described = [(name, distribution(name)) for name in NAMES]
    rows = [_row(name, f"{of.least} to {of.most}", str(of.sequences_per_step), of.about) for name, of in described]
    yield from _table("lengths | tokens | sequences a step | what they are like", rows)
    yield (
        "\nThe ceiling adds up three times, each at the speed that the card reached above: the operations of a step; "
        "unpacking every NF4 weight once forward and once backward, 2.77 bytes a weight; and what a step with every "
        "elementwise piece fused still moves, 290 bytes a token, layer and unit of width. `benchmarks/gpu/roofline.py` "
        "has the formulas. A published trainer reached 0.76 of it on an A100.\n"
    )
    yield (
        "Gradients are compared in the first, a middle and the last block. A launch is a kernel launch of the CUDA "
        "runtime or driver; a host wait is a synchronization of a stream or an event."
    )


def _number(value: float | None, form: str) -> str:
    return NOT_MEASURED if value is None else form.format(value)


if __name__ == "__main__":
    import sys

    folder = Path(sys.argv[1])
    found = folder / RAW
    write_whole(folder / PAGE, page(json.loads(found.read_text(encoding="utf-8")) if found.exists() else {}))
