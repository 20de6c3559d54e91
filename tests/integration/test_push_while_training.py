"""Checkpoints go to a branch on the Hub while the run goes on, which a Hub that fails does not harm."""

import contextlib
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import (
    STEPS,
    TRAIN,
    adapter,
    cut,
    cut_off,
    invoke,
    make_workplace,
    never_stopped,
    refused,
)
from hub_server import HubServer
from transformers import TrainerControl

from qlora_neft.export.hub.failures import Patience
from qlora_neft.recipe import load_recipe
from qlora_neft.run_folder.checkpoints import BEST
from qlora_neft.runner.push import ready_to_push

TOKEN = "hf_annwritessecretly"
TO = ("--push-to", "ann/tuned")
SAVED = [f"step {step}" for step in range(10, STEPS + 1, 10)]
RUN = (*TRAIN, "machine.save_steps=10")


@pytest.fixture
def hub(llama, tmp_path, monkeypatch):
    """A Hub that holds the base; the current directory is a workplace whose recipe names it."""
    with HubServer() as hub:
        hub.add_user("ann", write=TOKEN, read="hf_annreadsonly")
        hub.add_user("bob", write="hf_bobwrites")
        hub.use(monkeypatch, TOKEN, tmp_path / "cache")
        base = hub.add_repo("ann/base", llama).at("main").oid
        workplace = make_workplace(tmp_path / "work", llama)
        recipe = (workplace / "mine.yaml").read_text()
        (workplace / "mine.yaml").write_text(recipe.replace(str(llama), "ann/base"))
        with contextlib.chdir(workplace):
            hub.base = base
            yield hub


def test_every_checkpoint_is_a_commit_with_an_adapter_that_can_be_used(hub, llama, tmp_path):
    code, stdout, stderr = invoke(*RUN, *TO)
    assert code == 0, stderr

    repo = hub.repo("ann/tuned")
    titles = [commit.title for commit in repo.pushes("checkpoints")]
    assert set(titles) <= set(SAVED) and titles == sorted(set(titles), key=SAVED.index) and titles[-1] == SAVED[-1]
    assert repo.private and repo.pushes("main") == []
    files = repo.files("checkpoints")
    assert files["adapter_model.safetensors"] == adapter("out") == adapter(never_stopped(llama))
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("ann/base", hub.base)
    assert {"README.md", "recipe.yaml", "tokenizer.json", "tokenizer_config.json"} <= files.keys()
    assert not any(name.endswith((".pt", ".bin", ".pth", ".pkl")) or "optimizer" in name for name in files)
    assert "checkpoints are pushed to ann/tuned, branch checkpoints" in stdout
    at_storage = [str(sent.headers).encode() + sent.body for sent in hub.requests if sent.origin == "cdn"]
    everything = b"".join([*files.values(), *at_storage, stdout.encode(), stderr.encode()])
    assert at_storage and TOKEN.encode() not in everything


def test_a_hub_that_refuses_later_harms_nothing_and_is_told_once(hub, llama):
    hub.fail("POST", "/commit/", status=403, times=None, message="Private repository storage limit reached")
    code, stdout, stderr = invoke(*RUN, *TO)
    assert code == 0, stderr
    assert adapter("out") == adapter(never_stopped(llama))
    assert hub.repo("ann/tuned").pushes("checkpoints") == []
    assert stdout.count("no room left") == 1 and "Training goes on" in stdout and "not everything is there" in stdout


def test_a_resumed_run_may_begin_to_push_every_second_checkpoint(hub, llama):
    cut(Path("out"))  # a run that pushes nothing, cut off
    code, _, stderr = invoke(*RUN, *TO, "--push-every", "2")
    assert code == 0, stderr
    assert adapter("out") == adapter(never_stopped(llama))
    assert [commit.title for commit in hub.repo("ann/tuned").pushes("checkpoints")] == [SAVED[2]]  # the first is over


# ---- Refused before a weight is loaded ----


def never_asked_for_weights(hub):
    return not hub.sent("GET", "ann/base/.*safetensors") and not hub.sent("HEAD", "ann/base/.*safetensors")


