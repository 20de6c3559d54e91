"""The live view: what it says of a run's folder, on any terminal, and that it leaves the folder as it is."""

import io
import json
import os
import signal

import pytest
from rich.console import Console
from test_cli import invoke

from qlora_neft.errors import RunInterrupted, UserInputError
from qlora_neft.run_folder import live
from qlora_neft.run_folder.live import LiveFile, LiveLine
from qlora_neft.run_folder.live_record import told_how_it_ends
from qlora_neft.run_folder.stop import StopNow
from qlora_neft.watch.clock import Clock
from qlora_neft.watch.curve import plot
from qlora_neft.watch.lines import GrowingFile
from qlora_neft.watch.pace import pace_of
from qlora_neft.watch.run import Loss, WatchedRun
from qlora_neft.watch.watch import Watched, follow, look_of, picture, to_json

NOW = 1_000_000.0
RECIPE = {"model": {"name_or_path": "org/base"}, "train": {"num_train_epochs": 2, "seed": 0}}


def line(time, phase, step, **values):
    return {"time": NOW + time, "phase": phase, "step": step, "steps": 100, **values}


def write(folder, *, lines=(), metrics=(), **records):
    """A run's folder with some of its files; ``live.jsonl`` ends in half a line, as at a bad moment."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"run": {"recipe": RECIPE}, **records}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in metrics))
    if lines:
        (folder / "live.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines) + '{"time": 1, "ph')
    return folder


def steps(first, last, seconds=2.0, begin=0.0, phase="training"):
    return [
        line(begin + (n - first) * seconds, phase, n, tokens=n * 100, bad_steps=1, host_bytes=2**30)
        for n in range(first, last + 1)
    ]


def metrics(last, **more):
    found = [{"step": 0, "eval_loss": 3.0, "clean_loss": 3.1}]
    found += [{"step": n, "loss": 3 - n / 50, "epoch": n / 50, "learning_rate": 1e-3} for n in range(1, last + 1)]
    return [*found, {"step": last, "eval_loss": 2.5, **more}]


def clock(at=0.0):
    return Clock(now=lambda: NOW + at, steady=lambda: at)


def seen(folder, at=0.0):
    return WatchedRun(folder).look(clock(at))


def shown(folder, width=80, height=30, *, encoding="utf-8", ascii_only=False, **options):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=width, height=height, highlight=False, **options)
    console.print(picture(folder, Watched(folder).look(), look_of(console, ascii_only=ascii_only)))
    file.flush()
    return file.buffer.getvalue().decode(encoding)


# ---- What a run is doing ----


@pytest.mark.parametrize(
    ("phase", "quiet", "expected"),
    [
        ("preparing", 600, "preparing"),
        ("training", 5, "training"),
        ("training", 170, "training"),
        ("training", 200, "not moving"),
        ("evaluating", 60, "evaluating"),
        ("measuring", 900, "measuring"),
        ("interrupted", 9999, "interrupted"),
        ("failed", 9999, "failed"),
    ],
)
def test_the_state_is_the_last_phase_unless_nothing_moves(tmp_path, phase, quiet, expected):
    lines = [*steps(0, 10), line(20, phase, 10, note="why")]
    found = seen(write(tmp_path, lines=lines), at=20 + quiet)
    assert found.state == expected
    assert found.quiet_seconds == quiet
    assert ("why" in found.note) == (expected != "not moving")


def test_slow_steps_are_no_silence(tmp_path):
    folder = write(tmp_path, lines=steps(0, 5, seconds=100))
    assert seen(folder, at=500 + 450).state == "training"
    assert seen(folder, at=500 + 550).state == "not moving"


def test_a_run_is_waited_for_from_before_its_folder_is_there(tmp_path):
    out = tmp_path / "out"
    assert seen(out).state == "waiting"
    out.mkdir()
    (out / ".run.lock").write_text("{}")
    assert seen(out).state == "waiting"
    watched = Watched(out)
    write(out, lines=steps(0, 3))
    [(_, found)] = watched.look()
    assert found.step == 3


@pytest.mark.parametrize(("selection", "note"), [(None, ""), ({"step": 30, "stopped_early": True}, "stopped early")])
def test_a_finished_run_shows_its_end(tmp_path, selection, note):
    lines = [*steps(0, 60), line(200, "finished", 60)]
    summary = {"steps": 60, "bad_steps": 1, "selection": selection, "train_seconds": 7.0, "recipe": RECIPE}
    found = seen(write(tmp_path, lines=lines, metrics=metrics(60), summary=summary), at=1e6)
    assert (found.state, found.note, found.step, found.steps) == ("finished", note, 60, 60)
    assert found.kept_step == (selection and 30)
    assert found.pace.seconds_left is None


def test_a_run_of_an_earlier_version_tells_what_its_other_files_tell(tmp_path):
    folder = write(tmp_path, metrics=metrics(40))
    for step in (20, 40):
        (folder / f"checkpoint-{step}").mkdir()
        progress = {"train_seconds": step * 3.0, "tokens_seen": step * 600, "bad_steps": 2}
        (folder / f"checkpoint-{step}" / "progress.json").write_text(json.dumps(progress))
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text('{"max_steps": 100, "log_history": []}')
        (folder / f"checkpoint-{step}" / "manifest.json").write_text("{}")
    found = WatchedRun(folder).look(Clock())
    assert (found.state, found.step, found.steps, found.bad_steps) == ("training", 40, 100, 2)
    assert (found.checkpoint_step, found.pace.seconds_per_step, found.pace.tokens_per_second) == (40, 3.0, 200.0)
    assert found.losses["held_out"] == Loss(40, 2.5)


def test_a_mirror_is_as_old_as_its_last_copy_and_said_to_be_so(tmp_path):
    folder = write(tmp_path, lines=steps(0, 10), metrics=metrics(10))
    (folder / ".qlora_neft-mirror.json").write_text("{}")
    found = seen(folder, at=5000)
    assert (found.state, found.is_mirror, found.bad_steps) == ("training", True, 1)
    assert "as of its last copy" in shown(folder)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "letters.txt").write_text("x")
    with pytest.raises(UserInputError, match=r"holds no run. Expected run.json"):
        Watched(tmp_path)
    with pytest.raises(UserInputError, match="is a file"):
        Watched(tmp_path / "letters.txt")
    checkpoint = write(tmp_path / "run") / "checkpoint-5"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text("{}")
    with pytest.raises(UserInputError, match="is a checkpoint"):
        Watched(checkpoint)
    assert invoke("watch", str(checkpoint)).exit_code == 2


# ---- Speed and time left ----


def of(lines):
    return pace_of([LiveLine.of(entry) for entry in lines])


def test_pauses_are_told_from_steps_and_still_counted_in_the_time_left():
    lines = steps(0, 20)
    lines += [line(40, "evaluating", 20), line(70, "training", 20)]  # 30 s
    lines += [line(70 + 2 * n, "training", 20 + n, tokens=2000 + 100 * n) for n in range(1, 11)]
    found = of(lines)
    assert found.seconds_per_step == 2
    assert found.tokens_per_second == 50
    assert found.seconds_left == 70 * 2 + 4 * 30  # evaluations after steps 40, 60, 80, 100


def test_after_a_resume_only_its_own_session_counts():
    earlier = steps(0, 50, seconds=20.0)
    later = [line(90_000, "preparing", 40), *steps(40, 60, seconds=1.0, begin=90_100)]
    assert of([*earlier, *later]).seconds_left == 40
    assert of([*earlier, later[0]]).seconds_left is None


def test_quick_steps_that_share_a_line_count_each():
    lines = [line(0, "training", 0), line(9, "training", 1), line(10, "training", 11), line(11, "training", 21)]
    assert of(lines).seconds_per_step == pytest.approx(0.1)


def test_the_time_of_another_machine_is_not_believed():
    at = [0.0]
    hour_ahead = Clock(now=lambda: NOW - 3600 + at[0], steady=lambda: at[0])
    assert hour_ahead.age("run", NOW, changed=True) == 0
    day_behind = Clock(now=lambda: NOW + 86400 + at[0], steady=lambda: at[0])
    assert day_behind.age("run", NOW, changed=True) == 86400
    at[0] = 5.0
    assert day_behind.age("run", NOW + 5, changed=True) == 0  # seen to change
    at[0] = 8.0
    assert day_behind.age("run", NOW + 5, changed=False) == 3


# ---- Files that are being written ----


def test_a_file_is_read_on_where_it_was_left_and_anew_after_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = GrowingFile(path)
    assert not file.refresh()
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert file.refresh()
    assert [entry["step"] for entry in file.lines] == [1, 2]
    assert not file.refresh()
    with path.open("a") as more:
        more.write('ep": 3}\nnot json\n[4]\n{"step": 5, "loss": NaN}\n')
    file.refresh()
    assert [entry["step"] for entry in file.lines] == [1, 2, 3, 5]
    path.write_text('{"step": 1}\n' + '{"step": 9}\n' * 20)  # longer than before: its length tells nothing
    file.refresh()
    assert [entry["step"] for entry in file.lines] == [1, *[9] * 20]
    path.unlink()
    assert file.refresh()
    assert file.lines == []


def test_the_live_file_is_bounded_and_never_stops_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "MOST_LINES", 20)
    monkeypatch.setattr(live, "LINES_KEPT", 10)
    early = LiveFile(tmp_path)
    early.open(0)
    early.write("training", 1)
    assert not list(tmp_path.iterdir())  # a folder that holds anything before run.json is no run's
    (tmp_path / "run.json").write_text("{}")
    early.open(0)
    for n in range(100):
        early.write("training", n)
    kept = [entry["step"] for entry in live.lines_of((tmp_path / "live.jsonl").read_text())]
    assert len(kept) <= 20
    assert kept == list(range(100 - len(kept), 100))
    resumed = LiveFile(tmp_path)
    resumed.open(95)
    kept = live.lines_of((tmp_path / "live.jsonl").read_text())
    assert (kept[-2]["step"], kept[-1]["step"], kept[-1]["phase"]) == (95, 95, "preparing")
    (tmp_path / "live.jsonl").unlink()
    (tmp_path / "live.jsonl").mkdir()
    LiveFile(tmp_path).open(0)
    resumed.write("training", 96)


@pytest.mark.parametrize(
    ("error", "phase", "note"),
    [
        (
            RunInterrupted(2, "stopped after step 3 of 9. To go on:\n  qlora-neft train x"),
            "interrupted",
            "stopped after step 3 of 9.",
        ),
        (RuntimeError("out of memory\nsee below"), "failed", "out of memory"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
    ],
)
def test_how_a_run_ends_is_one_line(tmp_path, error, phase, note):
    (tmp_path / "run.json").write_text("{}")
    file = LiveFile(tmp_path)
    file.open(3)
    with pytest.raises(type(error)), told_how_it_ends(file):
        raise error
    last = live.lines_of((tmp_path / "live.jsonl").read_text())[-1]
    assert (last["phase"], last["step"], last["note"]) == (phase, 3, note)


def test_watching_changes_nothing_and_needs_no_right_to_write(tmp_path):
    folder = write(tmp_path / "run", lines=steps(0, 9), metrics=metrics(9))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    stamp = folder.stat().st_mtime_ns
    try:
        assert invoke("watch", str(folder), "--once").exit_code == 0
        assert json.loads(invoke("watch", str(folder), "--json").stdout)["step"] == 9
    finally:
        folder.chmod(0o755)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before
    assert folder.stat().st_mtime_ns == stamp


# ---- Terminals ----


@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize("height", [5, 24, 60])
def test_no_line_is_wider_than_the_terminal(tmp_path, width, height):
    folder = write(tmp_path / "a-folder-with-a-rather-long-name", lines=steps(0, 30), metrics=metrics(30))
    text = shown(folder, width, height, force_terminal=True, no_color=True)
    assert max(map(len, text.splitlines())) <= width + len("\x1b[1m" * 4)
    for word in ("training", "30", "2.5000"):
        assert word in text.replace("\n", "")


@pytest.mark.parametrize("options", [{"encoding": "ascii"}, {"ascii_only": True}])
def test_a_terminal_without_unicode_gets_ascii(tmp_path, options):
    folder = write(tmp_path / "läuft", lines=steps(0, 30), metrics=metrics(30))
    text = shown(folder, **options)
    assert text.isascii()
    assert "l\\xe4uft" in text.replace("\n", "")  # wrapped where the folder's name is long
    assert "." * 3 in text


def test_no_color_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text = shown(write(tmp_path, lines=steps(0, 30), metrics=metrics(30)), force_terminal=True)
    assert not [code for code in range(30, 38) if f"\x1b[{code}m" in text]


def test_what_a_run_wrote_is_not_obeyed(tmp_path):
    recipe = {"model": {"name_or_path": "evil\x1b[2J"}, "train": {}}
    write(tmp_path, lines=[line(0, "failed", 3, note="\x1b]0;title\x07")], run={"recipe": recipe})
    printed = invoke("watch", str(tmp_path)).stdout
    assert "\x1b" not in printed
    assert "\x07" not in printed


def test_losses_over_decades_are_drawn_by_their_logarithm_and_a_spike_flattens_nothing():
    curve = [Loss(n, 2.0 - n / 100) for n in range(100)]
    lines = [text.plain for text in plot({"train": [*curve, Loss(100, 900.0)]}, 60, 6, ascii_only=False)]
    assert lines[0].startswith("1.99")
    assert all(text.strip() for text in lines)
    assert "log" not in lines[-1]
    curve = [Loss(n, 10 * 0.9**n) for n in range(100)]
    assert "log" in plot({"train": curve}, 60, 6, ascii_only=False)[-1].plain
    assert plot({"train": curve[:1]}, 60, 6, ascii_only=False) == []


# ---- Several runs ----


def test_a_sweep_is_a_table_of_its_arms(tmp_path):
    runs = [{"name": name, "recipe": RECIPE} for name in ("alpha_0", "alpha_5", "alpha_10")]
    (tmp_path / "sweep.json").write_text(json.dumps({"recipe": "demo", "swept": {}, "runs": runs}))
    write(tmp_path / "alpha_0", metrics=metrics(60), summary={"steps": 60})
    write(tmp_path / "alpha_5", lines=[*steps(0, 9), line(19, "interrupted", 9)], metrics=metrics(9))
    found = to_json(tmp_path, Watched(tmp_path).look())
    assert [(run["name"], run["state"], run["step"]) for run in found["runs"]] == [
        ("alpha_0", "finished", 60),
        ("alpha_5", "interrupted", 9),
        ("alpha_10", "waiting", 0),
    ]
    for width in (40, 100):
        text = shown(tmp_path, width)
        assert all(name in text for name in ("alpha_0", "alpha_5", "alpha_10", "1 of 3", "2.5000"))
    (tmp_path / "sweep.json").unlink()  # folders of runs side by side are shown likewise
    assert [name for name, _ in Watched(tmp_path).look()] == ["alpha_0", "alpha_5"]


# ---- The loop ----


def test_the_view_ends_with_the_run(tmp_path):
    folder = write(tmp_path, lines=steps(0, 9), metrics=metrics(9))
    file, watched = io.StringIO(), Watched(folder)
    look = watched.look

    def finishing():
        found = look()
        write(folder, lines=[*steps(0, 9), line(30, "finished", 9)], metrics=metrics(9), summary={"steps": 9})
        return found

    watched.look = finishing
    follow(watched, Console(file=file, force_terminal=True, width=80, height=24), 0.01)
    assert file.getvalue().rstrip().splitlines()[-1].strip()
    assert "finished" in file.getvalue()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_ctrl_c_leaves_cleanly(tmp_path, monkeypatch, number, code):
    write(tmp_path, lines=steps(0, 9))

    def rest(*args):
        raise StopNow(number)

    monkeypatch.setattr("qlora_neft.watch.watch._rest", rest)
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    found = invoke("watch", str(tmp_path))
    assert found.exit_code == code
    assert "Traceback" not in found.stdout + found.stderr
    assert os.fspath(tmp_path) in found.stdout
