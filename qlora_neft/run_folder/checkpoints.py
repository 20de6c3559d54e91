"""Checkpoints as folders on disk: whole or absent, with a checksum of every file.

A checkpoint is written into a hidden folder, which is renamed when all of it has reached the disk. To remove a
checkpoint, it is first renamed to a hidden name. A folder named ``checkpoint-N`` was therefore whole once, wherever a
process was killed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..errors import UserInputError
from ..files import (
    give_usual_mode,
    hidden_name,
    is_inside,
    read_json,
    remove,
    sha256_of_file,
    sweep_beside,
    whole_folder,
    write_json,
)
from .tokenizer_files import save_tokenizer

if TYPE_CHECKING:
    # Not at run time: the verbs that only look at a folder need no torch.
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PREFIX = "checkpoint-"
BEST = f"{PREFIX}best"  # the best weights of a run under way; no checkpoint, since no step can follow it
MANIFEST = "manifest.json"
Check = Callable[[Path, int], list[str]]  # from a checkpoint's folder and step to what is wrong with its content
VERSION = 1

_NAME = re.compile(re.escape(PREFIX) + r"([0-9]+)")
# Names that `files.whole_folder` and `prune` leave if their process is killed.
_HIDDEN = re.compile(rf"\.({_NAME.pattern})\.(partial|replaced|removed)-.+")


@dataclass(frozen=True)
class FileSum:
    """Hash and size that a file of a checkpoint must have."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``: what a checkpoint is, and all of its files.

    Attributes:
        step: Optimizer steps taken.
        about: What the writer says of the run; in a run's checkpoint, the content of its ``run.json``.
        files: By path inside the checkpoint's folder.
    """

    step: int
    about: dict[str, Any]
    files: dict[str, FileSum]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the file as plain values."""
        return {"manifest_version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, content: Any) -> Self:
        """Make a manifest from the content of its file.

        Raises:
            ValueError: If it is not a manifest of this version.
        """
        try:
            version, step, about = content["manifest_version"], content["step"], content["about"]
            files = {name: FileSum(file["sha256"], file["bytes"]) for name, file in content["files"].items()}
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{MANIFEST} does not describe a checkpoint") from error
        # Not isinstance, which takes true for a number.
        if version != VERSION or type(step) is not int or not isinstance(about, dict):
            raise ValueError(f"{MANIFEST} is not one of version {VERSION}, which this program reads")
        if outside := [name for name in files if not is_inside(name)]:
            raise ValueError(f"{MANIFEST} names a file outside its folder, {outside[0]!r}")
        return cls(step, about, files)


@dataclass(frozen=True)
class Checkpoint:
    """A sound checkpoint: its folder, the optimizer steps taken, and what its writer says of the run."""

    path: Path
    step: int
    about: dict[str, Any]


@dataclass(frozen=True)
class Search:
    """The newest sound checkpoint of a folder, and the damaged ones that are newer, each with its problems."""

    newest: Checkpoint | None
    damaged: list[tuple[Path, list[str]]]


@contextmanager
def new_checkpoint(output_dir: Path, step: int, about: dict[str, Any]) -> Generator[Path, None, None]:
    """Yield a hidden folder to write into, which becomes a checkpoint at the end of the block.

    If an exception leaves the block, nothing remains.

    Args:
        output_dir: The run's folder, made if it is missing.
        step: Optimizer steps taken. An older checkpoint of the same step is replaced.
        about: What the manifest is to say of the run; JSON values.

    Raises:
        OSError: If it cannot be written, for instance on a full disk.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with whole_folder(output_dir / f"{PREFIX}{step}", synced=True) as folder:
        yield folder
        # The manifest comes last: a folder without one is no checkpoint.
        paths = {name: folder / name for name in files_in(folder) if name != MANIFEST}
        files = {name: FileSum(sha256_of_file(path), path.stat().st_size) for name, path in paths.items()}
        write_json(folder / MANIFEST, Manifest(step, about, files).to_dict())


def files_in(folder: Path) -> list[str]:
    """Return the path of every file below a folder, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def verify(path: Path) -> list[str]:
    """Return what is wrong with a checkpoint, nothing if it is sound. Files that its manifest omits are allowed."""
    return _examine(path)[1]


def read_checkpoint(path: Path, check: Check | None = None) -> Checkpoint:
    """Verify a checkpoint and return it; ``check`` looks into its files.

    Raises:
        UserInputError: If it is not sound.
    """
    checkpoint, wrong = _examine(path, check)
    if checkpoint is None:
        raise UserInputError(
            f"{path}: not a checkpoint that can be used: {'; '.join(wrong)}. Name another one, or start over."
        )
    return checkpoint


def find_checkpoints(output_dir: Path, check: Check | None = None) -> Search:
    """Find the newest sound checkpoint of a folder, by step; older ones are not examined.

    Args:
        output_dir: The run's folder.
        check: Looks into the files of a checkpoint whose hashes are right.
    """
    damaged: list[tuple[Path, list[str]]] = []
    for path in step_folders(output_dir):
        checkpoint, wrong = _examine(path, check)
        if checkpoint:
            return Search(checkpoint, damaged)
        damaged.append((path, wrong))
    return Search(None, damaged)


def step_folders(output_dir: Path) -> list[Path]:
    """Return the folders that are named as checkpoints, the newest first, sound or not."""
    paths = output_dir.iterdir() if output_dir.is_dir() else ()
    # By number, since checkpoint-10 comes before checkpoint-9 by name.
    return sorted((p for p in paths if _NAME.fullmatch(p.name) and p.is_dir()), key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    named = _NAME.fullmatch(path.name)
    assert named is not None, "only checkpoints are asked for theirs"
    return int(named[1])


def _examine(path: Path, check: Check | None = None) -> tuple[Checkpoint | None, list[str]]:
    """Return a checkpoint, or what is wrong with it."""
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        return None, [str(error)]
    named = _NAME.fullmatch(path.name)
    # A folder that someone renamed or copied would be resumed at the wrong step.
    wrong = [f"{MANIFEST} is of step {manifest.step}"] if named and int(named[1]) != manifest.step else []
    wrong += [problem for name, file in manifest.files.items() if (problem := _problem(path / name, name, file))]
    if not wrong and check is not None:
        wrong = check(path, manifest.step)
    return (None, wrong) if wrong else (Checkpoint(path, manifest.step, manifest.about), [])


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a checkpoint's folder.

    Raises:
        ValueError: If there is no manifest, or none that can be used; the message says which.
    """
    try:
        content = read_json(path / MANIFEST)
    except FileNotFoundError as error:
        raise ValueError(f"{MANIFEST} is missing") from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from error
    return Manifest.from_dict(content)


def _problem(path: Path, name: str, wanted: FileSum) -> str | None:
    """Return what is wrong with one file. Its size is compared first, since that costs nothing."""
    try:
        if not path.is_file():
            return f"{name} is missing"
        if (found := path.stat().st_size) != wanted.bytes:
            return f"{name} has {found} bytes instead of {wanted.bytes}"
        is_same = sha256_of_file(path) == wanted.sha256
        return None if is_same else f"{name} has another content than was written (SHA-256)"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"


def prune(output_dir: Path, keep: int, newest: int | None = None) -> None:
    """Remove all but the newest sound checkpoints; damaged ones among the kept and before them go too.

    Nothing newer than the newest sound checkpoint is removed, and nothing at all if none is sound.

    Args:
        output_dir: The run's folder.
        keep: Number of sound checkpoints to keep, at least one.
        newest: The step just written. Checkpoints of later steps are those that a resume has passed over: they neither
            count nor go.
    """
    kept = 0
    for path in step_folders(output_dir):
        if newest is not None and _step_of(path) > newest:
            continue
        # A checkpoint is verified before an older one goes: it may have been damaged since it was written.
        if kept < max(keep, 1) and not verify(path):
            kept += 1
        elif kept:
            # Renamed first: a process that is killed halfway must not leave half a checkpoint under a checkpoint's
            # name.
            doomed = hidden_name(path, "removed")
            path.rename(doomed)
            remove(doomed)


def remove_leftovers(output_dir: Path) -> None:
    """Remove what killed processes left half written or half removed. Only the caller may be writing there."""
    sweep_beside(output_dir / BEST)
    for path in list(output_dir.iterdir()) if output_dir.is_dir() else []:
        if hidden := _HIDDEN.fullmatch(path.name):
            # Groups: the name it was to have or had, its step, and why it is hidden.
            final = path.with_name(hidden[1])
            if hidden[3] == "replaced" and not os.path.lexists(final) and not verify(path):
                path.rename(final)  # the process was killed between moving the old one aside and placing the new one
            else:
                remove(path)


def forget_best(output_dir: Path) -> None:
    """Remove the best weights of a run that is done, since its result has them."""
    if (output_dir / BEST).is_dir():
        doomed = hidden_name(output_dir / BEST, "partial")  # a name that is swept if the process is killed halfway
        (output_dir / BEST).rename(doomed)
        remove(doomed)


# ---- The weights ----


def save_adapter(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    output_dir: str | Path,
    *,
    revision: str | None = None,
    say: Callable[[str], None] | None = None,
) -> None:
    """Write what was trained, so that the same training writes the same bytes. No pickle is written.

    Args:
        model: The trained model. Of one with an adapter only the adapter is written, in the dtype it was trained in
            (float32); one without is trained in full and written as transformers does.
        tokenizer: Saved beside it; None to omit it.
        output_dir: The folder to write to, made if it is missing.
        revision, say: As in `save_tokenizer`.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "peft_config"):
        # Without False, PEFT asks the Hub for the base's configuration to see whether its vocabulary grew.
        model.save_pretrained(str(output_dir), save_embedding_layers=False)
        (output_dir / "README.md").unlink(missing_ok=True)  # PEFT's template, all "[More Information Needed]"
        _sort_config(output_dir / "adapter_config.json")
    else:
        model.save_pretrained(str(output_dir))
    give_usual_mode(output_dir.glob("*.safetensors"))
    if tokenizer is not None:
        save_tokenizer(tokenizer, output_dir, revision=revision, say=say)


def _sort_config(path: Path) -> None:
    """Sort the lists and keys: PEFT writes sets, in an order that changes from run to run.

    With experts among the targets, dropout is written as 0: PEFT loads them with no other, not even to answer, when it
    has no effect. What the run trained with stands in its recipe.
    """
    config = read_json(path)
    if config.get("target_parameters"):
        config["lora_dropout"] = 0.0
    for key in ("target_modules", "target_parameters", "modules_to_save", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    write_json(path, config, sort_keys=True)
