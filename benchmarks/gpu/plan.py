"""What is measured, in which order, and how every arm trains. No torch.

Arms differ in how a step is carried out, never in what is learned: same NF4 bytes, same token ids in the same order,
same LoRA, optimizer and sequences per optimizer step, noise alpha 5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

WARM_UP, STEPS = 3, 20  # optimizer steps of a run: not counted, counted; one more is profiled
TOKENS = 4096  # of a micro-batch, at most
LORA = {"r": 64, "lora_alpha": 16, "lora_dropout": 0.1}  # as in the shipped recipes for 7B and 13B
NOISE_ALPHA = 5.0
LEARNING_RATE = 2e-4
SEED = 0

# ---- Bases: sizes of the Llamas, weights drawn at random ----

GEOMETRIES: dict[str, dict[str, int]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "30b": {"hidden_size": 6656, "intermediate_size": 17920, "num_hidden_layers": 60, "num_attention_heads": 52},
}
TINY: dict[str, dict[str, int]] = {
    "7b": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "13b": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4},
    "30b": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4},
}


def geometry(name: str, *, tiny: bool = False) -> dict[str, int]:
    """Return the sizes of a base."""
    sizes = (TINY if tiny else GEOMETRIES)[name]
    return {"vocab_size": 512 if tiny else 32000, "max_position_embeddings": 2048, **sizes}


# ---- Arms ----

# Ours, as before its fused path: padded rows, PEFT's own layers, nobody's kernels.
UNFUSED: dict[str, Any] = {
    "fused_lora": False,
    "fused_norms": False,
    "fused_rotary": False,
    "padding_free": False,
    "attn_implementation": "sdpa",
    "use_triton_kernels": False,
    "use_liger_kernel": False,
}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: In results.
        trainer: ``"trl"``, ``"ours"``, ``"unsloth"``, or ``"crash"``, which fails on purpose, for rehearsals.
        about: For the reader of the table.
        switches: Arguments of the trainer's configuration beyond those that all arms share.
    """

    name: str
    trainer: str
    about: str
    switches: dict[str, Any]


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("trl-default", "trl", "TRL as it comes: padded rows of 8, activation checkpointing", {}),
        Arm(
            "trl-tuned",
            "trl",
            "TRL with every switch we use: padding-free, Liger's kernels, no checkpointing where it fits",
            {"padding_free": True, "use_liger_kernel": True, "checkpointing": False},
        ),
        Arm("unfused", "ours", "this trainer without its fused path", {**UNFUSED, "checkpointing": False}),
        Arm("fused", "ours", "this trainer as it comes, no checkpointing where it fits", {"checkpointing": False}),
        Arm("fused-again", "ours", "the same again: what differs is chance", {"checkpointing": False}),
        Arm(
            "unsloth",
            "unsloth",
            "Unsloth, no checkpointing where it fits",
            {"padding_free": True, "checkpointing": False},
        ),
        Arm("crash", "crash", "fails on purpose", {}),
    )
}
MAIN = ("trl-default", "trl-tuned", "unfused", "fused", "fused-again")
SHORT = ("trl-tuned", "fused")  # at 13B
CAPPED = (("30b", 24.0), ("7b", 8.0))  # base, GiB

# ---- Sessions ----


@dataclass(frozen=True)
class Run:
    """One measurement: so many steps of one arm.

    Attributes:
        arm, base, lengths: Names in `ARMS`, `GEOMETRIES` and `lengths.NAMES`.
        repeat: 0 for the first time that this is measured, 1 for the second ...
        cap_gib: Memory that may be taken, context of the device included; None for all of it.
        steps, warm_up: Counted and not counted optimizer steps.
        check: Whether loss and gradient of the first step are compared with the float32 reference.
        profile: Whether one more step is profiled.
    """

    arm: str
    base: str
    lengths: str
    repeat: int
    cap_gib: float | None = None
    steps: int = STEPS
    warm_up: int = WARM_UP
    check: bool = False
    profile: bool = False

    @property
    def key(self) -> str:
        """A name of its own, fit for a file."""
        cap = "" if self.cap_gib is None else f"-{self.cap_gib:g}gib"
        return f"{self.base}{cap}-{self.lengths}-{self.arm}-{self.repeat + 1}"


@dataclass(frozen=True)
class Session:
    """What one process does.

    Attributes:
        kind: ``"probe"``, ``"tests"``, ``"reference"``, ``"base"`` (one written to disk) or ``"arm"``.
        expected: Seconds that it is expected to take before any of its kind has run.
        runs: An arm's measurements, one after the other, each on a base made anew.
        name: Of a session that is no arm's.
    """

    kind: str
    expected: float
    runs: tuple[Run, ...] = ()
    name: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the results that it leaves."""
        return tuple(run.key for run in self.runs) or (self.name,)

    def of(self, keys: set[str]) -> Session:
        """Return the part of it that leaves these results."""
        runs = tuple(run for run in self.runs if run.key in keys)
        return Session(self.kind, self.expected * max(len(runs), 1) / max(len(self.runs), 1), runs, self.name)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the process that runs it."""
        return {"kind": self.kind, "name": self.name, "runs": [asdict(run) for run in self.runs]}


def schedule(main: tuple[str, ...] = MAIN, *, rounds: int = 3, steps: int = STEPS) -> Iterator[Session]:
    """Yield everything that is to be measured, what matters most first.

    Arms run in the order A B B A: once forward, once backward, with the short measurements between, so that a drift of
    the machine touches all alike; then again, as time allows.

    Args:
        main: Arms at 7B.
        rounds: How often at most the arms run there and back.
        steps: Counted optimizer steps.
    """
    yield Session("probe", 25, name="probe")
    yield Session("tests", 100, name="tests")
    yield Session("reference", 45, name="reference-7b")
    if "unsloth" in main:
        yield Session("base", 40, name="base-7b")  # it loads its own
    for repeat in range(2 * rounds):
        for arm in main if repeat % 2 == 0 else reversed(main):
            yield Session("arm", 60, tuple(_runs(arm, repeat, steps)))
        if repeat == 0:
            yield from _between(steps)


def _runs(arm: str, repeat: int, steps: int) -> Iterator[Run]:
    """Yield an arm's runs at 7B; the slow extras are done the first time only."""
    first = repeat == 0
    yield Run(arm, "7b", "alpaca", repeat, steps=steps, check=first, profile=first)
    yield Run(arm, "7b", "long", repeat, steps=steps)


def _between(steps: int) -> Iterator[Session]:
    for base, cap in CAPPED:
        # How fast is not the question here: whether it fits.
        yield Session("arm", 70, (Run("fused", base, "alpaca", 0, cap, steps=max(steps // 4, 1), warm_up=1),))
    for arm in SHORT:
        yield Session("arm", 60, (Run(arm, "13b", "alpaca", 0, steps=steps),))
