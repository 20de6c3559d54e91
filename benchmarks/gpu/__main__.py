"""Measure a training step on this machine's GPU, and write a table, plots and a raw file.

    python -m benchmarks.gpu OUT [--minutes 12] [--unsloth PYTHON] [--tiny]

No network is needed. Interrupted or out of time, it goes on where it was when called again. Exit code 0: everything was
measured; 1: something failed, or an arm computed something else; 2: wrong arguments, or no GPU; 3: time ran out.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .conduct import Launch, Options, Progress, conduct, keep_what_belongs
from .figures import void
from .machine import identity
from .parts import read_parts
from .plan import MAIN, schedule
from .plots import write_plots
from .processes import Processes
from .report import PAGE, RAW, write_report

DONE, FAILED, WRONG, OUT_OF_TIME = 0, 1, 2, 3
TINY_STEPS = 2


def main(arguments: Sequence[str] | None = None, *, launch: Launch | None = None) -> int:
    """Measure what is missing and write the report.

    Args:
        arguments: Of the command line.
        launch: Runs one session; default a process of its own.
    """
    asked = _parser().parse_args(arguments)
    options = Options(
        asked.output,
        asked.state.resolve(),
        asked.minutes,
        asked.tiny,
        asked.unsloth,
        tuple(asked.tests or Options.tests),
    )
    before = signal.signal(signal.SIGTERM, _as_interrupt)  # so that what was started ends with this program
    own, earlier = identity(tiny=options.tiny), options.output / RAW
    raw = json.loads(earlier.read_text(encoding="utf-8")) if earlier.exists() else {}
    print(
        f"{own['device']}, code {own['code']}; {keep_what_belongs(options.state, raw, own)} results are there",
        flush=True,
    )
    arms = (*MAIN, *(["unsloth"] if options.unsloth else []), *asked.also)
    rounds, steps = (asked.rounds, TINY_STEPS) if options.tiny else (asked.rounds, asked.steps)
    progress = Progress()

    def report(so_far: Progress) -> None:
        write_report(options.output, options.state, so_far.failed, so_far.skipped)

    try:
        with Processes() as processes:
            sessions = schedule(arms, rounds=rounds, steps=steps)
            progress = conduct(sessions, options, launch or processes, after_each=report)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here")
        progress.skipped.append("what came after the interruption")
    finally:
        signal.signal(signal.SIGTERM, before)
    raw = write_report(options.output, options.state, progress.failed, progress.skipped)
    plots = write_plots(options.output, raw)
    print(f"written: {', '.join(map(str, [options.output / PAGE, options.output / RAW, *plots]))}")
    return _exit_code(progress, read_parts(options.state))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="folder of table, plots and raw file")
    parser.add_argument("--minutes", type=float, default=12.0, help="what does not fit into them is left out")
    parser.add_argument("--state", type=Path, default=Path(".gpu-benchmark"), help="folder of single results and logs")
    parser.add_argument("--unsloth", help="Python of an environment with Unsloth: one more arm")
    parser.add_argument("--rounds", type=int, default=2, help="times that the arms run there and back, at most")
    parser.add_argument("--steps", type=int, default=20, help="counted steps of a run")
    parser.add_argument("--tests", action="append", help="what pytest is given instead of tests/gpu")
    parser.add_argument("--tiny", action="store_true", help="rehearse with tiny models on a CPU")
    parser.add_argument("--also", nargs="*", default=[], choices=["crash"], help="further arms, for rehearsals")
    return parser


def _as_interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _exit_code(progress: Progress, parts: dict[str, Any]) -> int:
    if "probe" in progress.failed:
        print(f"error: {progress.failed['probe']}", file=sys.stderr)
        return WRONG
    wrong = void(parts)
    tests = parts.get("tests", {})
    for name, problem in {**progress.failed, **{f"{arm} is void": why for arm, why in wrong.items()}}.items():
        print(f"{name}: {problem}")
    if progress.failed or wrong or tests.get("failed") or tests.get("cut_off"):
        return FAILED
    # Repeats beyond the first are a matter of time, as is meant.
    return OUT_OF_TIME if any(name.endswith("-1") or not name[-1].isdigit() for name in progress.skipped) else DONE


if __name__ == "__main__":
    sys.exit(main())
