"""A resume goes on with what the run began with, wherever it lies, or says what has changed; damage costs no work."""

from __future__ import annotations

import json
import os
import shutil
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch
from command_line import (
    CUT_AT,
    SAVE_STEPS,
    STEPS,
    TRAIN,
    adapter,
    copied,
    cut,
    cut_off,
    invoke,
    logged,
    make_workplace,
    never_stopped,
    refused,
)
from safetensors.torch import load_file, save_file

from qlora_neft import load_recipe
from qlora_neft.base.config import load_tokenizer
from qlora_neft.data.store import cache_root
from qlora_neft.errors import UserInputError
from qlora_neft.files import sha256_of_file
from qlora_neft.run_folder.contents import problems
from qlora_neft.run_folder.lock import LOCK, run_lock
from qlora_neft.runner.build import Run, data_of
from qlora_neft.runner.identity import with_first_ranks_date

OUT = Path("out")


@pytest.fixture
def interrupted(llama, tmp_path, monkeypatch):
    """A current directory with a recipe, data, the base as ``base``, and the folder ``out`` of an interrupted run."""
    monkeypatch.chdir(copied(cut_off(llama), tmp_path))
    copied(llama, Path("base"))
    return tmp_path


MOVED = "model.name_or_path=base"
DRY = (*TRAIN, "--dry-run", MOVED)


# ---- What has changed ----


def of_config(**changes):
    def change(base):
        path = base / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def of_tokenizer(change_it):
    def change(base):
        path = base / "tokenizer.json"
        content = json.loads(path.read_text())
        change_it(content)
        path.write_text(json.dumps(content))

    return change


def swap_two_ids(content):
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def another_end(base):
    path = base / "tokenizer_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "eos_token": "<s>"}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (of_config(rms_norm_eps=0.1), "config.json is not the one this run began with (rms_norm_eps: "),
        (of_config(hidden_act="gelu"), 'hidden_act: "silu" before, "gelu" now'),
        (of_config(rope_theta=5e5), "rope_theta: "),
        (of_tokenizer(swap_two_ids), "the tokenizer is not the one this run began with (another vocabulary)"),
        (
            of_tokenizer(lambda content: content.update(normalizer={"type": "Lowercase"})),
            "the tokenizer is not the one this run began with (another normalizer)",
        ),
        (another_end, 'eos_token: "</s>" before, "<s>" now'),
    ],
)
def test_a_base_that_has_changed_is_refused_by_what_has(interrupted, change, said):
    assert invoke(*DRY)[0] == 0  # the same bytes, elsewhere
    change(Path("base"))
    message = refused(*DRY)
    assert message.startswith("model.name_or_path: ") and said in message
    assert "Put " in message and "new --output-dir" in message


def test_the_same_bytes_elsewhere_go_on(interrupted, llama):
    Path("moved").mkdir()
    Path("train.jsonl").rename("moved/rows.jsonl")
    code, stdout, stderr = invoke(*TRAIN, MOVED, "data.path=moved/rows.jsonl")
    assert (code, stderr) == (0, "") and f"going on from step {CUT_AT}" in stdout
    assert f'model.name_or_path: "{llama}" before, "base" now; the content is the same' in stdout.replace("\n", " ")
    assert adapter(OUT) == adapter(never_stopped(llama))
    # And the finished run is found finished from either place.
    assert "nothing is left to do" in invoke(*TRAIN, "data.path=moved/rows.jsonl")[1]
    Path("moved/rows.jsonl").write_text('{"instruction": "other", "output": "rows"}\n' * 9)
    assert refused(*TRAIN, "data.path=moved/rows.jsonl", "data.max_duplicate_fraction=1").startswith(
        "data.path: the rows"
    )


