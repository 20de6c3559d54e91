"""Invariant 2 across ranks: two processes give every sequence the noise that one process gives it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch
from forked import environment, quick_python

WORKER = Path(__file__).with_name("rank_worker.py")


def run_ranks(count: int, model: Path, output: Path, per_rank: int) -> list[dict]:
    output.mkdir()
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={count}", "--standalone"] if count > 1 else []
    python = quick_python()
    variables = environment(PYTHON_EXEC=python)  # what torchrun starts its processes with
    arguments = [python, *launch, str(WORKER), str(model), str(output), str(per_rank)]
    done = subprocess.run(arguments, env=variables, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(output / f"rank{rank}.pt", weights_only=True) for rank in range(count)]


def test_two_ranks_draw_the_noise_of_one_process_and_learn_the_same(llama, tmp_path):
    (one,) = run_ranks(1, llama, tmp_path / "one", per_rank=8)
    two = run_ranks(2, llama, tmp_path / "two", per_rank=4)
    assert not two[0]["noise"].keys() & two[1]["noise"].keys()  # they share the work, they do not repeat it
    together = two[0]["noise"] | two[1]["noise"]
    assert together.keys() == one["noise"].keys()
    for ids, visits in one["noise"].items():
        for a, b in zip(visits, together[ids], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert one["ended"] == two[0]["ended"] == two[1]["ended"] and one["ended"][0] > one["ended"][1] > 0
    assert one["bad_steps"] == two[0]["bad_steps"] == two[1]["bad_steps"] == 1
    for run in ("adapter", "weighted", "selected", "dropped"):
        for name, weight in one[run].items():
            assert torch.equal(two[0][run][name], two[1][run][name])
            # A rate that overshoots at once, to have an earlier step to go back to, moves a hundred times as far.
            tolerance = 1e-3 if run == "selected" else 1e-5
            torch.testing.assert_close(weight, two[0][run][name], rtol=0, atol=tolerance)
    assert not all(torch.equal(weight, one["weighted"][name]) for name, weight in one["adapter"].items())
