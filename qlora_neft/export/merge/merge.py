"""Merge an adapter and its base into a plain model, and prove that it is the trained one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

from ...base.checkpoint import ShardWriter
from ...base.nf4 import nf4_config
from ...base.precision import resolve_precision
from ...disks import check_writable, failing_with_the_disk
from ...errors import RunFailed, UserInputError
from ...files import give_usual_mode, put_folder, read_json, sync, sync_all, write_json
from ...paths import kind_of
from ...recipe.schema import Quantization
from ...run_folder.lock import LOCK
from ...run_folder.resume import claimed
from ...run_folder.tokenizer_files import save_tokenizer
from ..hub.public import SHOWN
from ..leaks import paths_in
from .plan import DEQUANTIZED, NF4, Plan
from .proof import Evidence, ProofRows, measure, sized
from .report import KL_LIMIT, REPORT, MergeReport, report_of

SPARE_BYTES = 64 * 2**20  # for tokenizer, index and file system
Say = Callable[[str], None]


def merge_adapter(
    plan: Plan,
    out: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: ProofRows | None,
    *,
    max_shard_bytes: int,
    device: str = "auto",
    say: Say = print,
) -> MergeReport:
    """Merge shard by shard, prove it, and put the result in its place.

    Args:
        plan: From `plan_merge`.
        out: Folder for the merged model, new or empty.
        tokenizer: Saved with it.
        rows: What to prove it on, None for no proof.
        max_shard_bytes: Largest size of a shard; merging takes about this much memory besides the largest tensor.
        device: Device of the proof; merging is done on the CPU.
        say: Called with progress lines.

    Returns:
        The content of ``merge_report.json``, a dictionary.

    Raises:
        UserInputError: If OUT cannot be written to, or a weight does not fit the dtype.
        RunFailed: If the default merge is not the trained model; it is kept as ``OUT.failed``.
    """
    out = Path(out).expanduser()
    check_out(out)
    check_space(out, plan.num_bytes())
    with failing_with_the_disk(_disk_message(out)), _draft_of(out) as draft:
        # Written, then proven: the proof reads back the files that the user gets.
        num_bytes = _write(plan, draft, tokenizer, max_shard_bytes, say)
        for leak in paths_in(draft, _local_paths(plan))[:SHOWN]:
            say(f"before you share it: {leak.file}, line {leak.line}, names {leak.text!r} of this machine")
        # float32 on any device: there both sides compute with the same numbers, and rounding does not hide a fault.
        policy = resolve_precision("fp32", device)
        evidence = None if rows is None else measure(plan, draft, rows, policy, say)
        report = report_of(plan, evidence, num_bytes)
        write_json(draft / REPORT, report)
        failed = report["status"] == "failed"
    # After the block: until its end the draft holds a lock file, which is no part of the model.
    _put(draft, _failed_place(out) if failed else out)
    if failed:
        assert evidence is not None, "only a proof fails"
        raise RunFailed(_why(plan, evidence, out))
    return report


# ---- Before anything is written ----


def check_out(out: Path) -> None:
    """Refuse a place that holds something.

    Raises:
        UserInputError: If OUT is a file or a folder with content.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserInputError(f"OUT: must be a new or empty folder, {str(out)!r} is not. Name another.")
    check_writable(out, "OUT")
    failed = _failed_place(out)
    # A failed merge is replaced by the next one; anything else of that name is somebody's own.
    if failed.exists() and not (failed / REPORT).is_file():
        raise UserInputError(
            f"OUT: {str(failed)!r}, where a merge that fails is kept, exists and is not a failed merge. Move it."
        )


def check_space(out: Path, num_bytes: int) -> None:
    """Refuse a disk that is too full.

    Raises:
        UserInputError: With the space that is needed and the space there is.
    """
    # OUT is new, so the disk is asked about through the nearest folder that exists.
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < num_bytes + SPARE_BYTES:
        raise UserInputError(
            f"OUT: the merged model takes {num_bytes / 1e9:.1f} GB, {str(place)!r} has {free / 1e9:.1f} GB free. "
            "Free space or name another disk."
        )


# ---- The model ----


