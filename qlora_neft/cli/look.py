"""The verb preview: on a screen, as JSON, into a folder. Heavy imports, so imported by the verb alone."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import psutil
import typer
from packaging.requirements import Requirement
from packaging.version import Version
from rich.console import Console

from .. import __version__
from ..data.gate import DataRefused
from ..display.console import RowsProgress
from ..errors import UserInputError
from ..fit import card_of, fit_report, read_config, stored_parameters, this_machine
from ..fit.estimate import local_bytes, seconds, tokens_in
from ..fit.geometry import geometry_of
from ..fit.report import lines, picture
from ..paths import resolve_bundled
from ..recipe import Recipe
from ..runner.build import wanted
from ..runner.preview import Preview, preview, render, save, to_json


def show_preview(recipe: Recipe, *, rows: int, tokens: bool, output_dir: Path | None, as_json: bool) -> None:
    """Print the preview of a recipe; problems end with exit code 2, after all that can be shown."""
    found = _found(recipe, rows, as_json)
    if as_json:
        typer.echo(json.dumps(to_json(found), indent=2))
    elif found.report["rows"]:
        render(found, Console(highlight=False), show_tokens=tokens)
    if output_dir is not None:
        for path in save(found, output_dir):
            typer.echo(f"written: {path}", err=True)
    if found.report["problems"]:
        raise DataRefused(found.report["problems"], found.report)


def _found(recipe: Recipe, rows: int, as_json: bool) -> Preview:
    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            return preview(recipe, rows, None if as_json else RowsProgress(Console(stderr=True)))
    except UserInputError as error:
        if as_json:  # a program finds the problem where it finds all others
            empty = {"rows": 0, "tokens": 0, "trained_tokens": 0, "truncated": 0, "problems": [str(error)]}
            typer.echo(json.dumps(empty, indent=2))
        raise


def show_fit(recipe: Recipe, name: str, *, vram: str | None, picture_path: Path | None, as_json: bool) -> None:
    """Print whether a recipe fits on a card."""
    report = planned(recipe, vram)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        typer.echo("\n".join(lines(report, name)))
    if picture_path is not None:
        _draw(report, name, picture_path)


def planned(recipe: Recipe, vram: str | None) -> dict[str, Any]:
    """The planner's answer for a recipe, see `fit_report`; ``vram`` None asks this machine."""
    path = resolve_bundled(recipe.model.name_or_path)
    card = this_machine() if vram is None else card_of(vram)
    config, origin = read_config(path, recipe.model.revision)
    stored = stored_parameters(path, recipe.model.revision, origin)
    report = fit_report(geometry_of(config), wanted(recipe), card, recipe.machine.model_dump(), stored)
    return {**report, "seconds": _duration(recipe, report["tokens_per_second"])}


def _duration(recipe: Recipe, speed: list[int] | None) -> list[int] | None:
    """Shortest and longest time of the run, None where its data is not here or the speed is not known."""
    num_bytes = local_bytes(resolve_bundled(recipe.data.path))
    if num_bytes is None:
        return None
    low, high = (tokens * recipe.train.num_train_epochs for tokens in tokens_in(num_bytes))
    if recipe.train.max_steps is not None:
        high = min(high, recipe.train.max_steps * recipe.train.effective_batch_size * recipe.data.max_length)
        low = min(low, high)
    return seconds((low, high), speed)


def _draw(report: dict[str, Any], name: str, path: Path) -> None:
    try:
        drawn = picture(report, path, f"{name}: memory of a training step")
    except (OSError, ValueError) as error:
        raise UserInputError(f"--picture: {str(path)!r} cannot be written ({error}). Give a .png file.") from error
    if not drawn:
        raise UserInputError("--picture: matplotlib is missing. Install the extra: pip install 'qlora-neft[plots]'")
    typer.echo(f"written: {path}", err=True)


_GIB = 2**30
_RANK = ("ok", "warn", "fail")
Finding = dict[str, str]


