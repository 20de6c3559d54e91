"""Break runs of the demo in every way at hand, go on, and see that each ends with the adapter of the run that was not.

    python scripts/faults.py [--kills 50] [--output docs/results/faults.json]

Real processes, real signals, the real command line. Needs no GPU and no network; `make faults` runs it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from qlora_neft.run_folder.checkpoints import find_checkpoints

STEPS, SAVE_STEPS = 24, 3
OVERRIDES = [
    f"train.max_steps={STEPS}",
    f"machine.save_steps={SAVE_STEPS}",
    "machine.eval_answers=3",
    "machine.eval_steps=8",
    "machine.logging_steps=1",
    "machine.threads=1",
    "lora.lora_dropout=0.1",
]
LONGEST = 300  # seconds a run may take before it counts as hanging


def main() -> None:
    """Run all faults and write the table down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--output", type=Path, default=Path("docs/results/faults.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        rows = Suite(Path(folder)).run(options.kills)
    options.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        print(
            f"{row['fault']:<48} tried {row['tried']:>3}  survived {row['survived']:>3}  most steps lost {row['lost']}"
        )
    sys.exit(0 if all(row["tried"] == row["survived"] for row in rows) else 1)


class Suite:
    """Faults, each tried on a run of its own, against one reference.

    Args:
        folder: For the runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.draw, self.count = folder, random.Random(0), 0
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(self, kills: int) -> list[dict]:
        """All of them; one row each."""
        started = time.monotonic()
        self.reference = self.finished(self.new())
        self.seconds = time.monotonic() - started
        rows = [self.killed_at_random(kills)]
        phases: dict[str, Callable[[Path], bool]] = {
            "while loading": lambda out: True,
            "at the first step": lambda out: last_step(out) >= 1,
            "while a checkpoint is written": lambda out: any(out.glob(".checkpoint-*")),
            "around an evaluation": lambda out: last_step(out) >= 8,
            "at the last save": lambda out: (out / "adapter_model.safetensors").exists(),
        }
        for name, reached in phases.items():
            rows.append(self.one(f"SIGTERM {name}", lambda out, reached=reached: self.stopped(out, reached)))
        for name, damage in DAMAGES.items():
            rows.append(self.one(f"newest checkpoint: {name}", lambda out, damage=damage: self.damaged(out, damage)))
        if os.geteuid() == 0:
            rows.append(self.full_disk())
        return rows

    def killed_at_random(self, kills: int) -> dict:
        """Kill at random instants, from the start of the process on; a finished run is compared, a new one begun."""
        survived = done = most = 0
        out = self.new()
        while done < kills:
            process = self.start(out)
            try:
                process.wait(self.draw.uniform(0, self.seconds))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                done += 1
                newest = find_checkpoints(out).newest if out.exists() else None
                lost = last_step(out) - (newest.step if newest else 0)
                most = max(most, lost)
                survived += lost <= SAVE_STEPS
            else:
                survived -= process.returncode != 0 or self.adapter(out) != self.reference
                out = self.new()
        survived -= self.finished(out) != self.reference
        return {"fault": "kill -9 at a random instant", "tried": done, "survived": survived, "lost": most}

    def one(self, name: str, breaks: Callable[[Path], int]) -> dict:
        """Break one run, let it go on, compare."""
        out = self.new()
        lost = breaks(out)
        same = self.finished(out) == self.reference
        return {"fault": name, "tried": 1, "survived": int(same), "lost": lost}

    def stopped(self, out: Path, reached: Callable[[Path], bool]) -> int:
        """SIGTERM as soon as a phase is reached; the steps that have to be taken again."""
        process = self.start(out)
        time.sleep(2)  # Python is up, and our handlers are not yet
        while process.poll() is None and not reached(out):
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        process.wait(LONGEST)
        newest = find_checkpoints(out).newest if out.exists() else None
        return max(0, last_step(out) - (newest.step if newest else 0)) if not (out / "summary.json").exists() else 0

    def damaged(self, out: Path, damage: Callable[[Path], None]) -> int:
        """Kill in the middle, then damage the newest checkpoint; the steps that have to be taken again."""
        process = self.start(out)
        while last_step(out) < 3 * SAVE_STEPS and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.wait()
        newest = find_checkpoints(out).newest
        damage(newest.path)
        left = find_checkpoints(out).newest
        return last_step(out) - (left.step if left else 0)

    def full_disk(self) -> dict:
        """A disk that is full from some point on, and then is not."""
        mount = self.folder / "small"
        mount.mkdir()
        row = {"fault": "disk full, then freed", "tried": 1, "survived": 0, "lost": 0}
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(mount)], check=False).returncode:
            return {**row, "tried": 0}
        try:
            process = self.start(mount / "out")
            failed = process.wait(LONGEST) == 1
            newest = find_checkpoints(mount / "out").newest
            row["lost"] = last_step(mount / "out") - (newest.step if newest else 0)
            subprocess.run(["mount", "-o", "remount,size=200m", str(mount)], check=True)
            row["survived"] = int(failed and self.finished(mount / "out") == self.reference)
        finally:
            subprocess.run(["umount", str(mount)], check=False)
        return row

    def new(self) -> Path:
        """A folder for a run."""
        self.count += 1
        return self.folder / f"run-{self.count}"

    def start(self, out: Path) -> subprocess.Popen:
        """The command, always the same for a folder."""
        command = [sys.executable, "-m", "qlora_neft", "train", "demo", "--output-dir", str(out), *OVERRIDES]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )

    def finished(self, out: Path) -> str:
        """Let a run come to its end; its adapter's hash."""
        if self.start(out).wait(LONGEST):
            return f"failed: {out}"
        return self.adapter(out)

    def adapter(self, out: Path) -> str:
        """SHA-256 of the adapter's file."""
        return hashlib.sha256((out / "adapter_model.safetensors").read_bytes()).hexdigest()


def last_step(out: Path) -> int:
    """The last step that was logged; 0 before the first."""
    try:
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)
    except (OSError, ValueError):
        return 0


def truncated(checkpoint: Path) -> None:
    """Cut a file in the middle."""
    file = checkpoint / "optimizer.pt"
    os.truncate(file, file.stat().st_size // 2)


def flipped(checkpoint: Path) -> None:
    """Turn one bit over."""
    file = checkpoint / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def missing(checkpoint: Path) -> None:
    """Take a file away."""
    (checkpoint / "scheduler.pt").unlink()


DAMAGES = {"a file cut off": truncated, "one bit flipped": flipped, "a file missing": missing}

if __name__ == "__main__":
    main()