@pytest.mark.parametrize(
    ("token", "repo_id", "said"),
    [
        (None, "ann/tuned", "there is no token for the Hub"),
        ("hf_nobodys", "ann/tuned", "does not accept the token of the environment variable HF_TOKEN"),
        ("hf_annreadsonly", "ann/tuned", "may not write there"),
        ("hf_annreadsonly", "ann/base", "may not write there"),
        (TOKEN, "bob/tuned", "may not write there"),
        (TOKEN, "tuned", "must be owner/name"),
        (TOKEN, "ann/tu..ned", "not a name for a repository"),
    ],
)
def test_a_push_that_cannot_succeed_is_refused_first(hub, monkeypatch, tmp_path, token, repo_id, said):
    hub.use(monkeypatch, token, tmp_path / "cache")
    message = refused(*TRAIN, "--push-to", repo_id)
    assert said in message
    assert (token or TOKEN) not in message
    assert never_asked_for_weights(hub) and (repo_id == "ann/base" or repo_id not in hub.repos)


def test_a_local_base_is_refused_with_the_way_out(hub, llama):
    message = refused(*TRAIN, *TO, f"model.name_or_path={llama}")
    assert "machine.push_to" in message and "--base-id" in message and hub.repos.keys() == {"ann/base"}


def test_how_often_without_where_is_refused(hub):
    assert "machine.push_every: has no effect without push_to" in refused(*TRAIN, "--push-every", "3")


# ---- The thread, with checkpoints of a run that was cut off ----


class Said(list):
    def __call__(self, line):
        self.append(line)


@pytest.fixture
def pusher(hub, llama):
    shutil.copytree(cut_off(llama) / "out", "out")
    recipe = load_recipe("mine.yaml", ["machine.push_to=ann/tuned"])
    return ready_to_push(recipe, Path("out"), Said(), Patience(attempts=2, sleep=lambda _: None))


def test_of_several_that_wait_only_the_newest_is_pushed(hub, pusher):
    newest = max(Path("out").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    fault = hub.fail("GET", "/models/ann/tuned/revision", stall=0.5, status=503)  # the first is under way
    pusher.push(newest)
    until(lambda: fault.times == 0)
    for _ in range(3):
        pusher.push(newest.with_name("checkpoint-of-another-time"))
    pusher.push(newest)
    assert pusher.close(30)
    assert [commit.title for commit in hub.repo("ann/tuned").pushes("checkpoints")] == [f"step {newest.name[11:]}"]


def test_the_best_weights_are_pushed_where_they_are_the_result(hub, pusher):
    checkpoint = next(Path("out").glob("checkpoint-*"))
    best = checkpoint.with_name(BEST)
    shutil.copytree(checkpoint, best)
    at = {"output_dir": "out", "keep": "best"}
    pusher.on_save(SimpleNamespace(**at), SimpleNamespace(global_step=99), TrainerControl())
    assert pusher.close(30)
    pusher.on_train_end(SimpleNamespace(**at), SimpleNamespace(global_step=99), TrainerControl())  # the same: no commit
    assert pusher.close(30)
    titles = [commit.title for commit in hub.repo("ann/tuned").pushes("checkpoints")]
    assert titles == [f"step {checkpoint.name[11:]}"]


def test_what_failed_is_pushed_at_the_end(hub, pusher):
    checkpoint = next(Path("out").glob("checkpoint-*"))
    hub.fail("POST", "/commit/", status=502, html=True, times=2)
    pusher.push(checkpoint)
    until(lambda: len(pusher.say) == 2)
    assert pusher.close(30)
    assert len(hub.repo("ann/tuned").pushes("checkpoints")) == 1
    assert "answers 502" in pusher.say[1] and "Training goes on" in pusher.say[1]


def test_the_end_of_a_run_does_not_wait_for_ever(hub, pusher):
    hub.fail("POST", "/commit/", stall=2, drop=True, times=None)
    pusher.push(next(Path("out").glob("checkpoint-*")))
    started = time.monotonic()
    assert not pusher.close(0.2)
    assert time.monotonic() - started < 1


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
