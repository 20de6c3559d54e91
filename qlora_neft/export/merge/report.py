"""The content of ``merge_report.json``, and the lines printed at the end of a merge."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from ...adapter.folder import WEIGHTS, AdapterFolder
from ...adapter.prompts import recorded_template
from ...display.tables import Table
from ...files import sha256_of_file
from ...paths import JINJA_SUFFIXES, shown_path
from ...run_folder.metrics import versions
from ..hub.public import public_path
from .plan import DEQUANTIZED, NF4, ORIGINAL, Plan
from .proof import Distance, Evidence, sized

REPORT = "merge_report.json"
REPORT_VERSION = 1
KL_LIMIT = 1e-3  # nats per token; the default merge measures 1e-6 to 1e-4
MEANING = {
    DEQUANTIZED: "NF4 base, dequantized: what was trained",
    ORIGINAL: "original base",
    NF4: "quantized again, as merge_and_unload does in 4 bit",
}


class DistanceRecord(TypedDict):
    """Distance of a model from the trained one, see `Distance`; a number that is not finite is null."""

    kl: float | None
    top1: float
    loss: float | None


class ProofRecord(TypedDict):
    """The rows measured on, and the two models that every strategy is compared with."""

    rows: int
    tokens: int
    rows_from: str
    reference_loss: float
    no_adapter: DistanceRecord
    streamed: bool


class MergeReport(TypedDict):
    """Content of ``merge_report.json``; ``status`` is ``done``, ``failed`` or ``unproven``."""

    report_version: int
    status: str
    chosen: str
    dtype: str
    strategies: dict[str, DistanceRecord]
    kl_limit: float
    proof: ProofRecord | None
    base: str
    base_revision: str | None
    base_commit: str | None
    bnb_4bit_use_double_quant: bool | None
    adapter: str
    prompt_template: str | None
    chat_template_kwargs: dict[str, Any]
    system_prompt: str | None
    adapter_sha256: str
    merged_layers: int
    bytes: int
    versions: dict[str, str]


def report_of(plan: Plan, evidence: Evidence | None, num_bytes: int) -> MergeReport:
    """Record a merge.

    Args:
        plan: What was merged.
        evidence: What the proof measured, None without one.
        num_bytes: Size of the written weights.
    """
    status = "unproven"
    if evidence is not None:
        # Only the default claims to be the trained model. A divergence of NaN compares as False, so it fails.
        good = plan.strategy != DEQUANTIZED or evidence.strategies[DEQUANTIZED].kl <= KL_LIMIT
        status = "done" if good else "failed"
    stated = plan.folder.recipe.data if plan.folder.recipe else None
    return {
        "report_version": REPORT_VERSION,
        "status": status,
        "chosen": plan.strategy,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "strategies": {} if evidence is None else {name: _record(found) for name, found in evidence.strategies.items()},
        "kl_limit": KL_LIMIT,
        "proof": None if evidence is None else _proof(evidence),
        # By their names alone, as the report is part of what is shared: a path of this machine says who made it.
        "base": public_path(shown_path(plan.folder.base)),
        "base_revision": plan.folder.base_revision,
        "base_commit": getattr(plan.config, "_commit_hash", None),
        "bnb_4bit_use_double_quant": plan.merge.double_quant if plan.merge.quantized else None,
        "adapter": public_path(plan.folder.source),
        "prompt_template": _public_template(plan.folder),
        # How requests are asked as rows were trained.
        "chat_template_kwargs": stated.chat_template_kwargs if stated else {},
        "system_prompt": stated.system_prompt if stated else None,
        # Which weights were merged, also after the run's folder has gone on training.
        "adapter_sha256": sha256_of_file(plan.folder.path / WEIGHTS),
        "merged_layers": len(plan.merge.update.pairs),
        "bytes": num_bytes,
        "versions": versions(),
    }


def _public_template(folder: AdapterFolder) -> str | None:
    """Return the prompt template of the training; a file of the user's is the tokenizer's own by now."""
    stated = recorded_template(folder)
    return "chat" if stated is not None and stated.endswith(JINJA_SUFFIXES) else stated


def _proof(evidence: Evidence) -> ProofRecord:
    return {
        "rows": evidence.num_rows,
        "tokens": evidence.num_tokens,
        "rows_from": evidence.origin,
        "reference_loss": evidence.loss,
        "no_adapter": _record(evidence.base),
        "streamed": evidence.streamed,
    }


def _record(distance: Distance) -> DistanceRecord:
    """Return a distance for JSON, which has no word for NaN and infinity."""
    kl, loss = (number if math.isfinite(number) else None for number in (distance.kl, distance.loss))
    return {"kl": kl, "top1": distance.top1, "loss": loss}


def lines(report: MergeReport, out: Path) -> list[str]:
    """Return the lines printed at the end of a successful merge."""
    size = f"{report['dtype']}, {sized(report['bytes'])}"
    if report["proof"] is None:
        return [f"{out}: merged without proof ({size})"]
    kl = report["strategies"][report["chosen"]]["kl"]
    found = [*_table(report, report["proof"]), f"{out}: merged, {report['chosen']}, {size}"]
    # Reached by the other two strategies alone: a default merge beyond the limit has failed before.
    if kl is None or kl > report["kl_limit"]:
        measured = "not finite" if kl is None else f"{kl:.2g}, more than {report['kl_limit']:g}"
        found.append(
            f"warning: {report['chosen']} is not the model that was trained (KL {measured}). "
            f"The default, --strategy {DEQUANTIZED}, is."
        )
    return found


def _table(report: MergeReport, proof: ProofRecord) -> list[str]:
    """Format the strategies' distances from the trained model."""
    in_nf4 = report["bnb_4bit_use_double_quant"] is not None
    base, meaning = (
        ("NF4 base", MEANING) if in_nf4 else ("base", dict.fromkeys(MEANING, "not quantized: the base itself"))
    )
    rows = [["trained model", "0", "100%", f"{proof['reference_loss']:.4f}", ""]]
    for name, values in report["strategies"].items():
        mark = " <" if name == report["chosen"] else ""
        rows.append([f"{name}{mark}", *_numbers(values), meaning[name]])
    rows.append(["no adapter", *_numbers(proof["no_adapter"]), f"{base} alone, for comparison"])
    measured_on = f"{proof['tokens']} trained tokens of {proof['rows']} rows ({proof['rows_from']})"
    heading = f"against {base} + adapter in float32, on {measured_on}; KL and loss in nats per token"
    return [heading, Table(("", "KL", "top-1", "loss", ""), rows, align="lrrrl").plain()]


def _numbers(values: DistanceRecord) -> list[str]:
    kl, top1, loss = values["kl"], values["top1"], values["loss"]
    return ["-" if kl is None else f"{kl:.2g}", f"{top1:.2%}", "-" if loss is None else f"{loss:.4f}"]