DATED = (
    "{{ 'Today is ' + strftime_now('%d %b %Y') }}{% for m in messages %}<|{{ m.role }}|>{{ m.content + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_template_of_another_day_or_text_is_no_other_run_or_is_refused(llama, tmp_path, monkeypatch):
    """The date is that of the run's beginning, also without a cache; another text is named by the same command."""
    monkeypatch.chdir(make_workplace(tmp_path / "place", Path("base")))
    template = copied(llama, Path("base")) / "chat_template.jinja"
    template.write_text(DATED)
    words = (*TRAIN, "data.prompt_template=chat")
    cut(OUT, words[-1], step=2)
    before = json.loads((OUT / "run.json").read_text())["identity"]
    for path in cache_root().iterdir():
        path.rename(tmp_path / path.name)

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(days=1)

    monkeypatch.setattr("qlora_neft.data.prepare.datetime", Tomorrow)
    code, _, stderr = invoke(*words, "--dry-run")
    assert code == 0, stderr
    for changed in (DATED.replace("Today is", "It is"), DATED.replace("endfor %}", "endfor %} ")):
        template.write_text(changed)
        said = "data.prompt_template: the tokenizer's chat template is not the one this run began with."
        assert refused(*words).startswith(said)
    assert json.loads((OUT / "run.json").read_text())["identity"] == before


def test_all_ranks_write_the_date_of_the_first(llama, tmp_path, monkeypatch):
    """Processes that begin on two sides of midnight."""
    tokenizer = load_tokenizer(str(llama))
    tokenizer.chat_template = DATED
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "Hi", "output": "Yo"}) + "\n")
    stated = ["data.eval_path=null", "data.prompt_template=chat", "machine.eval_answers=auto"]
    recipe = load_recipe("demo", [f"data.path={rows}", *stated])
    first, second = datetime(2026, 3, 1, 23, 59, 59), datetime(2026, 3, 2)
    theirs = data_of(recipe, tokenizer, now=second)
    of_rank = Run(recipe, OUT, None, 0.0, None, None, tokenizer, theirs, None)
    assert with_first_ranks_date(of_rank) is of_rank  # one process
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(
        torch.distributed, "broadcast_object_list", lambda found: found.__setitem__(0, first.isoformat())
    )
    agreed = with_first_ranks_date(of_rank)
    expected = data_of(recipe, tokenizer, now=first)
    assert agreed.data.now == agreed.identity.now == first.isoformat()
    assert agreed.data.train[0] == expected.train[0] != theirs.train[0]


def test_every_path_may_begin_at_home(interrupted, monkeypatch):
    monkeypatch.setenv("HOME", str(interrupted))
    Path("own.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}")
    at_home = ("model.name_or_path=~/base", "data.path=~/train.jsonl", "data.eval_path=~/held.jsonl")
    also = ("data.prompt_template=~/own.jinja", 'data.mixture=[{path: "~/held.jsonl"}]', "machine.mirror_dir=~/drive")
    words = ("train", "~/mine.yaml", "--output-dir=~/new", "--dry-run", *at_home, *also)
    monkeypatch.chdir("base")  # nothing is found from here otherwise
    code, _, stderr = invoke(*words)
    assert (code, stderr) == (0, "")
    assert invoke("cp", "demo", "~/a.yaml")[0] == invoke("validate", "~/a.yaml")[0] == 0
    assert invoke("train", "~/mine.yaml", "--output-dir=~/out", "--dry-run", *at_home)[0] == 0  # found, and compared
    assert (interrupted / "a.yaml").exists() and not list(Path().glob("~*"))


def test_files_have_the_mode_of_every_other(llama):
    umask = os.umask(0o022)
    os.umask(umask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in never_stopped(llama).rglob("*") if path.is_file()}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask) and len(modes) > 15


# ---- A checkpoint that says something else ----


def rewritten(name, content):
    """Replaces a file; bytes as they are, other values as JSON or by torch."""

    def damage(folder):
        path = folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif name.endswith(".pt"):
            torch.save(content, path)
        else:
            path.write_text(json.dumps(content))

    return damage


def changed(name, **changes):
    def damage(folder):
        path = folder / name
        if name.endswith(".pt"):
            torch.save({**torch.load(path, weights_only=True), **changes}, path)
        else:
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def moments(change):
    def damage(folder):
        state = torch.load(folder / "optimizer.pt", weights_only=True)
        for entry in state["state"].values():
            change(entry)
        torch.save(state, folder / "optimizer.pt")

    return damage


def weights(value):
    def damage(folder):
        path = folder / "adapter_model.safetensors"
        save_file({name: torch.full_like(tensor, value) for name, tensor in load_file(path).items()}, path)

    return damage


class Pickled:
    """What no checkpoint may bring along."""


DAMAGES = {
    "state empty": rewritten("trainer_state.json", b""),
    "state a list": rewritten("trainer_state.json", []),
    "state of another step": changed("trainer_state.json", global_step=CUT_AT + 1),
    "state edited": changed("trainer_state.json", log_history="none"),
    "state of another program": changed("trainer_state.json", unknown=1),
    "progress empty": rewritten("progress.json", b""),
    "progress without counters": rewritten("progress.json", {}),
    "progress edited": changed("progress.json", tokens_seen="many"),
    "a split of nothing": changed("progress.json", split=[0, None]),
    "scheduler of zero bytes": rewritten("scheduler.pt", bytes(1400)),
    "scheduler of zeros": changed("scheduler.pt", last_epoch=0, _step_count=0, _last_lr=[0.0, 0.0]),
    "scheduler of another kind": rewritten("scheduler.pt", [1]),
    "optimizer pickled": rewritten("optimizer.pt", Pickled()),
    "optimizer of nothing": rewritten("optimizer.pt", {"state": {}, "param_groups": []}),
    "optimizer of another step": moments(lambda entry: entry.update(step=torch.tensor(1.0))),
    "optimizer not finite": moments(lambda entry: entry.update({k: v * float("nan") for k, v in entry.items()})),
    "scaler of nothing": rewritten("scaler.pt", {}),
    "scaler of zeros": rewritten("scaler.pt", {"scale": 0.0, "growth_factor": 0, "_growth_tracker": 0}),
    "weights of zeros": weights(0.0),
    "weights not finite": weights(float("inf")),
    "weights empty": rewritten("adapter_model.safetensors", b""),
    "configuration empty": rewritten("adapter_config.json", {}),
    "scheduler gone": lambda folder: (folder / "scheduler.pt").unlink(),
    "state gone": lambda folder: (folder / "trainer_state.json").unlink(),
}