def examine() -> dict[str, Any]:
    """Look at the machine and its packages.

    Returns:
        ``status``, the worst of the findings ("ok", "warn" or "fail"); ``machine``; ``packages``, name to
        version; ``devices``; and ``findings``, each with ``name``, ``status``, ``message`` and ``remedy``.
        Ready for JSON.
    """
    packages = {requirement.name: _version(requirement.name) for requirement in _requirements()}
    findings = [_package_finding(requirement) for requirement in _requirements()]
    findings += [_torchao_finding(_version("torchao")), _matplotlib_finding(_version("matplotlib"))]
    devices, device_findings = _devices()
    findings += device_findings
    return {
        "status": max((finding["status"] for finding in findings), key=_RANK.index),
        "machine": _machine(),
        "packages": packages,
        "devices": devices,
        "findings": findings,
    }


def describe(report: dict[str, Any]) -> str:
    """The report of `examine` as lines for a person."""
    machine = report["machine"]
    lines = [
        f"qlora-neft {machine['qlora_neft']}, Python {machine['python']}, {machine['platform']}",
        f"{machine['cpu_cores']} CPU cores, {machine['memory_gib']} GiB memory",
    ]
    for device in report["devices"]:
        lines.append(f"{device['name']}, compute capability {device['capability']}, {device['memory_gib']} GiB memory")
    for finding in report["findings"]:
        lines.append(f"{finding['status']:<5} {finding['name']}: {finding['message']}")
        if finding["remedy"]:
            lines.append(f"      remedy: {finding['remedy']}")
    return "\n".join(lines)


def _machine() -> dict[str, Any]:
    return {
        "qlora_neft": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": _cpu_cores(),
        "memory_gib": round(psutil.virtual_memory().total / _GIB, 1),
    }


def _cpu_cores() -> int:
    """Cores this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _requirements() -> list[Requirement]:
    """The packages this one needs, with their windows, from the one place where they are written."""
    pyproject = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if pyproject.is_file():  # a clone, installed or not
        written = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        written = importlib.metadata.requires("qlora-neft") or []
    parsed = [Requirement(line) for line in written]
    return [requirement for requirement in parsed if requirement.marker is None]  # with one: of an extra


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _finding(name: str, status: str, message: str, remedy: str = "") -> Finding:
    return {"name": name, "status": status, "message": message, "remedy": remedy}


def _package_finding(requirement: Requirement) -> Finding:
    version, window = _version(requirement.name), str(requirement.specifier)
    install = f"pip install '{requirement}'"
    if version is None:
        return _finding(requirement.name, "fail", "not installed", install)
    if not requirement.specifier.contains(version, prereleases=True):
        return _finding(requirement.name, "fail", f"{version} is outside {window}", install)
    return _finding(requirement.name, "ok", f"{version}{f' ({window})' if window else ''}")


def _torchao_finding(version: str | None) -> Finding:
    # PEFT asks for torchao >= 0.16 as soon as any torchao is installed, and raises ImportError otherwise.
    if version is not None and Version(version) < Version("0.16"):
        return _finding("torchao", "fail", f"{version} is too old for PEFT", "pip uninstall torchao (it is not used)")
    return _finding("torchao", "ok", version or "not installed, not needed")


def _matplotlib_finding(version: str | None) -> Finding:
    if version is None:
        return _finding("matplotlib", "warn", "not installed: runs draw no loss.png", "pip install 'qlora-neft[plots]'")
    return _finding("matplotlib", "ok", version)


def _devices() -> tuple[list[dict[str, Any]], list[Finding]]:
    """CUDA devices, and how training would compute."""
    if importlib.util.find_spec("torch") is None:
        return [], [_finding("precision", "fail", "torch is not installed", "pip install torch")]
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its shared libraries is missing
        return [], [_finding("precision", "fail", f"torch cannot be imported: {error}", "reinstall torch")]
    from ..base.precision import resolve_precision

    devices = [_cuda_device(torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count())]
    findings = [_finding("precision", "ok", str(resolve_precision()).removeprefix("precision: "))]
    if not devices and shutil.which("nvidia-smi"):
        findings.append(
            _finding(
                "CUDA",
                "warn",
                f"there is an NVIDIA driver, but torch {torch.__version__} sees no device",
                "install a CUDA build of torch: https://pytorch.org/get-started/locally",
            )
        )
    return devices, findings


def _cuda_device(properties: Any) -> dict[str, Any]:
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / _GIB, 1),
    }
