"""Things that go wrong around a run: other recipes, other data, full and read-only disks. Nothing on disk is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from command_line import (
    CUT_AT,
    SAVE_STEPS,
    STEPS,
    TRAIN,
    adapter,
    contents,
    copied,
    cut_off,
    invoke,
    logged,
    make_workplace,
    never_stopped,
    refused,
    sound_steps,
    summary,
)

from qlora_neft.runner.build import data_of

OUT, NEW = Path("out"), Path("new")


@pytest.fixture
def whole(llama):
    """The folder of the run that was never stopped."""
    return never_stopped(llama)


@pytest.fixture
def interrupted(llama, tmp_path, monkeypatch):
    """A current directory with a recipe, data, and the folder ``out`` of an interrupted run."""
    monkeypatch.chdir(copied(cut_off(llama), tmp_path))
    return tmp_path


def goes_on(whole: Path, *arguments: str, output_dir: Path = OUT) -> str:
    """Check that the command ends with the adapter of the run that was never stopped, and return its stdout."""
    code, stdout, stderr = invoke("train", "mine.yaml", "--output-dir", str(output_dir), *arguments)
    assert code == 0, stderr
    assert adapter(output_dir) == adapter(whole)
    return stdout


# ---- The folder and the recipe ----


def test_the_same_command_goes_on(interrupted, whole):
    """Otherwise every refusal below could have the wrong reason."""
    assert f"going on from step {CUT_AT}: out/checkpoint-{CUT_AT}" in goes_on(whole)
    assert summary(OUT)["resumed_from_step"] == CUT_AT and logged(OUT) == logged(whole)


def test_resume_never_refuses_a_folder_that_holds_a_run(interrupted):
    assert refused(*TRAIN, "--resume", "never").startswith("--resume never: 'out' holds an unfinished run.")


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("train.learning_rate=0.002", "train.learning_rate: 0.001 before, 0.002 now"),
        ("neftune.noise_alpha=6", "neftune.noise_alpha: 5.0 before, 6.0 now"),
        ("data.max_length=200", "data.max_length: 250 before, 200 now"),
    ],
)
def test_a_recipe_that_learns_something_else_is_refused(interrupted, override, difference):
    first, second, *_ = refused(*TRAIN, override).splitlines()
    assert (first, second) == ("--output-dir: 'out' holds a run that learns something else:", f"  {difference}")


def test_a_run_is_carried_out_otherwise_after_an_interruption(interrupted, whole):
    goes_on(whole, "machine.logging_steps=3", "machine.save_steps=0", "machine.threads=1", "machine.eval_answers=2")
    assert [step for step in logged(OUT) if step > CUT_AT] == [*range(CUT_AT + 3, STEPS + 1, 3)]
    assert sound_steps(OUT) == [CUT_AT, STEPS]


def test_other_micro_batches_and_no_held_out_rows_after_an_interruption(interrupted):
    machine = ("machine.per_device_train_batch_size=2", "machine.eval_answers=auto", "machine.eval_steps=auto")
    code, stdout, stderr = invoke(*TRAIN, *machine, "data.eval_path=null")
    assert (code, stderr) == (0, "")
    assert f"going on from step {CUT_AT}" in stdout and "held-out loss" not in stdout
    assert summary(OUT)["steps"] == STEPS and list(summary(OUT)["before"]) == ["clean_train_loss"]


@pytest.mark.parametrize(("source", "step"), [("out", CUT_AT), (f"out/checkpoint-{2 * SAVE_STEPS}", 2 * SAVE_STEPS)])
def test_going_on_from_elsewhere_in_a_new_folder(interrupted, whole, source, step):
    before = contents(OUT)
    assert f"going on from step {step}" in goes_on(whole, "--resume", source, output_dir=NEW)
    assert summary(NEW)["resumed_from_step"] == step
    assert contents(OUT) == before


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere", "--resume: must be auto, never or a folder, and there is no folder 'nowhere'."),
        ("mine.yaml", "--resume: must be auto, never or a folder, and there is no folder 'mine.yaml'."),
        ("empty", "--resume: 'empty' holds no sound checkpoint."),
        ("damaged", "--resume: 'damaged' holds no sound checkpoint."),
        ("damaged/checkpoint-10", "damaged/checkpoint-10: not a checkpoint that can be used: optimizer.pt has another"),
    ],
)
def test_a_place_to_go_on_from_that_holds_nothing_is_refused(interrupted, source, said):
    Path("empty").mkdir()
    for path in sorted(OUT.glob("checkpoint-*")):
        with (copied(path, Path("damaged", path.name)) / "optimizer.pt").open("r+b") as file:
            file.seek(3000)
            file.write(b"damage")
    message = refused("train", "mine.yaml", "--output-dir", "new", "--resume", source)
    assert message.startswith(said)


def test_a_finished_run_is_left_as_it_is(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(copied(whole.parent, tmp_path))
    before = contents(".")
    code, stdout, stderr = invoke(*TRAIN)
    assert (code, stderr) == (0, "")
    assert stdout == "out: this run is finished; nothing is left to do\n"
    assert contents(".") == before
    assert json.loads(invoke(*TRAIN, "--json")[1]) == summary(OUT)


def test_a_run_that_another_process_finishes_meanwhile_is_left_as_it_is(interrupted, whole, monkeypatch):
    def meanwhile(*arguments, **keywords):
        shutil.rmtree(OUT)
        shutil.copytree(whole, OUT)
        return data_of(*arguments, **keywords)

    monkeypatch.setattr("qlora_neft.runner.run.data_of", meanwhile)
    assert "this run is finished" in goes_on(whole)
    assert contents(OUT) == contents(whole)


def test_a_folder_with_the_run_file_of_another_program_is_refused(interrupted):
    shutil.rmtree(OUT)
    OUT.mkdir()
    for content in ('{"id": 7}', "[]", '{"recipe": null}'):
        (OUT / "run.json").write_text(content)
        assert "is not empty, and nothing in it may be lost" in refused(*TRAIN)


# ---- The data ----


def test_data_that_vanished_is_named_and_may_be_put_back(interrupted, whole):
    Path("train.jsonl").rename("elsewhere.jsonl")
    assert refused(*TRAIN).startswith("data.path: no file at 'train.jsonl'.")
    Path("elsewhere.jsonl").rename("train.jsonl")
    goes_on(whole)


def test_data_of_another_content_is_refused(interrupted):
    path = Path("train.jsonl")
    path.write_text(path.read_text().replace("Repeat 3", "Repeat 4"))
    assert refused(*TRAIN).startswith("data.path: the rows are not those this run began with.")


def test_weights_of_another_content_are_refused(llama, interrupted):
    other = copied(llama, Path("llama"))
    recipe, run_file = Path("mine.yaml"), OUT / "run.json"
    for path in (recipe, run_file, *OUT.glob("checkpoint-*/manifest.json")):  # as if it had always been that folder
        path.write_text(path.read_text().replace(str(llama), "llama"))
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4001] ^= 0x40  # a high bit of one float
    weights.write_bytes(content)
    assert refused(*TRAIN).startswith("model.name_or_path: the weights are not those this run began with.")


# ---- Disks ----


@pytest.fixture
def disk(llama, tmp_path, monkeypatch):
    """A current directory with a recipe and data; a call with a size in bytes mounts an empty disk at ``disk``."""
    monkeypatch.chdir(make_workplace(tmp_path, llama))
    Path("disk").mkdir()

    def mount(*options: str) -> None:
        done = subprocess.run(["mount", *options, "disk"], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")

    if os.geteuid() != 0:
        pytest.skip("a small disk can be mounted by root alone")
    mount("-t", "tmpfs", "-o", "size=4k", "tmpfs")
    yield lambda options: mount("-o", f"remount,{options}")
    subprocess.run(["umount", "--lazy", "disk"], check=True)


def size(*paths: Path) -> int:
    """Return the size of files on a disk, in whole pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in paths if path.is_file())


