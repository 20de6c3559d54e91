"""A second folder is kept up to date with a run's in the background, whatever happens to either."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from qlora_neft.errors import UserInputError
from qlora_neft.files import sha256_of_file
from qlora_neft.run_folder.checkpoints import find_checkpoints, new_checkpoint, prune, verify
from qlora_neft.run_folder.mirror import Mirror, restore
from qlora_neft.run_folder.mirror_mark import MARK, Mark, mirror_place


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def drive(tmp_path):
    return tmp_path / "drive" / "copies"


@pytest.fixture
def problems():
    return []


@pytest.fixture
def mirror(run_dir, drive, problems):
    mirror = Mirror(run_dir, drive, problems.append)
    yield mirror
    mirror.close(10)


def write(run_dir, step, size=1000):
    with new_checkpoint(run_dir, step, {"of": "this run"}) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "model.bin").write_bytes(os.urandom(size))
        (folder / "state.json").write_text(json.dumps(step))
    return run_dir / f"checkpoint-{step}"


def names(folder):
    """What a folder holds, except the mirror's list."""
    return sorted(path.name for path in folder.iterdir() if path.name != MARK)


@pytest.fixture
def gate(run_dir, monkeypatch):
    """A file whose copy reports its start, continues when told to, and then fails with what the list holds."""
    started, opened, failures = threading.Event(), threading.Event(), []
    copyfile = shutil.copyfile

    def slow(source, target):
        if Path(source).name == "gate.txt":
            started.set()
            opened.wait(10)
            if failures:
                raise failures.pop()
        return copyfile(source, target)

    run_dir.mkdir()
    (run_dir / "gate.txt").write_text("x")
    monkeypatch.setattr("shutil.copyfile", slow)
    yield started, opened, failures
    opened.set()


# ---- Copying ----


def test_a_checkpoint_is_copied_and_older_ones_go(run_dir, drive, mirror, problems):
    for step in (1, 2, 3):
        path = write(run_dir, step)
        mirror.checkpoint(path)
        assert mirror.close()
        assert names(drive) == [f"checkpoint-{step}"]
        assert verify(drive / f"checkpoint-{step}") == []
    assert (drive / "checkpoint-3/deep/model.bin").read_bytes() == (path / "deep/model.bin").read_bytes()
    assert names(run_dir) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"] and problems == []


def test_files_are_copied_again_when_they_change(run_dir, drive, mirror, problems):
    run_dir.mkdir()
    for text in ("one", "one, two"):
        (run_dir / "metrics.jsonl").write_text(text)
        mirror.files(["metrics.jsonl", "not there yet.json"])
        assert mirror.close()
        assert (drive / "metrics.jsonl").read_text() == text
    assert names(drive) == ["metrics.jsonl"] and problems == []


def test_hidden_files_are_not_of_the_run(run_dir, drive, mirror):
    run_dir.mkdir()
    (run_dir / ".run.lock").write_text("{}")
    mirror.files([".run.lock"])
    assert mirror.close() and names(drive) == []


def test_calls_do_not_wait_for_the_copy(run_dir, drive, mirror, gate):
    started, *_ = gate
    mirror.files(["gate.txt"])
    assert started.wait(5)
    began = time.monotonic()
    mirror.files(["gate.txt"])
    mirror.checkpoint(run_dir / "checkpoint-1")
    assert time.monotonic() - began < 0.5 and names(drive) == []


def test_of_several_that_wait_only_the_last_is_copied(run_dir, drive, mirror, gate, monkeypatch):
    started, opened, _ = gate
    copied = []
    monkeypatch.setattr(Mark, "prune", lambda mark: copied.append(names(mark.folder)))
    mirror.files(["gate.txt"])
    assert started.wait(5)
    for step in (1, 2, 3):
        mirror.checkpoint(write(run_dir, step))
    opened.set()
    assert mirror.close() and copied == [["checkpoint-3", "gate.txt"]]


def test_close_says_if_time_ran_out(mirror, gate):
    started, opened, _ = gate
    mirror.files(["gate.txt"])
    assert started.wait(5)
    assert mirror.close(0.05) is False
    opened.set()
    assert mirror.close(10) is True and mirror.close() is True


def test_no_thread_without_work(run_dir, drive, problems):
    before = threading.active_count()
    mirror = Mirror(run_dir, drive, problems.append)
    assert threading.active_count() == before and mirror.close(0)


