"""The records or the result of a run are damaged: what repeats them is used, and no work is lost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from .bench import Bench, contents
from .fault import Fault, hold


def of_a_stopped_run(bench: Bench, damage: Callable[[Path], object]) -> int:
    """Damage a run that was stopped in the middle, go on."""
    out = bench.copy(bench.stopped)
    damage(out)
    bench.goes_on(out)
    return 0


def of_a_finished_run(bench: Bench, damage: Callable[[Path], object]) -> int:
    """Damage a run that is finished; the same command makes the result again, without a step."""
    out = bench.copy(bench.finished)
    damage(out)
    bench.goes_on(out)
    hold("nothing is left to do" in bench.said("train", "mine.yaml", "--output-dir", str(out)), "it is not finished")
    return 0


def lock_is_a_folder(bench: Bench) -> int:
    """A folder has the name of the lock: one message, and nothing is touched."""
    out = bench.copy(bench.stopped)
    (out / ".run.lock").mkdir()
    before = contents(out)
    bench.said("train", "mine.yaml", "--output-dir", str(out), code=2)
    hold(contents(out) == before, "the refusal changed the run's folder")
    (out / ".run.lock").rmdir()
    bench.goes_on(out)
    return 0


def _zeros(name: str) -> Callable[[Path], object]:
    return lambda out: (out / name).write_bytes(bytes((out / name).stat().st_size))


def _flipped(name: str) -> Callable[[Path], object]:
    def flip(out: Path) -> None:
        content = bytearray((out / name).read_bytes())
        content[len(content) // 2] ^= 1
        (out / name).write_bytes(content)

    return flip


def _cut_line(out: Path) -> None:
    file = out / "metrics.jsonl"
    file.write_bytes(file.read_bytes() + b'{"step": 12, "lo')


STOPPED, FINISHED = "a record of a stopped run is damaged", "the result of a finished run is damaged"
FAULTS = [
    Fault(STOPPED, "`run.json` of zeros", partial(of_a_stopped_run, damage=_zeros("run.json"))),
    Fault(STOPPED, "one bit of `run.json`", partial(of_a_stopped_run, damage=_flipped("run.json"))),
    Fault(STOPPED, "`metrics.jsonl` with a broken last line", partial(of_a_stopped_run, damage=_cut_line)),
    Fault(STOPPED, "`.run.lock` is a folder", lock_is_a_folder),
    Fault(
        FINISHED,
        "the adapter is gone",
        partial(of_a_finished_run, damage=lambda out: (out / "adapter_model.safetensors").unlink()),
    ),
    Fault(FINISHED, "the adapter is zeros", partial(of_a_finished_run, damage=_zeros("adapter_model.safetensors"))),
    Fault(FINISHED, "one bit of its configuration", partial(of_a_finished_run, damage=_flipped("adapter_config.json"))),
]
