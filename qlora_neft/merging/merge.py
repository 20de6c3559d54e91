"""The story of a merge: an adapter and its base in, a plain model with the proof that it is the trained one out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import RunFailed
from ..files.bundled import shown_path
from ..files.disk_errors import failing_with_the_disk
from ..files.file_hash import sha256_of_file
from ..files.json_file import finite, write_json
from ..precision import resolve_precision
from ..quantization import nf4_config
from ..run_folder.record import versions
from ..trained.folder import WEIGHTS
from .evidence import Evidence, evidence
from .output import REPORT, check_out, check_space, disk_message, draft_of, failed_place, put, write_companions
from .plan import Plan
from .proof import KL_LIMIT
from .rows import ProofRows
from .shards import ShardWriter
from .strategies import DEQUANTIZED, NF4
from .table import sized

REPORT_VERSION = 1
Say = Callable[[str], None]


def merge_adapter(
    plan: Plan,
    out: Path,
    tokenizer: Any,
    rows: ProofRows | None,
    *,
    max_shard_bytes: int,
    device: str = "auto",
    say: Say = print,
) -> dict[str, Any]:
    """Merge shard by shard, prove it, and put it in its place.

    Args:
        plan: From `plan_merge`.
        out: The merged model's folder, new or empty.
        tokenizer: Saved with it.
        rows: What to prove it on, None for no proof.
        max_shard_bytes: Of a shard; about what memory the merge takes beside the largest tensor.
        device: Where the proof computes; merging is done on the CPU.
        say: Takes a line for a person.

    Returns:
        The content of ``merge_report.json``.

    Raises:
        UserInputError: If OUT cannot be written to, or a weight does not fit the dtype.
        RunFailed: If the default merge is not the trained model; it is kept as ``OUT.failed``.
    """
    out = Path(out).expanduser()
    check_out(out)
    check_space(out, plan.num_bytes())
    with failing_with_the_disk(disk_message(out)), draft_of(out) as draft:
        total = _write(plan, draft, tokenizer, max_shard_bytes, say)
        policy = resolve_precision("fp32", device)
        found = None if rows is None else evidence(plan, draft, rows, policy, say)
        report = _report(plan, found, total)
        write_json(draft / REPORT, report)
        failed = report["status"] == "failed"
    put(draft, failed_place(out) if failed else out)
    if failed:
        assert found is not None
        raise RunFailed(_why(plan, found, out))
    return report


def _write(plan: Plan, draft: Path, tokenizer: Any, max_shard_bytes: int, say: Say) -> int:
    expected = plan.num_bytes()

    def wrote(total: int) -> None:
        say(f"written: {sized(total)} of {sized(max(total, expected))}")

    writer = ShardWriter(draft, max_shard_bytes, wrote)
    for name, key in plan.merge.base.parameters().items():
        writer.add(key, plan.merge.stored(name, plan.strategy, plan.dtype))
    writer.close()
    quantization = nf4_config(plan.dtype, double_quant=plan.merge.double_quant) if plan.strategy == NF4 else None
    write_companions(draft, plan.merge.base.folder, tokenizer, plan.dtype, quantization)
    return writer.total_bytes


def _report(plan: Plan, found: Evidence | None, total: int) -> dict[str, Any]:
    status = "unproven"
    if found is not None:
        good = plan.strategy != DEQUANTIZED or found.strategies[DEQUANTIZED].kl <= KL_LIMIT  # NaN is not
        status = "done" if good else "failed"
    return {
        "report_version": REPORT_VERSION,
        "status": status,
        "chosen": plan.strategy,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "strategies": {} if found is None else {k: finite(v.as_dict()) for k, v in found.strategies.items()},
        "kl_limit": KL_LIMIT,
        "proof": None if found is None else found.as_dict(),
        "base": shown_path(plan.folder.base),
        "base_revision": plan.folder.base_revision,
        "base_commit": getattr(plan.config, "_commit_hash", None),
        "bnb_4bit_use_double_quant": plan.merge.double_quant,
        "adapter": plan.folder.source,
        "adapter_sha256": sha256_of_file(plan.folder.path / WEIGHTS),
        "merged_layers": len(plan.merge.update.scale),
        "bytes": total,
        "versions": versions(),
    }


def _why(plan: Plan, found: Evidence, out: Path) -> str:
    name = str(plan.dtype).removeprefix("torch.")
    other = "float16" if plan.dtype == torch.bfloat16 else "float32"
    return (
        f"the merged model is not the one that was trained: KL {found.strategies[DEQUANTIZED].kl:.2g} nats per token "
        f"in {name}, {KL_LIMIT:g} is allowed. It is kept as {failed_place(out)}. Try --dtype {other}."
    )
