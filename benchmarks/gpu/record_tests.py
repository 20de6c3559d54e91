"""A pytest plugin: every result as a line of JSON at once, so that a run that is cut off leaves what it had."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RECORD = "QLORA_NEFT_TESTS_RECORD"  # environment variable: the file to append to


def pytest_runtest_logreport(report: Any) -> None:
    """Note a test that has run, was skipped, or failed in its preparation."""
    if report.when != "call" and report.outcome == "passed":
        return
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
    if report.outcome == "failed":
        line["message"] = str(report.longrepr)[-2000:]
    elif report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        line["message"] = str(report.longrepr[2])
    with Path(os.environ[RECORD]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def summary(record: Path, *, cut_off: bool) -> dict[str, Any]:
    """Return what a record holds, counted.

    Args:
        record: The file, which may be missing.
        cut_off: Whether the tests were ended before they were through.
    """
    lines = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
    tests = [json.loads(line) for line in lines]
    counts = {name: sum(test["outcome"] == name for test in tests) for name in ("passed", "failed", "skipped")}
    return {**counts, "cut_off": cut_off, "tests": tests}
