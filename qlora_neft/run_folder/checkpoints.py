"""Checkpoints as folders on disk: whole or not there, and known by a checksum of every file.

A checkpoint is written into a hidden folder and renamed when all of it has reached the disk; it is removed by being
renamed to a hidden name first. So whatever bears a good name was once whole, wherever a process was killed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..errors import UserInputError
from ..files import hidden_name, read_json, remove, sha256_of_file, whole_folder, write_json

if TYPE_CHECKING:
    # Not at run time: the verbs that only look at a folder need no torch.
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

PREFIX = "checkpoint-"
MANIFEST = "manifest.json"
VERSION = 1

_NAME = re.compile(re.escape(PREFIX) + r"([0-9]+)")
# Names that `files.whole_folder` and `prune` leave if their process is killed.
_HIDDEN = re.compile(rf"\.({_NAME.pattern})\.(partial|replaced|removed)-.+")


@dataclass(frozen=True)
class FileSum:
    """What a file of a checkpoint must be."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``: what a checkpoint is, and every file of it.

    Attributes:
        step: Optimizer steps made.
        about: What the writer said of the run; of a run's checkpoint, the content of its ``run.json``.
        files: By path from the checkpoint's folder.
    """

    step: int
    about: dict[str, Any]
    files: dict[str, FileSum]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the file."""
        return {"manifest_version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, content: Any) -> Self:
        """Take the content of a file.

        Raises:
            ValueError: If it is not a manifest of this version.
        """
        try:
            version, step, about = content["manifest_version"], content["step"], content["about"]
            files = {name: FileSum(file["sha256"], file["bytes"]) for name, file in content["files"].items()}
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{MANIFEST} does not describe a checkpoint") from error
        if version != VERSION or type(step) is not int or not isinstance(about, dict):
            raise ValueError(f"{MANIFEST} is not one of version {VERSION}, which this program reads")
        return cls(step, about, files)


@dataclass(frozen=True)
class Checkpoint:
    """A sound checkpoint: its folder, the optimizer steps made, what its writer said of the run."""

    path: Path
    step: int
    about: dict[str, Any]


@dataclass(frozen=True)
class Search:
    """The newest sound checkpoint of a folder, and newer damaged ones (all, if none is sound) with what is wrong."""

    newest: Checkpoint | None
    damaged: list[tuple[Path, list[str]]]


@contextmanager
def new_checkpoint(output_dir: Path, step: int, about: dict[str, Any]) -> Generator[Path, None, None]:
    """A hidden folder to write into; a checkpoint at the end of the block, nothing if an exception leaves it.

    Args:
        output_dir: Folder of the run; made if it is missing.
        step: Optimizer steps made. An older checkpoint of this step is replaced.
        about: What the manifest says of the run; values of JSON.

    Raises:
        OSError: If it cannot be written, for instance for want of space. Nothing is left of it.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with whole_folder(output_dir / f"{PREFIX}{step}", synced=True) as folder:
        yield folder
        paths = {name: folder / name for name in files_in(folder) if name != MANIFEST}
        files = {name: FileSum(sha256_of_file(path), path.stat().st_size) for name, path in paths.items()}
        write_json(folder / MANIFEST, Manifest(step, about, files).to_dict())


def files_in(folder: Path) -> list[str]:
    """Every file below a folder, by its path from there."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint; nothing if it is sound. Files beyond those of its manifest are allowed."""
    return _examine(path)[1]


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint, verified.

    Raises:
        UserInputError: If it is not sound.
    """
    checkpoint, wrong = _examine(path)
    if checkpoint is None:
        raise UserInputError(
            f"{path}: not a checkpoint that can be used: {'; '.join(wrong)}. Name another one, or start anew."
        )
    return checkpoint


def find_checkpoints(output_dir: Path) -> Search:
    """The newest sound checkpoint of a folder by its step; older ones are not looked at."""
    damaged: list[tuple[Path, list[str]]] = []
    for path in _newest_first(output_dir):
        checkpoint, wrong = _examine(path)
        if checkpoint:
            return Search(checkpoint, damaged)
        damaged.append((path, wrong))
    return Search(None, damaged)


def _newest_first(output_dir: Path) -> list[Path]:
    paths = output_dir.iterdir() if output_dir.is_dir() else ()
    steps = {path: int(named[1]) for path in paths if (named := _NAME.fullmatch(path.name)) and path.is_dir()}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def _examine(path: Path) -> tuple[Checkpoint | None, list[str]]:
    """A checkpoint, or what is wrong with it."""
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        return None, [str(error)]
    named = _NAME.fullmatch(path.name)
    wrong = [f"{MANIFEST} is of step {manifest.step}"] if named and int(named[1]) != manifest.step else []
    wrong += [problem for name, file in manifest.files.items() if (problem := _problem(path / name, name, file))]
    return (None, wrong) if wrong else (Checkpoint(path, manifest.step, manifest.about), [])


def read_manifest(path: Path) -> Manifest:
    """Read what a checkpoint is to be.

    Raises:
        ValueError: If there is no manifest, or none that can be used.
    """
    try:
        content = read_json(path / MANIFEST)
    except FileNotFoundError as error:
        raise ValueError(f"{MANIFEST} is missing") from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from error
    return Manifest.from_dict(content)


def _problem(path: Path, name: str, wanted: FileSum) -> str | None:
    """Return what is wrong with one file; the size is looked at first, since it costs nothing."""
    try:
        if not path.is_file():
            return f"{name} is missing"
        if (found := path.stat().st_size) != wanted.bytes:
            return f"{name} has {found} bytes instead of {wanted.bytes}"
        return (
            None if sha256_of_file(path) == wanted.sha256 else f"{name} has another content than was written (SHA-256)"
        )
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"


def prune(output_dir: Path, keep: int) -> None:
    """Remove all but the newest sound checkpoints, and damaged ones among and before them.

    Nothing is removed that is newer than the newest sound one, nor anything where none is sound.

    Args:
        output_dir: Folder of the run.
        keep: Sound ones to keep; one stays in any case.
    """
    kept = 0
    for path in _newest_first(output_dir):
        if kept < max(keep, 1) and not verify(path):
            kept += 1
        elif kept:
            doomed = hidden_name(path, "removed")
            path.rename(doomed)
            remove(doomed)


def remove_leftovers(output_dir: Path) -> None:
    """Clear away what killed processes left half written or half removed. The caller alone writes there."""
    for path in list(output_dir.iterdir()) if output_dir.is_dir() else []:
        if hidden := _HIDDEN.fullmatch(path.name):
            final = path.with_name(hidden[1])
            if hidden[3] == "replaced" and not os.path.lexists(final) and not verify(path):
                path.rename(final)  # killed after it was moved aside, before the new one was in place
            else:
                remove(path)


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase | None, output_dir: str | Path) -> None:
    """Write an adapter so that the same training writes the same bytes; no pickle is written.

    Args:
        model: The trained model; only its adapter is written, in the dtype it was trained in (float32).
        tokenizer: Saved beside it, None to leave it out.
        output_dir: Folder to write to, made if missing.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    # Without False, PEFT asks the Hub for the base's configuration to see whether its vocabulary grew.
    model.save_pretrained(str(output_dir), save_embedding_layers=False)
    (output_dir / "README.md").unlink(missing_ok=True)  # PEFT's template, all "[More Information Needed]"
    _sort_config(output_dir / "adapter_config.json")
    if tokenizer is not None:
        tokenizer.save_pretrained(output_dir)


def _sort_config(path: Path) -> None:
    """PEFT writes sets, in an order that changes from run to run."""
    config = read_json(path)
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    write_json(path, config, sort_keys=True)
