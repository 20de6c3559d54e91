"""What results were measured with and on. No torch."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    *("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "liger_kernel", "triton"),
    *("numpy", "unsloth"),
)


def identity(*, tiny: bool) -> dict[str, Any]:
    """Return what decides whether two results may stand in one table: code, packages, device, kind of run."""
    return {"code": code_hash(), "versions": versions(), "device": "CPU" if tiny else gpu_name(), "tiny": tiny}


def versions() -> dict[str, str]:
    """Return the versions of the packages that are there."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def gpu_name() -> str:
    """Return the name of the first GPU, as its driver says it."""
    if shutil.which("nvidia-smi") is None:
        return "a GPU without nvidia-smi"
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.strip().splitlines() or ["a GPU that nvidia-smi does not name"])[0]


def code_hash() -> str:
    """Return a hash of the code that is measured and measures, git or no git."""
    digest = hashlib.sha256()
    for folder in ("qlora_neft", "benchmarks/gpu", "recipes"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".json", ".yaml"):
                digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