@pytest.mark.parametrize("full", ["from the beginning", "at a checkpoint", "at the end"])
def test_a_disk_that_is_full(disk, whole, full):
    out = Path("disk/out")
    records = size(*(whole / name for name in ("run.json", "recipe.yaml", "data_report.json", "lengths.png")))
    checkpoint = size(*(whole / f"checkpoint-{STEPS}").iterdir())
    room = {
        "from the beginning": 0,
        "at a checkpoint": records + 2 * checkpoint + checkpoint // 2,
        "at the end": records + size(whole / "metrics.jsonl") + size(whole / "adapter_model.safetensors") // 2,
    }[full]
    machine = ["machine.save_steps=0"] if full == "at the end" else []
    disk(f"size={room + 8192}")
    code, _, stderr = invoke("train", "mine.yaml", "--output-dir", str(out), *machine)
    assert code == 1
    assert stderr.startswith("failed: ") and "No space left on device" in stderr and stderr.count("\n") == 1
    assert "run the same command again" in stderr
    named = re.search(r"The checkpoint of step (\d+) is sound", stderr)
    assert sound_steps(out)[-1:] == ([int(named[1])] if named else [])
    assert bool(named) == (full == "at a checkpoint")
    disk("size=16m")
    stdout = goes_on(whole, *machine, output_dir=out)
    assert summary(out)["resumed_from_step"] == (int(named[1]) if named else None)
    assert "damaged" not in stdout and logged(out) == logged(whole)


