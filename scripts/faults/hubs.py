"""The Hub fails while an adapter is exported to it: one commit or one message, soon, and the token in neither."""

from __future__ import annotations

import subprocess
import time
from functools import partial
from typing import Any

from .bench import Bench
from .fault import Fault, hold

TOKEN = "hf_annwritessecretly"
SECONDS = 120


def export(bench: Bench, method: str, path: str, commits: int = 1, **what: Any) -> int:
    """Export while requests fail, with so many commits at the end of the command, and one after the same command."""
    from hub_server import HubServer

    out = bench.copy(bench.finished)
    words = ("export", str(out), "--repo-id", "ann/x", "--base-id", "ann/base", "--license", "mit")
    with HubServer() as hub:
        hub.add_user("ann", write=TOKEN, read="hf_annreads")
        hub.add_repo("ann/base", bench.base)
        environment = bench.environment | hub.environment(TOKEN)
        hub.fail(method, path, **what)
        for expected in (commits, 1):
            began = time.monotonic()
            process = bench.start(
                *("-P", "-m", "qlora_neft", *words),
                quick=False,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            printed, _ = process.communicate(timeout=SECONDS)
            hold(time.monotonic() - began < SECONDS, "it waited for long")
            hold("Traceback" not in printed, f"a traceback: {printed.strip()[-300:]}")
            hold(TOKEN not in printed, "the token was printed")
            codes = (0,) if expected else (1, 2)
            hold(process.returncode in codes, f"it ended with {process.returncode}: {printed.strip()[-300:]}")
            found = len(hub.repo("ann/x").pushes()) if "ann/x" in hub.repos else 0
            hold(found == expected, f"{found} commits instead of {expected}")
            if expected:
                break
            hub.heal()
    return 0


COMMIT, BATCH = ("POST", "/commit/main"), ("POST", "/lfs/objects/batch")
KIND = "the Hub fails during an export"
FAULTS = [
    Fault(KIND, "503 at the commit", partial(export, method=COMMIT[0], path=COMMIT[1])),
    Fault(
        KIND,
        "the commit lands, and the connection is dropped",
        partial(export, method=COMMIT[0], path=COMMIT[1], drop=True, lands="now"),
    ),
    Fault(KIND, "404 straight after creation", partial(export, method=BATCH[0], path=BATCH[1], status=404)),
    Fault(
        KIND,
        "an expired upload signature",
        partial(export, method="PUT", path="/ann/x/", status=403, message="Request has expired"),
    ),
    Fault(
        KIND,
        "Retry-After: 100000 for ever",
        partial(export, method="POST", path="/preupload/", commits=0, times=None, headers={"Retry-After": "100000"}),
    ),
    Fault(KIND, "`{}` as the answer to the commit", partial(export, method=COMMIT[0], path=COMMIT[1], content={})),
]
