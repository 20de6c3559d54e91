"""Break runs in every way at hand, let each go on, and see what was kept: python -m scripts.faults [WORD ...]

Real processes, real signals, the real command line; no GPU, no network. `make faults` tries everything and writes the
table of docs/results/faults.md. With words, only faults whose class or name holds one of them are tried, and nothing is
written. `--page` writes the table from the results that are there.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .bench import ROOT, Bench
from .fault import Fault, NotHeld, NotTried, Result
from .page import write_page

MODULES = (
    *("kills", "stops", "outputs", "starters", "checkpoints", "meanings", "records", "identity", "caches", "disks"),
    *("mirrors", "strangers", "hubs", "answers"),
)
RESULTS = ROOT / "docs" / "results" / "faults.json"
PAGE = ROOT / "docs" / "results" / "faults.md"


def main() -> None:
    """Try the faults; the exit code is 1 if one of them did not hold."""
    parser = argparse.ArgumentParser(description="Break runs in every way at hand, and see each recover.")
    parser.add_argument("words", nargs="*", help="only faults whose class or name holds one of these")
    parser.add_argument("--page", action="store_true", help="write the page from the results, try nothing")
    options = parser.parse_args()
    if options.page:
        results = [Result(**row) for row in json.loads(RESULTS.read_text(encoding="utf-8"))]
    else:
        results = _tried([fault for fault in all_faults() if _is_meant(fault, options.words)])
    if not options.words:
        RESULTS.write_text(json.dumps([result.to_dict() for result in results], indent=1) + "\n", encoding="utf-8")
        write_page(PAGE, results)
    sys.exit(any(result.held is False for result in results))


def all_faults() -> list[Fault]:
    """Return every fault, in the order of the table."""
    return [fault for name in MODULES for fault in importlib.import_module(f".{name}", __package__).FAULTS]


def _is_meant(fault: Fault, words: Sequence[str]) -> bool:
    return not words or any(word in f"{fault.kind}: {fault.name}" for word in words)


def _tried(faults: Sequence[Fault]) -> list[Result]:
    results = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        bench = Bench(Path(folder))
        for fault in faults:
            results.append(_result(bench, fault))
            state = {True: "held", False: "LOST", None: "not tried"}[results[-1].held]
            said = f"{fault.kind}: {fault.name}: {state}, {results[-1].lost} steps again, {results[-1].seconds:.0f} s"
            print(said + f" ({results[-1].note})" * bool(results[-1].note), flush=True)
    return results


def _result(bench: Bench, fault: Fault) -> Result:
    started, result = time.monotonic(), Result(fault.kind, fault.name, True)
    try:
        result.lost = fault.check(bench)
    except NotTried as reason:
        result.held, result.note = None, str(reason)
    except NotHeld as broken:
        result.held, result.note = False, str(broken)
    result.seconds = round(time.monotonic() - started, 1)
    return result


if __name__ == "__main__":
    main()
