"""The GPU benchmark rehearsed on a CPU with tiny models: every session, A B B A, cut off and resumed, with a crash."""

from __future__ import annotations

import gc
import json
import statistics
import time
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import figures, report, session
from benchmarks.gpu.conduct import Options, Outcome, conduct, keep_what_belongs
from benchmarks.gpu.parts import part_path, read_parts, write_part
from benchmarks.gpu.plan import MAIN, Run, Session, schedule
from benchmarks.gpu.processes import Processes

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "gpu.md"


class InProcess:
    """Runs sessions here instead of in processes of their own: an import of everything takes seconds each time."""

    def __init__(self, *, stop_after: int | None = None) -> None:
        self.order: list[str] = []
        self.stop_after = stop_after

    def __call__(self, what: Session, options: Options, limit: float, upcoming: Session | None) -> Outcome:
        if self.stop_after is not None and len(self.order) >= self.stop_after:
            raise KeyboardInterrupt
        self.order.append(what.runs[0].arm if what.runs else what.name)
        began = time.monotonic()
        if what.kind == "tests":
            write_part(options.state, "tests", {"passed": 1, "failed": 0, "skipped": 0, "cut_off": False, "tests": []})
            return Outcome("", 0.1)
        spec = {**what.to_dict(), "state": str(options.state), "device": options.device, "tiny": options.tiny}
        try:
            session.main(spec)
        except RuntimeError as error:  # what a process of its own would have ended with
            return Outcome(str(error), time.monotonic() - began)
        return Outcome("", time.monotonic() - began)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A whole measurement, interrupted once and resumed: its folders, the orders of both calls, and the exit codes."""
    import qlora_neft.runner.build_trainer  # noqa: F401

    gc.freeze()  # every session collects garbage several times, each time through all that was imported
    folder = tmp_path_factory.mktemp("gpu")
    arguments = [str(folder / "out"), "--state", str(folder / "state"), "--tiny", "--rounds", "1", "--also", "crash"]
    first, second = InProcess(stop_after=5), InProcess()
    codes = [command.main(arguments, launch=launch) for launch in (first, second)]
    yield folder, first.order, second.order, codes
    gc.unfreeze()


@pytest.mark.slow
def test_arms_run_there_and_back_and_nothing_is_measured_twice(measured):
    _, first, second, codes = measured
    there = [*MAIN, "crash"]
    between = ["fused", "fused", "trl-tuned", "fused"]  # under the limits, and at 13B
    assert first == ["probe", "tests", "reference-7b", *there[:2]]
    assert second == [*there[2:], *between, *reversed(there)]
    assert codes == [command.OUT_OF_TIME, command.FAILED]


@pytest.mark.slow
def test_every_arm_trained_the_same_base_and_computed_the_same(measured):
    parts = read_parts(measured[0] / "state")
    assert set(figures.arms_in(parts)) == set(MAIN)
    checks = figures.checks(parts)
    # In float32 ours are at its rounding; TRL rounds the adapters to bf16.
    assert all(checks[arm]["gradient_error"] < 1e-5 for arm in ("unfused", "fused", "fused-again"))
    assert all(0 < checks[arm]["gradient_error"] < 0.02 for arm in ("trl-default", "trl-tuned"))
    assert all(check["loss_error"] < 1e-4 for check in checks.values())
    runs = [part for part in parts.values() if "run" in part]
    assert all(run["base_unchanged"] for run in runs)
    assert figures.void(parts) == {}


@pytest.mark.slow
def test_forward_passes_are_as_large_as_the_arms_say(measured):
    parts = read_parts(measured[0] / "state")
    padded, flat = (figures.runs_of(parts, arm, "7b", "alpaca")[0] for arm in ("unfused", "trl-tuned"))
    assert padded["step_tokens"] == flat["step_tokens"]
    assert flat["positions_per_step"] == pytest.approx(statistics.mean(_all_tokens(flat)))
    assert padded["positions_per_step"] > flat["positions_per_step"]
    assert padded["switches"]["fused_lora"] is False
    for run in (padded, flat):
        assert len(run["step_seconds"]) == len(run["step_tokens"]) == command.TINY_STEPS


def _all_tokens(run):
    from benchmarks.gpu.lengths import distribution, tokens_of_steps

    whole = Run(**run["run"])
    return tokens_of_steps(distribution("alpaca", tiny=True), whole.warm_up + whole.steps + whole.profile)


@pytest.mark.slow
def test_the_page_says_what_failed_and_what_was_measured(measured):
    folder, *_ = measured
    page = (folder / "out" / report.PAGE).read_text(encoding="utf-8")
    raw = json.loads((folder / "out" / report.RAW).read_text(encoding="utf-8"))
    assert "- `7b-alpaca-crash-1` failed: this arm fails on purpose" in page
    assert "A rehearsal with tiny models" in page
    rows = {arm: [line for line in page.splitlines() if line.startswith(f"| 7B, long | {arm} |")] for arm in MAIN}
    assert all(len(lines) == 1 and "not measured |  |" not in lines[0] for lines in rows.values())
    assert page == report.page(raw)
    assert (folder / "out" / "gpu_speed.png").stat().st_size > 10_000


@pytest.mark.slow
def test_results_of_other_code_are_put_aside_and_a_raw_file_is_taken_over(measured, tmp_path):
    raw = json.loads((measured[0] / "out" / report.RAW).read_text(encoding="utf-8"))
    identity = raw["identity"]
    kept = keep_what_belongs(tmp_path, raw, identity)
    assert kept == len(raw["parts"]) - 1  # all but the reference, whose gradients are not in it
    assert keep_what_belongs(tmp_path, raw, {**identity, "code": "other"}) == 0
    assert len(list(tmp_path.glob("parts-of-another-*/*.json"))) == kept + 1


# ---- The page that is committed ----


def test_the_committed_page_is_that_of_its_raw_file():
    beside = PAGE.with_name(report.RAW)
    raw = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
    assert PAGE.read_text(encoding="utf-8") == report.page(raw), "python -m benchmarks.gpu.report docs/results"


# ---- Time, processes ----


def nothing(what: Session, options: Options, limit: float, upcoming: Session | None) -> Outcome:
    for key in what.keys:
        write_part(options.state, key, {})
    return Outcome("", what.expected)


def test_what_does_not_fit_into_the_time_is_left_out_and_said(tmp_path):
    now = [0.0]

    def launch(what, options, limit, upcoming):
        now[0] += what.expected
        return nothing(what, options, limit, upcoming)

    lines: list[str] = []
    options = Options(tmp_path, tmp_path, minutes=6)
    progress = conduct(schedule(rounds=1), options, launch, say=lines.append, clock=lambda: now[0])
    assert now[0] <= 360
    assert "7b-alpaca-trl-default-1" not in progress.skipped
    assert "7b-alpaca-trl-default-2" in progress.skipped
    assert any(line.startswith("no time left for ") for line in lines)
    # Called again, it goes on with what is missing, and no more.
    before = set(read_parts(tmp_path))
    now[0] = 0.0
    conduct(schedule(rounds=1), options, launch, say=lines.append, clock=lambda: now[0])
    assert set(read_parts(tmp_path)) > before
    assert "done before: probe" in lines


def test_without_a_device_nothing_else_is_tried(tmp_path, capsys):
    tried = []

    def launch(what, options, limit, upcoming):
        tried.append(what.name)
        return Outcome("exit code 1: torch sees no CUDA device", 1.0)

    assert command.main([str(tmp_path), "--state", str(tmp_path / "state")], launch=launch) == command.WRONG
    assert tried == ["probe"]
    assert "torch sees no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("ahead", [True, False])
def test_a_session_is_a_process_that_waits_fails_and_hangs_alone(tmp_path, ahead, monkeypatch):
    from benchmarks.gpu import processes

    programs = {
        "good": "import sys; sys.stdin.readline(); print('done')",
        "bad": "import sys; sys.stdin.readline(); sys.exit('no such thing')",
        "slow": "import time; time.sleep(60)",
    }
    monkeypatch.setattr(processes, "_command", lambda what, options: ["python3", "-c", programs[what.name]])
    options = Options(tmp_path, tmp_path, minutes=1)
    good, bad, slow = (Session("reference", 1, name=name) for name in programs)
    with Processes(ahead=ahead) as launch:
        assert launch(good, options, 20, bad).problem == ""
        waiting = launch._waiting
        assert (waiting is not None) is ahead
        assert "exit code 1: no such thing" in launch(bad, options, 20, slow).problem
        assert launch(slow, options, 0.3, good).problem.startswith("ended after 0 s")
        last = launch._waiting
    assert last is None or last.process.returncode is not None


@pytest.mark.slow
def test_tests_are_counted_also_if_they_are_cut_off(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import time, pytest\n"
        "def test_a(): pass\n"
        "def test_b(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no')\n"
        "def test_c(): pass\n"
        "def test_d(): time.sleep(60)\n",
        encoding="utf-8",
    )
    options = Options(tmp_path, tmp_path / "state", minutes=1, tests=(str(tmp_path / "test_some.py"),))
    with Processes() as launch:
        outcome = launch(Session("tests", 1, name="tests"), options, 6, None)
    assert outcome.problem == ""
    found = json.loads(part_path(options.state, "tests").read_text(encoding="utf-8"))
    assert [found[key] for key in ("passed", "failed", "skipped", "cut_off")] == [1, 1, 1, True]
    assert "assert 1 == 2" in next(test["message"] for test in found["tests"] if test["outcome"] == "failed")


@pytest.mark.slow
def test_a_session_really_runs_as_a_process(tmp_path):
    options = Options(tmp_path, tmp_path / "state", minutes=1, tiny=True)
    with Processes() as launch:
        assert launch(Session("probe", 1, name="probe"), options, 120, None).problem == ""
    assert read_parts(options.state)["probe"]["flops"] > 0


def test_a_base_that_is_written_is_the_one_that_is_made(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.gpu.bases import checksum, nf4_base
    from benchmarks.gpu.plan import geometry

    spec = {"kind": "base", "name": "base-7b", "runs": [], "state": str(tmp_path), "device": "cpu", "tiny": True}
    session.main(spec)
    assert read_parts(tmp_path)["base-7b"]["bytes"] > 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base-7b")
    made = nf4_base(geometry("7b", tiny=True), torch.device("cpu"), torch.float32)
    assert checksum(loaded) == checksum(made) != 0