def test_a_disk_that_is_read_only(disk, llama, whole):
    disk("size=16m")
    shutil.copytree(cut_off(llama) / "out", "disk/out")
    disk("ro")
    for name in ("new", "deep/new", "out"):
        message = refused("train", "mine.yaml", "--output-dir", f"disk/{name}")
        assert message.startswith(f"--output-dir: 'disk/{name}' cannot be made: ")
        assert message.endswith("disk/out' cannot be written to." if name == "out" else "disk' cannot be written to.")
    disk("rw")
    goes_on(whole, output_dir=Path("disk/out"))


WRITING = {  # verbs that write, each into the disk
    "preview": ("preview", "mine.yaml", "--output-dir", "disk/seen"),
    "fit": ("fit", "demo", "--picture", "disk/memory.png"),
    "cp": ("cp", "demo", "disk/own.yaml"),
    "gguf": ("gguf", "whole", "disk/adapter.gguf"),
    "merge": ("merge", "whole", "disk/merged", "--no-proof"),
    "generate": ("generate", "whole", "Hi", "--max-new-tokens", "2", "--output", "disk/answers.jsonl"),
    "export": ("export", "whole", "--repo-id", "a/x", "--base-id", "a/b", "--dry-run", "--output", "disk/published"),
    "report": ("report", "whole", "--output", "disk/report.html"),
    "sweep": ("sweep", "mine.yaml", "neftune.noise_alpha=0,5", "--seeds", "1", "--output-dir", "disk/sweep"),
}


@pytest.mark.parametrize("verb", WRITING)
def test_a_verb_whose_disk_fails_says_so_and_leaves_nothing_half_written(disk, whole, verb):
    Path("whole").symlink_to(whole)
    disk("ro")
    code, _, stderr = invoke(*WRITING[verb])
    assert code in (1, 2) and stderr.startswith(("error: ", "failed: ")), stderr
    assert "disk" in stderr and ("cannot be written" in stderr or "Read-only file system" in stderr), stderr
    disk("rw,size=4k")  # one page, which is taken
    Path("disk/other").write_text("x" * 4096)
    code, _, stderr = invoke(*WRITING[verb])
    assert code in (1, 2) and stderr.splitlines()[-1].startswith(("error: ", "failed: ")), stderr
    assert "disk" in stderr and ("No space left on device" in stderr or "free" in stderr), stderr
    left = [path for path in Path("disk").rglob("*") if path.is_file() and path.name != "other"]
    assert all(path.stat().st_size == 0 and path.name == ".run.lock" for path in left), left


def test_a_mirror_that_cannot_be_written_to_is_refused_before_training(disk):
    disk("ro")
    message = refused(*TRAIN, "machine.mirror_dir=disk/mirror")
    assert message.startswith("machine.mirror_dir: ") and "disk' cannot be written to." in message
    assert not OUT.exists()
