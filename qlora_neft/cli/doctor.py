"""Examine this machine: its devices and packages, whether training would work, and what to do if not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement
from packaging.version import Version
from typing_extensions import TypedDict

from .. import __version__
from ..runner.trackers.ready import TRACKERS, is_installed

_RANK = ("ok", "warn", "fail")
_GIB = 2**30


class Finding(TypedDict):
    """One check: ``status`` is "ok", "warn" or "fail"; ``remedy`` is empty if there is nothing to do."""

    name: str
    status: str
    message: str
    remedy: str


class Machine(TypedDict):
    """Versions of program, Python and system, and the size of the machine."""

    qlora_neft: str
    python: str
    platform: str
    cpu_cores: int
    memory_gib: float


class Device(TypedDict):
    """A CUDA device; ``capability`` is such as "8.0"."""

    name: str
    capability: str
    memory_gib: float


class Report(TypedDict):
    """Everything found, ready for JSON.

    Attributes:
        status: The worst status of the findings.
        machine: The machine.
        packages: Version by name of every requirement, None if it is not installed.
        devices: CUDA devices.
        findings: Every check, passed or not.
    """

    status: str
    machine: Machine
    packages: dict[str, str | None]
    devices: list[Device]
    findings: list[Finding]


def examine() -> Report:
    """Examine the machine and its packages."""
    packages = {requirement.name: _version(requirement.name) for requirement in _requirements()}
    findings = [_package_finding(requirement) for requirement in _requirements()]
    # Not required, but one breaks PEFT by being there, and the other is missed for pictures.
    findings += [_torchao_finding(_version("torchao")), _matplotlib_finding(_version("matplotlib"))]
    findings.append(_trackers_finding())
    devices, device_findings = _devices()
    findings += device_findings
    return {
        "status": max((finding["status"] for finding in findings), key=_RANK.index),
        "machine": _machine(),
        "packages": packages,
        "devices": devices,
        "findings": findings,
    }


def describe(report: Report) -> str:
    """Return the report of `examine` as text for a person."""
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


def _machine() -> Machine:
    return {
        "qlora_neft": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": _cpu_cores(),
        "memory_gib": round(psutil.virtual_memory().total / _GIB, 1),
    }


def _cpu_cores() -> int:
    """Return the number of cores this process may use; in a container fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _requirements() -> list[Requirement]:
    """Return the packages this one needs, with their version ranges, as pyproject.toml has them."""
    # The metadata of an editable install is that of the day it was installed; the file beside the code is newer.
    pyproject = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if pyproject.is_file():  # a clone, installed or not
        written = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        written = importlib.metadata.requires("qlora-neft") or []
    parsed = [Requirement(line) for line in written]
    return [requirement for requirement in parsed if requirement.marker is None]  # a marker: part of an extra


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
    # By default a specifier rejects every pre-release, such as a nightly build of torch, even inside its range.
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


def _trackers_finding() -> Finding:
    lines = [
        f"{tracker} {_version(tracker) or ''}".rstrip() if is_installed(tracker) else f"no {tracker}"
        for tracker in TRACKERS
    ]
    return _finding("trackers", "ok", f"{', '.join(lines)} (for machine.report_to; each an extra of this package)")


def _devices() -> tuple[list[Device], list[Finding]]:
    """Return the CUDA devices, and findings on how training would compute."""
    # Looked up before it is imported: "not installed" and "cannot be imported" have different remedies.
    if importlib.util.find_spec("torch") is None:
        return [], [_finding("precision", "fail", "torch is not installed", "pip install torch")]
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its shared libraries is missing
        return [], [_finding("precision", "fail", f"torch cannot be imported: {error}", "reinstall torch")]
    from ..base.precision import resolve_precision

    devices = [_cuda_device(torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count())]
    findings = [_finding("precision", "ok", str(resolve_precision()).removeprefix("precision: "))]
    # The usual trap: a CPU build of torch on a machine with a GPU, where training would run on the CPU.
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


def _cuda_device(properties: Any) -> Device:
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / _GIB, 1),
    }
