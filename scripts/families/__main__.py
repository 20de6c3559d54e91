"""Audit every causal decoder that transformers has: python -m scripts.families [MODEL_TYPE ...]

Each family is driven in a forked process of its own, so that one that hangs or dies takes no other with it. Results are
kept as they come, in ``docs/model_families.json``; families that have one from these versions are skipped, so that an
audit can be interrupted. ``--again`` audits them anew, ``--page`` only writes the page.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIMIT = 240  # seconds a family
RESULTS = Path(__file__).parents[2] / "docs" / "model_families.json"
PAGE = Path(__file__).parents[2] / "docs" / "model_families.md"


def main() -> None:
    """Audit, and write table and page."""
    parser = argparse.ArgumentParser(description="Audit the model families that transformers has.")
    parser.add_argument("families", nargs="*", help="model types; default: all")
    parser.add_argument("--again", action="store_true", help="audit families anew that have a result")
    parser.add_argument("--page", action="store_true", help="write the page from the results, audit nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of the results")
    args = parser.parse_args()
    from .page import page_of

    results = json.loads(args.out.read_text()) if args.out.is_file() else {"versions": {}, "families": {}}
    if not args.page:
        _audit_all(args, results)
    if args.out == RESULTS:
        PAGE.write_text(page_of(results), encoding="utf-8")


def _audit_all(args: argparse.Namespace, results: dict[str, Any]) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import qlora_neft.runner.run  # noqa: F401  # imported once, before the first fork

    from .audit import families

    results["versions"] = {name: version(name) for name in ("transformers", "trl", "peft", "bitsandbytes", "torch")}
    for name in args.families or families():
        if name in results["families"] and not (args.again or args.families):
            continue
        started = time.monotonic()
        found = _in_a_fork(name)
        results["families"][name] = found
        results["families"] = dict(sorted(results["families"].items()))
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {_short(found)} ({time.monotonic() - started:.0f} s)", flush=True)


def _in_a_fork(name: str) -> dict[str, Any]:
    """Audit a family in a process of its own."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        process = context.Process(target=_child, args=(name, Path(folder), answer))
        process.start()
        process.join(LIMIT)
        if process.is_alive():
            process.kill()
            process.join()
            return {"class": None, "stages": {}, "bugs": [], "not_built": f"took more than {LIMIT} s"}
        if not answer.is_file():
            return {"class": None, "stages": {}, "bugs": [], "not_built": f"its process died ({process.exitcode})"}
        return json.loads(answer.read_text())


def _child(name: str, folder: Path, answer: Path) -> None:
    import torch
    import transformers

    from .audit import audit, clear

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found = audit(name, clear(folder / "work"))
    text = json.dumps(found).replace(str(folder / "work"), "...")
    answer.write_text(text)


def _short(found: dict[str, Any]) -> str:
    if "not_built" in found:
        return f"not built: {found['not_built']}"
    return "; ".join(f"{stage}: {end[:160]}" for stage, end in found["stages"].items() if end != "yes") or "all yes"


if __name__ == "__main__":
    main()