def resealed(folder):
    """A checkpoint whose manifest is that of its files as they are."""
    manifest = json.loads((folder / "manifest.json").read_text())
    names = [path.name for path in folder.iterdir() if path.name not in ("manifest.json", "rng_state.pth")]
    manifest["files"] = {
        name: {"sha256": sha256_of_file(folder / name), "bytes": (folder / name).stat().st_size} for name in names
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_checkpoint_that_cannot_be_gone_on_from_is_known(llama, tmp_path, damage):
    folder = copied(cut_off(llama) / "out" / f"checkpoint-{CUT_AT}", tmp_path / f"checkpoint-{CUT_AT}")
    assert problems(folder, CUT_AT) == []
    damage(folder)
    [problem, *_] = problems(folder, CUT_AT)
    assert problem.split()[0] in {path.name for path in (cut_off(llama) / "out" / f"checkpoint-{CUT_AT}").iterdir()} | {
        "scaler.pt"
    }


def test_it_is_passed_over_with_a_line(interrupted, llama):
    newest = OUT / f"checkpoint-{CUT_AT}"
    changed("trainer_state.json", global_step=CUT_AT - 1)(newest)
    resealed(newest)
    code, stdout, stderr = invoke(*TRAIN)
    assert (code, stderr) == (0, "")
    assert f"{newest.name} is damaged and skipped: trainer_state.json is of step {CUT_AT - 1}" in stdout
    assert f"going on from step {CUT_AT - CUT_AT % SAVE_STEPS}" in stdout
    assert adapter(OUT) == adapter(never_stopped(llama))


# ---- Records that are damaged, and results that are gone ----


@pytest.fixture
def finished(llama, tmp_path, monkeypatch):
    """A current directory with a recipe, data, and the folder ``out`` of a finished run."""
    monkeypatch.chdir(copied(never_stopped(llama).parent, tmp_path))
    return tmp_path


def flip(path, place=-40):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_finished_run_whose_result_is_gone_makes_it_again(finished, llama):
    expected, lines = adapter(OUT), logged(OUT)
    (OUT / "adapter_model.safetensors").unlink()
    flip(OUT / "adapter_config.json")
    (OUT / "run.json").write_bytes(bytes(900))
    code, stdout, stderr = invoke(*TRAIN)
    assert (code, stderr) == (0, "")
    assert "run.json is damaged; what checkpoint-" in stdout
    assert "adapter_model.safetensors is missing" in stdout and "adapter_config.json has changed" in stdout
    assert f"made again from checkpoint-{STEPS}" in stdout
    assert adapter(OUT) == expected and logged(OUT) == lines
    assert (OUT / "adapter_config.json.changed").exists()  # it may have been changed on purpose
    assert invoke(*TRAIN)[1] == "out: this run is finished; nothing is left to do\n"
    # Without a checkpoint there is nothing to make it from.
    for path in OUT.glob("checkpoint-*"):
        shutil.rmtree(path)
    flip(OUT / "adapter_model.safetensors")
    assert "no sound checkpoint to make it again from" in refused(*TRAIN)


def test_a_record_that_is_damaged_costs_no_work(interrupted, llama):
    flip(OUT / "run.json", place=60)
    with (OUT / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 9, "lo' + bytes(20) + b"\n7\n\xff\n")
    code, stdout, stderr = invoke(*TRAIN)
    assert (code, stderr) == (
        0,
        "",
    ) and f"run.json is damaged; what checkpoint-{CUT_AT} repeats of it is used" in stdout
    assert adapter(OUT) == adapter(never_stopped(llama)) and logged(OUT) == logged(never_stopped(llama))


@pytest.mark.parametrize("name", ["run.json", "summary.json", "metrics.jsonl", "recipe.yaml"])
def test_a_folder_in_the_place_of_a_record_is_named(interrupted, name):
    (OUT / name).unlink(missing_ok=True)
    (OUT / name).mkdir()
    assert refused(*TRAIN).startswith(f"out/{name}: is a folder")


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("nowhere")], ids=["folder", "link"])
def test_a_lock_that_is_no_file_is_named(tmp_path, make):
    make(tmp_path / LOCK)
    with pytest.raises(UserInputError, match=r"\.run\.lock is not a file"), run_lock(tmp_path):
        pass