def test_copying_while_the_run_writes_and_prunes(run_dir, drive, mirror, problems):
    """Sources keep vanishing during the copy; in the end the last one is there, and every copy is sound."""
    done = threading.Event()
    seen: set[int] = set()

    def watch():
        while not done.is_set():
            newest = find_checkpoints(drive).newest
            seen.update([newest.step] if newest else [])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for step in range(1, 41):
            path = write(run_dir, step, size=300_000)
            prune(run_dir, 1)
            mirror.checkpoint(path)
        assert mirror.close(20)
    finally:
        done.set()
        watcher.join()
    assert names(drive) == ["checkpoint-40"] and verify(drive / "checkpoint-40") == []
    assert problems == [] and len(seen) > 1


def test_a_source_that_is_gone_is_skipped(run_dir, drive, mirror, problems):
    path = write(run_dir, 1)
    shutil.rmtree(path)
    mirror.checkpoint(path)
    assert mirror.close() and names(drive) == [] and problems == []


def test_a_source_that_is_gone_is_nothing_to_try_again(run_dir, drive, mirror, problems, tmp_path):
    drive.rename(tmp_path / "unplugged")
    mirror.checkpoint(run_dir / "checkpoint-1")
    assert mirror.close() and problems == []


def test_a_source_that_vanishes_during_the_copy(run_dir, drive, mirror, problems, monkeypatch):
    path = write(run_dir, 1)
    copyfile = shutil.copyfile

    def copy_and_lose(source, target):
        copyfile(source, target)
        shutil.rmtree(path, ignore_errors=True)

    monkeypatch.setattr("shutil.copyfile", copy_and_lose)
    mirror.checkpoint(path)
    assert mirror.close() and names(drive) == [] and problems == []


def test_a_damaged_source_is_not_a_copy(run_dir, drive, mirror, problems):
    mirror.checkpoint(write(run_dir, 1))
    assert mirror.close()
    path = write(run_dir, 2)
    (path / "state.json").write_text("3")
    mirror.checkpoint(path)
    assert not mirror.close()
    assert names(drive) == ["checkpoint-1"] and len(problems) == 1 and "not sound" in problems[0]


def test_what_a_killed_process_left_in_the_mirror_goes(run_dir, drive, mirror):
    (drive / ".checkpoint-1.partial-77-ab").mkdir()
    mirror.checkpoint(write(run_dir, 2))
    assert mirror.close() and names(drive) == ["checkpoint-2"]


# ---- Failing ----


def test_a_mirror_that_goes_and_comes_back(run_dir, drive, mirror, problems, tmp_path):
    (write(run_dir, 1).parent / "recipe.yaml").write_text("a: 1")
    drive.parent.rename(tmp_path / "unplugged")
    for _ in range(3):
        mirror.files(["recipe.yaml"])
        mirror.checkpoint(run_dir / "checkpoint-1")
        assert not mirror.close()
    assert not drive.parent.exists(), "a folder made in place of a mounted drive would be lost with the machine"
    assert len(problems) == 1 and str(drive) in problems[0] and "gone" in problems[0]
    (tmp_path / "unplugged").rename(drive.parent)
    write(run_dir, 2)
    mirror.checkpoint(run_dir / "checkpoint-2")
    assert mirror.close()
    assert names(drive) == ["checkpoint-2", "recipe.yaml"], "what failed before is there too"


def test_close_tries_once_more(run_dir, drive, mirror, tmp_path):
    drive.rename(tmp_path / "unplugged")
    mirror.checkpoint(write(run_dir, 1))
    assert not mirror.close()
    (tmp_path / "unplugged").rename(drive)
    assert mirror.close() and names(drive) == ["checkpoint-1"]


@pytest.mark.parametrize("obstacle", ["a file", "nothing can be written"])
def test_a_mirror_that_cannot_be_made_is_refused(run_dir, drive, problems, obstacle, monkeypatch):
    if obstacle == "a file":
        drive.parent.write_text("a file")
    else:

        def read_only(path, *args, **kwargs):
            raise OSError(30, "Read-only file system", str(path))

        monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(UserInputError, match=r"machine\.mirror_dir: .*cannot be made"):
        Mirror(run_dir, drive, problems.append)
    assert problems == []


