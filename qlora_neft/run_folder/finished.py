"""A finished run and its records: whether the result is still what was written, and where a damaged record stands
once more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserInputError
from ..files import SEAL, is_inside, is_whole, read_json, sha256_of_file
from .checkpoints import find_checkpoints, read_manifest, step_folders
from .record import RUN_FILE, SUMMARY_FILE, RunFile, RunSummary

ADAPTER, MODEL = "adapter_model.safetensors", "model*.safetensors"
# Records that a run writes by these names; a folder there would stop it halfway.
FILES = (RUN_FILE, SUMMARY_FILE, "recipe.yaml", "data_report.json", "metrics.jsonl", "answers.json")


def damaged_result(output_dir: Path) -> dict[str, str]:
    """Return the files of a finished run's result that are not as they were written, each with what is wrong.

    Raises:
        UserInputError: If its summary is damaged.
    """
    summary = RunSummary.of(read_summary(output_dir))
    if summary.files:
        found = {name: _wrong(output_dir / name, sha256) for name, sha256 in summary.files.items() if is_inside(name)}
        return {name: wrong for name, wrong in found.items() if wrong}
    # Of an earlier version, which kept no hashes: the weights are there, and those of the last checkpoint.
    paths = [output_dir / ADAPTER] if (output_dir / ADAPTER).exists() else sorted(output_dir.glob(MODEL))
    if not paths:
        return {ADAPTER: "is missing"}
    written: dict[str, str] = {}
    newest = find_checkpoints(output_dir).newest
    if newest is not None and newest.step == summary.steps:
        written = {name: file.sha256 for name, file in read_manifest(newest.path).files.items()}
    found = {path.name: _wrong(path, written.get(path.name)) for path in paths}
    return {name: wrong for name, wrong in found.items() if wrong}


def _wrong(path: Path, sha256: str | None) -> str | None:
    try:
        if not path.is_file():
            return "is missing"
        if sha256 is None:
            return None if _has_header(path) else "is damaged"
        return None if sha256_of_file(path) == sha256 else "has changed since it was written"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _has_header(path: Path) -> bool:
    """Tell whether a file of weights begins as one does: with the length of a JSON object, and the object."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 2 <= length <= path.stat().st_size and file.read(1) == b"{"


def set_aside(output_dir: Path, names: list[str]) -> list[str]:
    """Give changed files of a result another name, since what is written anew would replace them; return the names."""
    found = []
    for name in names:
        path = output_dir / name
        if path.is_file() and path.stat().st_size:
            aside = path.with_name(f"{path.name}.changed")
            while aside.exists():  # of an earlier time: both are kept
                aside = aside.with_name(f"{aside.name}-too")
            path.rename(aside)
            found.append(aside.name)
    return found


# ---- Records ----


def check_files(output_dir: Path) -> None:
    """Refuse a folder that has a folder where a run keeps a file.

    Raises:
        UserInputError: If there is one.
    """
    for name in FILES:
        if (output_dir / name).is_dir():
            raise UserInputError(
                f"{output_dir / name}: is a folder, and a run keeps a file of that name there. Move or remove it."
            )


def read_run_file(output_dir: Path, *, as_it_is: bool = False) -> RunFile | None:
    """Return what ``run.json`` says of a run; None if it cannot be read, names no recipe, or is not as it was written.

    Args:
        output_dir: The run's folder.
        as_it_is: Whether a record that can be read passes although its own hash says that it was changed.
    """
    try:
        content = read_json(output_dir / RUN_FILE)
    except (OSError, ValueError, RecursionError):
        return None
    return _run_file(content, as_it_is=as_it_is)


def _run_file(content: Any, *, as_it_is: bool = False) -> RunFile | None:
    if not isinstance(content, dict) or not (as_it_is or is_whole(content)):
        return None
    found = RunFile.of(content)
    return None if found.recipe is None else found


def restored_run_file(output_dir: Path) -> tuple[RunFile, str] | None:
    """Return a run's record from what repeats it, and where that is; None if nothing does.

    The manifest of every checkpoint says the same, and the summary of a finished run says enough.
    """
    for path in step_folders(output_dir):
        try:
            found = _run_file(read_manifest(path).about)
        except ValueError:
            continue
        if found is not None:
            return found, path.name
    try:
        found = _run_file({key: value for key, value in read_summary(output_dir).items() if key != SEAL})
    except UserInputError:
        return None
    return None if found is None else (found, SUMMARY_FILE)


def read_summary(output_dir: Path) -> dict[str, Any]:
    """Return the content of a finished run's ``summary.json``.

    Raises:
        UserInputError: If it is damaged.
    """
    path = output_dir / SUMMARY_FILE
    remedy = "Remove it to finish the run."
    try:
        content = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise UserInputError(f"--output-dir: {str(path)!r} cannot be read ({error}). {remedy}") from error
    if not isinstance(content, dict) or not is_whole(content):
        raise UserInputError(f"--output-dir: {str(path)!r} is not as it was written. {remedy}")
    return content
