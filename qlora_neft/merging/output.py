"""The folder a merge makes: refused, made beside its place, put there whole; what lies in it besides the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import RunFailed, UserInputError
from ..files.json_file import write_json
from ..run_folder.lock import LOCK
from ..run_folder.output_folder import claimed

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