def test_what_is_queued_during_a_failing_copy_is_not_left_lying(run_dir, drive, mirror, gate, problems):
    """The call came while the thread was working, and no other call follows."""
    started, opened, failures = gate
    failures.append(OSError(107, "Transport endpoint is not connected"))
    mirror.files(["gate.txt"])
    assert started.wait(5)
    mirror.files(["later.txt"])
    (run_dir / "later.txt").write_text("x")
    opened.set()
    deadline = time.monotonic() + 5
    while names(drive) != ["gate.txt", "later.txt"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert names(drive) == ["gate.txt", "later.txt"] and len(problems) == 1


def test_a_newer_checkpoint_takes_the_place_of_one_that_failed(run_dir, drive, mirror, gate):
    started, opened, failures = gate
    failures.append(OSError(107, "Transport endpoint is not connected"))
    with new_checkpoint(run_dir, 1, {}) as folder:
        (folder / "gate.txt").write_text("x")
    mirror.checkpoint(run_dir / "checkpoint-1")
    assert started.wait(5)
    mirror.checkpoint(write(run_dir, 2))
    opened.set()
    assert mirror.close() and names(drive) == ["checkpoint-2"]


def test_a_file_that_does_not_reach_the_disk_is_no_copy(run_dir, drive, mirror, problems, monkeypatch):
    def cannot(descriptor):
        raise OSError(5, "Input/output error")

    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text("a: 1")
    monkeypatch.setattr(os, "fsync", cannot)
    mirror.files(["recipe.yaml"])
    assert not mirror.close() and names(drive) == [] and len(problems) == 1


def test_a_listener_that_fails_does_not_end_the_mirror(run_dir, drive, tmp_path):
    def fail(message):
        raise RuntimeError(message)

    mirror = Mirror(run_dir, drive, fail)
    drive.rename(tmp_path / "unplugged")
    hook, threading.excepthook = threading.excepthook, lambda args: None
    try:
        mirror.checkpoint(write(run_dir, 1))
        mirror.close(5)
    finally:
        threading.excepthook = hook
    (tmp_path / "unplugged").rename(drive)
    mirror.checkpoint(write(run_dir, 2))
    assert mirror.close(5) and names(drive) == ["checkpoint-2"]


@pytest.fixture
def small_drive(drive):
    """A real mount of one megabyte."""
    drive.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(drive)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root and is not allowed here")
    yield drive
    subprocess.run(["umount", "-l", str(drive)], check=False, capture_output=True)


def test_a_full_mirror(run_dir, small_drive, problems):
    mirror = Mirror(run_dir, small_drive, problems.append)
    mirror.checkpoint(write(run_dir, 1, size=300_000))
    assert mirror.close()
    for step in (2, 3):
        mirror.checkpoint(write(run_dir, step, size=900_000))
        assert not mirror.close()
        (run_dir / "summary.json").write_text("x" * 900_000)
        mirror.files(["summary.json"])
        assert not mirror.close()
    assert len(problems) == 1 and "No space left" in problems[0]
    assert names(small_drive) == ["checkpoint-1"] and verify(small_drive / "checkpoint-1") == []
    (run_dir / "summary.json").write_text("x")
    mirror.checkpoint(write(run_dir, 4, size=300_000))
    assert mirror.close() and names(small_drive) == ["checkpoint-4", "summary.json"]


def test_the_mount_point_of_a_drive_that_is_gone_is_no_mirror(run_dir, small_drive, problems):
    mirror = Mirror(run_dir, small_drive, problems.append)
    subprocess.run(["umount", str(small_drive)], check=True)
    mirror.checkpoint(write(run_dir, 1))
    assert not mirror.close() and names(small_drive) == [] and len(problems) == 1
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small_drive)], check=True)
    assert mirror.close() and names(small_drive) == ["checkpoint-1"]


# ---- Bringing back ----


@pytest.fixture
def filled(run_dir, drive):
    """A mirror of checkpoints 3 and 5 beside which the user keeps things; the run's own folder is gone."""
    mirror = Mirror(run_dir, drive, pytest.fail)
    mirror.checkpoint(write(run_dir, 3))
    assert mirror.close()
    shutil.copytree(drive / "checkpoint-3", drive / "older")
    (run_dir / "recipe.yaml").write_text("a: 1")
    (run_dir / "metrics.jsonl").write_text("{}")
    mirror.files(["recipe.yaml", "metrics.jsonl"])
    mirror.checkpoint(write(run_dir, 5))
    assert mirror.close()
    (drive / "older").rename(drive / "checkpoint-3")
    mark = Mark.read(drive)
    mark.add("checkpoint-3", sha256_of_file(drive / "checkpoint-3/manifest.json"))
    for name in (".hidden", "tax.pdf", "holiday.mp4", "README.md"):
        (drive / name).write_text("mine")
    (drive / "folder").mkdir()
    shutil.rmtree(run_dir)