def _write(plan: Plan, draft: Path, tokenizer: PreTrainedTokenizerBase, max_shard_bytes: int, say: Say) -> int:
    """Write the merged model; return the size of its weights in bytes."""
    expected = plan.num_bytes()

    def wrote(total: int) -> None:
        say(f"written: {sized(total)} of {sized(max(total, expected))}")

    writer = ShardWriter(draft, max_shard_bytes, wrote)
    # One tensor at a time, in the order of the model: neither base nor result is ever whole in memory.
    for name in plan.merge.base.parameters():
        weight = plan.merge.stored(name, plan.strategy, plan.dtype)
        for key, piece in plan.merge.base.pieces(name, weight):
            writer.add(key, piece)
    # Of a checkpoint that also sees, the towers: unchanged, so that the folder loads as the base does.
    for key in plan.merge.base.others():
        writer.add(key, plan.merge.base.other(key))
    writer.close()
    section = Quantization(bnb_4bit_use_double_quant=plan.merge.double_quant)
    quantization = nf4_config(section, plan.dtype) if plan.strategy == NF4 else None
    _write_companions(draft, plan, quantization)
    save_tokenizer(tokenizer, draft, revision=plan.folder.base_revision, say=say)
    return writer.total_bytes


def _write_companions(draft: Path, plan: Plan, quantization: BitsAndBytesConfig | None) -> None:
    """Write configuration and generation settings beside the weights."""
    base, dtype = plan.merge.base.folder, plan.dtype
    config = read_json(base / "config.json")
    key = "torch_dtype" if "torch_dtype" in config else "dtype"  # transformers before 4.56 reads torch_dtype only
    config |= {key: str(dtype).removeprefix("torch.")}
    if kind_of(str(config.get("_name_or_path") or "")) == "local":  # of the machine that saved the base
        config.pop("_name_or_path", None)
    # A base stored in NF4 names its quantization, which the merged weights no longer have.
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization.to_dict()
    write_json(draft / "config.json", config)
    give_usual_mode(draft.glob("*.safetensors"))
    if (base / "generation_config.json").is_file():
        shutil.copyfile(base / "generation_config.json", draft / "generation_config.json")


def _local_paths(plan: Plan) -> list[str]:
    places = (plan.folder.source, plan.folder.base, plan.merge.base.folder)
    return [str(Path(place).expanduser().absolute()) for place in places if Path(place).expanduser().exists()]


def _why(plan: Plan, evidence: Evidence, out: Path) -> str:
    name = str(plan.dtype).removeprefix("torch.")
    other = "float16" if plan.dtype == torch.bfloat16 else "float32"
    return (
        f"the merged model is not the one that was trained: KL {evidence.strategies[DEQUANTIZED].kl:.2g} nats per "
        f"token in {name}, {KL_LIMIT:g} is allowed. It is kept as {_failed_place(out)}. Try --dtype {other}."
    )


# ---- Its place ----


@contextmanager
def _draft_of(out: Path) -> Generator[Path, None, None]:
    """Yield a hidden folder beside OUT to write into; it is removed if the block ends early.

    Raises:
        UserInputError: If another merge into OUT is under way.
    """
    draft = out.with_name(f".{out.name}.part")
    try:
        with ExitStack() as stack:
            try:
                stack.enter_context(claimed(draft))
            except UserInputError as error:  # speaks of a run's --output-dir
                raise UserInputError(str(error).replace("--output-dir", "OUT")) from error
            _empty(draft)  # a merge that was killed may have left files
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


def _disk_message(out: Path) -> Callable[[str], str]:
    """Return a function from the cause of a disk failure to its message."""

    def message(cause: str) -> str:
        return f"{str(out)!r} cannot be written ({cause}); nothing is left of it. Free space or name another disk."

    return message


def _failed_place(out: Path) -> Path:
    """Return the place where a merge is kept if its proof fails."""
    return out.with_name(f"{out.name}.failed")


def _put(draft: Path, place: Path) -> None:
    """Give a finished draft its name.

    Raises:
        RunFailed: If something has taken that name meanwhile.
    """
    try:
        sync_all(draft)  # on the disk before it has its name
        if (place / REPORT).is_file():  # an earlier merge that failed
            put_folder(draft, place, synced=True)
        else:
            draft.rename(place)  # fails on a folder that holds something
            sync(place.parent)
    except OSError as error:
        raise RunFailed(f"{str(place)!r} cannot be put there ({error}). The merged model is in {draft}.") from error
