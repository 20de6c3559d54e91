"""GPUs by name, with their memory and datasheet speed, and the device of this machine. No torch."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

import psutil

from ..errors import UserInputError

GIB = 2**30
# People say "a 24G card" and mean GiB, so that is what a bare number and "g" are.
UNITS = {"gib": GIB, "gb": 10**9, "mib": 2**20, "mb": 10**6, "g": GIB, "m": 2**20, "": GIB}


@dataclass(frozen=True)
class Card:
    """A device to train on.

    Attributes:
        name: Common name.
        memory: Bytes.
        flops: Floating-point operations per second by the datasheet, for dense matrix products in float16 or bfloat16
            with float32 sums; None if unknown.
        bandwidth: Bytes per second by the datasheet; None if unknown.
        has_bf16: Whether it computes in bfloat16 (compute capability 8.0 and up).
        is_gpu: False for a CPU and its memory.
    """

    name: str
    memory: int
    flops: float | None = None
    bandwidth: float | None = None
    has_bf16: bool = True
    is_gpu: bool = True


# Memory is what the driver reports, a little below the round number. Speeds: NVIDIA's datasheets, without sparsity.
CARDS = {
    card.name: card
    for card in (
        Card("t4", int(14.75 * GIB), 65e12, 320e9, has_bf16=False),
        Card("v100-16g", int(15.75 * GIB), 125e12, 900e9, has_bf16=False),
        Card("rtx3060-12g", int(11.75 * GIB), 51e12, 360e9),
        Card("rtx3090", int(23.6 * GIB), 71e12, 936e9),
        Card("rtx4070-12g", int(11.7 * GIB), 58e12, 504e9),
        Card("rtx4080-16g", int(15.7 * GIB), 97e12, 717e9),
        Card("rtx4090", int(23.5 * GIB), 165e12, 1008e9),
        Card("rtx5090", int(31.3 * GIB), 209e12, 1792e9),
        Card("a10g-24g", int(22.3 * GIB), 70e12, 600e9),
        Card("l4", int(22.2 * GIB), 121e12, 300e9),
        Card("a5000-24g", int(23.6 * GIB), 111e12, 768e9),
        Card("a6000-48g", int(47.4 * GIB), 155e12, 768e9),
        Card("l40s", int(44.4 * GIB), 362e12, 864e9),
        Card("a100-40g", int(39.4 * GIB), 312e12, 1555e9),
        Card("a100-80g", int(79.1 * GIB), 312e12, 2039e9),
        Card("h100-80g", int(79.1 * GIB), 989e12, 3350e9),
        Card("h200", int(139.8 * GIB), 989e12, 4800e9),
    )
}


def card_of(text: str) -> Card:
    """Return a card by its name, or a card with an amount of memory (``24GiB``, ``16``, ``8GB``).

    Raises:
        UserInputError: If it is neither.
    """
    wanted = text.strip().lower()
    if wanted in CARDS:
        return CARDS[wanted]
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", wanted)
    if match is None or match[2] not in UNITS or float(match[1]) <= 0:
        raise UserInputError(
            f"--vram: must be an amount of memory such as 24GiB, or a card ({', '.join(CARDS)}), got {text!r}."
        )
    memory = int(float(match[1]) * UNITS[match[2]])
    return Card(f"a card of {memory / GIB:.4g} GiB", memory)


def this_machine() -> Card:
    """Return the first GPU of this machine as its driver describes it, or the machine itself without one."""
    # The driver's tool, not torch: importing torch takes seconds, and asking it for a GPU starts CUDA, which takes
    # memory of the very card.
    found = _ask_driver()
    if found is None:
        return host()
    name, memory, capability = found
    known = next((card for card in CARDS.values() if _is_named(card.name, name)), None)
    flops, bandwidth = (known.flops, known.bandwidth) if known else (None, None)
    # Capability 8.0 (Ampere) is the first with bfloat16 units; torch.cuda.is_bf16_supported() counts emulation, on a T4
    # too.
    return Card(name, memory, flops, bandwidth, has_bf16=capability >= 8.0)


def host() -> Card:
    """Return this machine's CPU and memory."""
    # Without bfloat16, since a run on a CPU computes in float32.
    return Card("this machine's memory (no GPU found)", psutil.virtual_memory().total, has_bf16=False, is_gpu=False)


def _ask_driver() -> tuple[str, int, float] | None:
    """Return name, bytes and compute capability of the first GPU; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        # A driver in trouble may hang: a plan for this machine is not worth more than a few seconds of waiting.
        lines = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
        name, mebibytes, capability = (part.strip() for part in lines[0].split(","))
        return name, int(mebibytes) * 2**20, float(capability)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _is_named(ours: str, drivers: str) -> bool:
    """Whether the driver's name is that of a card: ``rtx4090`` is its "NVIDIA GeForce RTX 4090"."""
    # Cards that come with several memories ("a100-40g") are told apart by the driver's figure, not by the name.
    return ours.partition("-")[0] in drivers.lower().replace(" ", "").replace("-", "")