def test_restore(drive, run_dir, filled):
    found = restore(drive, run_dir)
    assert (found.path, found.step, found.about) == (run_dir / "checkpoint-5", 5, {"of": "this run"})
    assert names(run_dir) == ["checkpoint-5", "metrics.jsonl", "recipe.yaml"]
    assert verify(found.path) == [] and (run_dir / "recipe.yaml").read_text() == "a: 1"
    assert {"checkpoint-3", "checkpoint-5"} < set(names(drive))


def test_restore_takes_the_newest_sound_one(drive, run_dir, filled):
    (drive / "checkpoint-5/state.json").unlink()
    assert restore(drive, run_dir).step == 3 and "checkpoint-5" not in names(run_dir)


@pytest.mark.parametrize("state", ["missing", "empty", "damaged"])
def test_nothing_to_restore(drive, run_dir, state):
    if state != "missing":
        drive.mkdir(parents=True)
        (drive / "recipe.yaml").write_text("a: 1")
    if state == "damaged":
        mirror = Mirror(run_dir, drive / "of a run", pytest.fail)
        mirror.checkpoint(write(run_dir, 1))
        drive = mirror.mirror_dir
        assert mirror.close()
        (drive / "checkpoint-1/state.json").unlink()
        shutil.rmtree(run_dir)
    assert restore(drive, run_dir) is None and not run_dir.exists()


def test_restore_into_a_locked_folder(drive, run_dir, filled):
    run_dir.mkdir()
    (run_dir / ".run.lock").write_text("{}")
    assert restore(drive, run_dir).step == 5


def test_restore_overwrites_nothing(drive, run_dir, filled):
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text("mine")
    with pytest.raises(UserInputError, match="not empty"):
        restore(drive, run_dir)
    assert (run_dir / "recipe.yaml").read_text() == "mine" and names(run_dir) == ["recipe.yaml"]


@pytest.mark.parametrize("failing", ["state.json", "recipe.yaml"])
def test_restore_that_fails_leaves_nothing(drive, run_dir, filled, monkeypatch, failing):
    copyfile = shutil.copyfile

    def fail(source, target):
        if Path(source).name == failing:
            raise OSError(28, "No space left on device")
        return copyfile(source, target)

    monkeypatch.setattr("shutil.copyfile", fail)
    with pytest.raises(OSError, match="No space left"):
        restore(drive, run_dir)
    assert names(run_dir) == []


def test_there_and_back(run_dir, drive, mirror, tmp_path):
    write(run_dir, 7)
    (run_dir / "recipe.yaml").write_text("a: 1")
    mirror.files(["recipe.yaml"])
    mirror.checkpoint(run_dir / "checkpoint-7")
    assert mirror.close()
    restore(drive, tmp_path / "again")
    for path in ("recipe.yaml", "checkpoint-7/manifest.json", "checkpoint-7/deep/model.bin"):
        assert (tmp_path / "again" / path).read_bytes() == (run_dir / path).read_bytes()


# ---- What is not ours ----


@pytest.mark.parametrize(
    ("named", "word"),
    [
        ("run", "the run itself"),
        ("run/../run", "the run itself"),
        ("run/copies", "inside"),
        (".", "around"),
        ("link", "inside"),
    ],
)
def test_places_that_are_no_second_folder(tmp_path, run_dir, named, word):
    run_dir.mkdir()
    (tmp_path / "link").symlink_to(run_dir / "copies")
    with pytest.raises(UserInputError, match=rf"machine\.mirror_dir: .*{word}"):
        mirror_place(tmp_path / named, run_dir)


