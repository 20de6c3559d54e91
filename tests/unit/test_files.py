"""Files and folders are whole under their names at any moment; records are read or refused; failing disks are known."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_neft.disks import disk_problem, failing_with_the_disk
from qlora_neft.errors import RunFailed, UserInputError
from qlora_neft.files import (
    finite,
    put_folder,
    read_json,
    read_json_lines,
    read_record,
    read_record_if_there,
    sha256_of_file,
    sha256_of_text,
    whole_file,
    whole_folder,
    write_json,
    write_text,
)


def contents(folder):
    """Every file below a folder, hidden ones too, with its text."""
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def synced(monkeypatch):
    """Names that were brought to the disk."""
    found, fsync = [], os.fsync

    def note(descriptor):
        found.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    return found


@pytest.mark.parametrize("old", [None, "old"])
def test_a_file_has_its_name_when_it_is_whole(tmp_path, old):
    path = tmp_path / "a.txt"
    if old:
        path.write_text(old)
    with whole_file(path) as draft:
        draft.write_text("half")
        assert (path.read_text() if old else path.exists()) == (old or False)
        draft.write_text("new")
    assert contents(tmp_path) == {"a.txt": "new"}


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("keep", [False, True])
def test_an_exception_leaves_the_old_file(tmp_path, error, keep):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), whole_file(path, keep_draft=keep) as draft:  # noqa: PT012
        draft.write_text("half")
        raise error
    assert contents(tmp_path) == {"a.txt": "old", **({".a.txt.part": "half"} if keep else {})}


def test_a_draft_of_a_killed_process_is_written_over(tmp_path):
    (tmp_path / ".a.txt.part").write_text("what a killed process left, longer than the new text")
    write_text(tmp_path / "a.txt", "new")
    assert contents(tmp_path) == {"a.txt": "new"}


@pytest.mark.parametrize("old", ["nothing", "empty", "full", "file"])
def test_a_folder_has_its_name_when_it_is_whole(tmp_path, old):
    path = tmp_path / "a"
    if old == "file":
        path.write_text("old")
    elif old != "nothing":
        path.mkdir()
        if old == "full":
            (path / "old").write_text("old")
    before = contents(tmp_path)
    with whole_folder(path) as draft:
        (draft / "new").write_text("new")
        assert draft.name.startswith(".a.partial-")
        assert {name: text for name, text in contents(tmp_path).items() if name[0] != "."} == before
    assert contents(tmp_path) == {"a/new": "new"} and [entry.name for entry in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_folder(tmp_path, error):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/old").write_text("old")
    with pytest.raises(error), whole_folder(tmp_path / "a") as draft:  # noqa: PT012
        (draft / "new").write_text("new")
        raise error
    assert contents(tmp_path) == {"a/old": "old"} and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(tmp_path, monkeypatch):
    for name in ("a", "draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    rename = Path.rename

    def refuse(path, target):
        if path.name == "draft":
            raise OSError(errno.EROFS, "Read-only file system")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Read-only"):
        put_folder(tmp_path / "draft", tmp_path / "a")
    assert contents(tmp_path) == {"a/x": "a", "draft/x": "draft"}


def test_only_what_is_asked_for_is_brought_to_the_disk(tmp_path, synced):
    with whole_file(tmp_path / "a") as draft:
        draft.touch()
    with whole_folder(tmp_path / "b"):
        pass
    assert synced == []
    with whole_file(tmp_path / "a", synced=True) as draft:
        draft.touch()
    assert synced == [".a.part", tmp_path.name]  # the file, then its name
    synced.clear()
    with whole_folder(tmp_path / "b", synced=True) as draft:
        (draft / "c").mkdir()
        (draft / "c/d").touch()
    assert sorted(synced[:2]) == ["c", "d"] and synced[2].startswith(".b.partial-") and synced[3:] == [tmp_path.name]


def test_json_is_written_as_it_is_read(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": 1, "a": ["\u00e4", None]})
    assert path.read_text() == '{\n  "b": 1,\n  "a": [\n    "\\u00e4",\n    null\n  ]\n}\n'
    assert read_json(path) == read_record(path) == {"b": 1, "a": ["\u00e4", None]}
    write_json(path, {"b": 1, "a": 2}, sort_keys=True)
    assert list(read_json(path)) == ["a", "b"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert list(contents(tmp_path)) == ["a.json"] and read_json(path) == {"b": 1, "a": 2}
    write_json(path, finite({"a": float("nan"), "b": float("inf"), "c": 1.5}))
    assert read_json(path) == {"a": None, "b": None, "c": 1.5}


def test_json_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n[2]\n')
    assert read_json_lines(tmp_path / "a.jsonl") == [{"a": 1}, [2]]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.json", "{", "cannot be read (Expecting"),
        ("a.json", "[1]", "must hold a mapping, got list."),
        ("a.json", "[" * 100_000, "cannot be read ("),
        ("a.yaml", "a: [", "cannot be read ("),
        ("a.yaml", "- a", "must hold a mapping, got list."),
        ("a.yaml", "", "must hold a mapping, got NoneType."),
        ("a.json", None, "cannot be read ([Errno 2]"),
        ("a.json", b"\xff", "cannot be read ('utf-8'"),
    ],
)
def test_a_damaged_record_is_refused_with_a_remedy(tmp_path, name, text, problem):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserInputError) as caught:
        read_record(path, "Do this.")
    assert str(caught.value).startswith(f"{path}: {problem}") and str(caught.value).endswith(". Do this.")


def test_a_record_may_be_missing(tmp_path):
    assert read_record_if_there(tmp_path / "a.json") is None
    (tmp_path / "a.yaml").write_text("a: 1")
    assert read_record_if_there(tmp_path / "a.yaml") == {"a": 1}


def test_hashes(tmp_path):
    (tmp_path / "a").write_text("abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of_file(tmp_path / "a") == sha256_of_text("abc") == known


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.ENOENT, "No such file"), None),
        (RuntimeError("[enforce fail at inline_container.cc:603]"), "No space left on device, or it cannot be written"),
        (RuntimeError("CUDA error"), None),
        (json.JSONDecodeError("x", "y", 0), None),
    ],
)
def test_a_disk_that_fails_is_told_from_other_errors(error, cause):
    found = disk_problem(error)
    assert found is None if cause is None else found.startswith(cause)
    with pytest.raises(type(error) if cause is None else RunFailed), failing_with_the_disk("disk: {}".format):
        raise error


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_every_file_of_a_folder_has_one_mode(tmp_path, umask):
    before = os.umask(umask)
    try:
        with whole_folder(tmp_path / "folder") as draft:
            (draft / "config.json").write_text("{}")
            save_file({"a": torch.zeros(1)}, draft / "a.safetensors")
            (draft / "inner").mkdir()
            (draft / "inner" / "b").touch(0o600)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "folder").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask} and len(files) == 3
