"""The story of a merge: an adapter and its base in, a plain model with the proof that it is the trained one out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from ...adapter.folder import WEIGHTS
from ...base.checkpoint import ShardWriter
from ...base.nf4 import nf4_config
from ...base.precision import resolve_precision
from ...errors import RunFailed, UserInputError
from ...files import failing_with_the_disk, finite, sha256_of_file, write_json
from ...paths import shown_path
from ...recipe.schema import Quantization
from ...run_folder.lock import LOCK
from ...run_folder.metrics import versions
from ...run_folder.resume import claimed
from .plan import DEQUANTIZED, NF4, Plan
from .proof import KL_LIMIT, Evidence, ProofRows, evidence, sized

REPORT = "merge_report.json"
SPARE_BYTES = 64 * 2**20  # tokenizer, index, file system


def check_out(out: Path) -> None:
    """Refuse a place that holds something.

    Raises:
        UserInputError: If OUT is a file or a folder with content.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserInputError(f"OUT: must be a new or empty folder, {str(out)!r} is not. Name another.")
    failed = failed_place(out)
    if failed.exists() and not (failed / REPORT).is_file():
        raise UserInputError(f"OUT: {str(failed)!r} is in the way of a merge that fails, and is none. Move it.")


def check_space(out: Path, num_bytes: int) -> None:
    """Refuse a disk without room, before anything is written.

    Raises:
        UserInputError: With what is needed and what is there.
    """
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < num_bytes + SPARE_BYTES:
        raise UserInputError(
            f"OUT: the merged model takes {num_bytes / 1e9:.1f} GB, {str(place)!r} has {free / 1e9:.1f} GB free. "
            "Free space or name another disk."
        )


@contextmanager
def draft_of(out: Path) -> Iterator[Path]:
    """A hidden folder beside OUT. It goes with whatever ends the block early.

    Raises:
        UserInputError: If another merge into OUT is under way.
    """
    draft = out.with_name(f".{out.name}.part")
    try:
        with ExitStack() as stack:
            try:
                stack.enter_context(claimed(draft))
            except UserInputError as error:  # in the words of a run
                raise UserInputError(str(error).replace("--output-dir", "OUT")) from error
            _empty(draft)  # of what a merge that was killed has left
            try:
                yield draft
            except BaseException:
                _empty(draft)
                raise
    finally:
        if draft.is_dir() and not any(draft.iterdir()):
            draft.rmdir()


def _empty(draft: Path) -> None:
    for path in draft.iterdir():
        if path.name != LOCK:
            path.unlink()


def disk_message(out: Path) -> Callable[[str], str]:
    """What to say of a merge whose disk fails, by the cause."""

    def message(cause: str) -> str:
        return f"{str(out)!r} cannot be written ({cause}); nothing is left of it. Free space or name another disk."

    return message


def failed_place(out: Path) -> Path:
    """Where a merge goes whose proof fails."""
    return out.with_name(f"{out.name}.failed")


def put(draft: Path, place: Path) -> None:
    """Give a finished draft its name.

    Raises:
        RunFailed: If something came to be there meanwhile.
    """
    if place.exists() and (place / REPORT).is_file():  # an earlier merge that failed
        shutil.rmtree(place)
    try:
        draft.rename(place)
    except OSError as error:
        raise RunFailed(f"{str(place)!r} cannot be put there ({error}). The merged model is in {draft}.") from error


def write_companions(draft: Path, base: Path, tokenizer: Any, dtype: torch.dtype, quantization: Any) -> None:
    """What stands beside the weights: the base's configuration in the new dtype, generation settings, tokenizer.

    Args:
        draft: Where they go.
        base: The base's folder.
        tokenizer: The adapter's, with its chat template.
        dtype: Of the weights.
        quantization: A ``BitsAndBytesConfig`` if the weights are in NF4, else None.
    """
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in config else "dtype"  # as programs of the base's time spell it
    config |= {key: str(dtype).removeprefix("torch.")}
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization.to_dict()
    write_json(draft / "config.json", config)
    for path in draft.glob("*.safetensors"):  # safetensors makes files that their owner alone may read
        shutil.copymode(draft / "config.json", path)
    if (base / "generation_config.json").is_file():
        shutil.copyfile(base / "generation_config.json", draft / "generation_config.json")
    tokenizer.save_pretrained(draft)


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
    section = Quantization(bnb_4bit_use_double_quant=plan.merge.double_quant)
    quantization = nf4_config(section, plan.dtype) if plan.strategy == NF4 else None
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
        "merged_layers": len(plan.merge.update.pairs),
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