def kept(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_with_other_things_gets_a_mirror_of_its_own(run_dir, drive, problems):
    """Somebody's checkpoint of another run, a summary, papers: nothing is replaced, removed or brought back."""
    write(drive, 3)
    for name in ("summary.json", "run.json", "tax.pdf", ".profile"):
        (drive / name).write_text("mine")
    before = kept(drive)
    mirror = Mirror(run_dir, drive, problems.append)
    for step in (4, 5):
        path = write(run_dir, step)
        (run_dir / "summary.json").write_text("{}")
        mirror.files(["summary.json"])
        mirror.checkpoint(path)
        assert mirror.close()
    assert mirror.mirror_dir == drive / "run" and names(drive / "run") == ["checkpoint-5", "summary.json"]
    assert {name: text for name, text in kept(drive).items() if not name.startswith("run/")} == before
    shutil.rmtree(run_dir)
    assert mirror_place(drive, run_dir) == drive / "run" and restore(drive / "run", run_dir).step == 5
    assert names(run_dir) == ["checkpoint-5", "summary.json"] and problems == []


def test_two_runs_at_one_drive_each_have_their_own(run_dir, drive, problems, tmp_path):
    other = tmp_path / "other"
    for folder, step in ((run_dir, 3), (other, 4)):
        mirror = Mirror(folder, drive, problems.append)
        mirror.checkpoint(write(folder, step))
        assert mirror.close()
    assert names(drive) == ["checkpoint-3", "other"] and names(drive / "other") == ["checkpoint-4"]
    # One of the same name elsewhere, as long as the first is there: its own place; and of three there is none.
    namesake = tmp_path / "deep" / "run"
    assert mirror_place(drive, namesake) == drive / "run"
    Mirror(namesake, drive, problems.append)
    namesake.mkdir(parents=True)
    (namesake / "run.json").write_text("{}")
    with pytest.raises(UserInputError, match="holds other files, or another run's, and so does"):
        mirror_place(drive, tmp_path / "deeper" / "run")
    shutil.rmtree(run_dir)
    shutil.rmtree(other)
    for folder, step in ((run_dir, 3), (other, 4)):  # gone, as after a lost session: each finds its own again
        assert restore(mirror_place(drive, folder), folder).step == step
    assert problems == []


def test_where_both_places_are_taken(run_dir, drive):
    (drive / "run").mkdir(parents=True)
    (drive / "run" / "mine.txt").write_text("x")
    with pytest.raises(UserInputError, match="holds other files, or another run's, and so does"):
        mirror_place(drive, run_dir)


@pytest.mark.parametrize("taken", ["summary.json", "checkpoint-2", "a link"])
def test_what_the_user_put_into_the_mirror_stays(run_dir, drive, mirror, problems, taken, tmp_path):
    run_dir.mkdir()
    (run_dir / "summary.json").write_text("{}")
    (tmp_path / "elsewhere").write_text("mine")
    if taken == "checkpoint-2":
        (drive / taken).mkdir()
        (drive / taken / "mine.txt").write_text("mine")
        mirror.checkpoint(write(run_dir, 2))
    elif taken == "a link":
        (drive / "summary.json").symlink_to(tmp_path / "elsewhere")
        mirror.files(["summary.json"])
    else:
        mirror.files(["summary.json"])
        assert mirror.close()
        (drive / taken).write_text("mine")  # ours until now
        mirror.files([taken])
    before = kept(drive)
    assert not mirror.close() and kept(drive) == before and (tmp_path / "elsewhere").read_text() == "mine"
    assert len(problems) == 1 and "not what this run wrote" in problems[0]


def test_retention_leaves_what_was_put_into_a_checkpoint(run_dir, drive, mirror, problems):
    mirror.checkpoint(write(run_dir, 1))
    assert mirror.close()
    (drive / "checkpoint-1/notes.txt").write_text("mine")
    mirror.checkpoint(write(run_dir, 2))
    assert mirror.close() and problems == []
    assert list(kept(drive / "checkpoint-1")) == ["notes.txt"] and verify(drive / "checkpoint-2") == []


def test_what_changed_in_the_mirror_is_not_brought_back(run_dir, drive, filled):
    (drive / "metrics.jsonl").write_text("mine")
    assert restore(drive, run_dir).step == 5
    assert names(run_dir) == ["checkpoint-5", "recipe.yaml"]


def test_links_are_not_copied(run_dir, drive, mirror, problems, tmp_path):
    (tmp_path / "id_rsa").write_text("secret")
    path = write(run_dir, 1)
    (path / "state.json").unlink()
    (tmp_path / "state.json").write_text("1")
    (path / "state.json").symlink_to(tmp_path / "state.json")
    (run_dir / "summary.json").symlink_to(tmp_path / "id_rsa")
    mirror.files(["summary.json"])
    mirror.checkpoint(path)
    assert not mirror.close() and names(drive) == [] and "leads out of the folder" in problems[0]


def test_a_manifest_that_names_files_elsewhere_is_no_checkpoint(run_dir):
    path = write(run_dir, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    for name in ("../x", "/etc/hostname", "a/../../x", "..\\x", "C:/x"):
        manifest["files"] = {name: {"sha256": "", "bytes": 0}}
        (path / "manifest.json").write_text(json.dumps(manifest))
        assert "outside its folder" in verify(path)[0]


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"mirror_version": 1, "files": {"../x": ["a"]}}', '{"mirror_version": 9}']
)
def test_a_list_that_cannot_be_read_is_refused(run_dir, drive, text):
    drive.mkdir(parents=True)
    (drive / MARK).write_text(text)
    with pytest.raises(UserInputError, match=r"machine\.mirror_dir"):
        mirror_place(drive, run_dir)
