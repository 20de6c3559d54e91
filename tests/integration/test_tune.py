"""A search for the learning rate, on a tiny model: interrupted, resumed, asked again."""

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
import yaml
from command_line import contents, invoke, make_workplace, refused, summary, until

from qlora_neft import load_recipe
from qlora_neft.compare.asking import Asking
from qlora_neft.compare.folder import recipe_of
from qlora_neft.compare.measures import held_out_rows
from qlora_neft.compare.one_run import train_and_measure
from qlora_neft.compare.queue import DIVERGED, Outcome
from qlora_neft.compare.records import read_row_losses
from qlora_neft.errors import Diverged

NAMES = [f"learning_rate_{rate}-seed_3" for rate in ("1e-4", "1e-2", "1e30")]
WORDS = ("tune", "mine.yaml", "train.keep=best", "train.max_bad_steps=1", "--rates", "1e-4,1e-2,1e30", "--steps", "4")


class InThisProcess:
    """A `Runner` that trains and measures as `one_run` does; ``stop_in`` gets a signal."""

    stop_in = None

    def __init__(self, output_dir, measures, parallel):
        self.output_dir, self.measures, self.stopped = output_dir, measures, False

    def train(self, name, tell):
        if name == self.stop_in:
            os.kill(os.getpid(), signal.SIGINT)
            until(lambda: self.stopped, self)
            return Outcome(name, 130, "interrupted")
        try:
            with contextlib.redirect_stdout(None):
                train_and_measure(self.output_dir / name, recipe_of(self.output_dir, name), self.measures)
        except Diverged as error:
            return Outcome(name, DIVERGED, str(error))
        return Outcome(name, 0)

    def poll(self):
        return None

    def stop(self, number):
        self.stopped = True

    def end(self):
        pass


@pytest.fixture(scope="module")
def searched(llama, tmp_path_factory):
    """A workplace with a search that was interrupted, and the two answers."""
    folder = make_workplace(tmp_path_factory.mktemp("tune") / "workplace", llama)
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlora_neft.cli.tune.runner_of", InThisProcess)
        patch.setattr(InThisProcess, "stop_in", NAMES[1])
        interrupted = invoke(*WORDS)
        patch.setattr(InThisProcess, "stop_in", None)
        return folder, interrupted, invoke(*WORDS, "--json")


def test_an_interrupted_search_says_how_to_go_on(searched):
    code, stdout, stderr = searched[1]
    assert code == 130 and "1 of 3 runs are finished" in stderr
    assert stderr.strip().endswith("--output-dir tune-mine --rates 1e-4,1e-2,1e30 --steps 4")
    before = stdout.split("1/3")[0]
    assert "budget: 3 rates x 1 seed x 4 steps" in before and "recipe's own run of 30 steps" in before
    assert "off in the search: train.keep: best" in before


def test_the_search_finds_a_rate(searched):
    folder, _, (code, stdout, stderr) = searched
    assert code == 0, stderr
    found = json.loads(stdout)
    assert "1 of 3 runs are finished" in stderr  # what was done stays done
    losses = [row["loss"] for row in found["rates"]]
    assert [row["rate"] for row in found["rates"]] == [1e-4, 1e-2, 1e30]
    assert losses[:2] == [summary(folder / "tune-mine" / name)["after"]["held_out_loss"] for name in NAMES[:2]]
    assert losses[1] < losses[0] < found["untrained_loss"]
    assert losses[2] is None and found["rates"][2]["verdict"] == "diverged"
    assert (found["rate"], found["how"]) == (1e-2, "grid")
    assert json.loads((folder / "tune-mine/tune.json").read_text()) == found
    assert (folder / "tune-mine/curve.png").read_bytes().startswith(b"\x89PNG")


def test_its_runs_differ_in_the_rate_alone_and_span_the_schedule(searched):
    recipes = [load_recipe(recipe_of(searched[0] / "tune-mine", name)).to_dict() for name in NAMES]
    rates = [recipe["train"].pop("learning_rate") for recipe in recipes]
    assert rates == [1e-4, 1e-2, 1e30] and recipes[0] == recipes[1] == recipes[2]
    assert (recipes[0]["train"]["max_steps"], recipes[0]["train"]["keep"]) == (4, "last")
    run = searched[0] / "tune-mine" / NAMES[0]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}
    assert logged[max(logged)] < 0.5e-4  # linear, to 0 at step 4 and not at 30


def test_losses_of_rows_are_those_of_the_measure(searched, monkeypatch):
    monkeypatch.chdir(searched[0])
    run = searched[0] / "tune-mine" / NAMES[1]
    kept = read_row_losses(run)
    assert sum(kept.sums) / sum(kept.counts) == pytest.approx(summary(run)["after"]["held_out_loss"], rel=1e-5)
    before = (run / "row_losses.json").read_bytes()
    held_out_rows(run, Asking())  # loads the adapter anew, and writes the same file
    again = read_row_losses(run)
    assert (again.rows, again.counts) == (kept.rows, kept.counts) and again.sums == pytest.approx(kept.sums, rel=1e-4)
    (run / "row_losses.json").write_bytes(before)


def test_the_copy_trains_with_the_rate(searched):
    copy = load_recipe(searched[0] / "tune-mine/tuned.yaml")
    with contextlib.chdir(searched[0]):
        assert copy == load_recipe("mine.yaml", [*WORDS[2:4], "train.learning_rate=1e-2"])


def test_asked_again_it_says_the_same_and_leaves_an_edited_copy(searched, monkeypatch):
    monkeypatch.chdir(searched[0])
    monkeypatch.setattr("qlora_neft.cli.tune.runner_of", InThisProcess)
    before = contents("tune-mine")
    code, stdout, _ = invoke(*WORDS, "--json")
    assert code == 0 and stdout == searched[2][1]
    assert contents("tune-mine") == before
    copy = Path("tune-mine/tuned.yaml")
    copy.write_text("# mine\n" + copy.read_text())
    _, stdout, _ = invoke(*WORDS)
    assert "--force replaces it" in stdout and copy.read_text().startswith("# mine\n")
    invoke(*WORDS, "--force")
    assert not copy.read_text().startswith("# mine\n")


def test_a_search_of_other_steps_is_another(searched, monkeypatch):
    monkeypatch.chdir(searched[0])
    assert "train.max_steps: 4 before, 5 now" in refused(*WORDS[:-1], "5", "--dry-run")


def test_a_recipe_that_keeps_the_best_and_holds_out_nothing_is_searched_on_a_share(searched, tmp_path, monkeypatch):
    monkeypatch.chdir(searched[0])
    recipe = yaml.safe_load(Path("mine.yaml").read_text())
    del recipe["data"]["eval_path"], recipe["machine"]["eval_steps"], recipe["machine"]["eval_answers"]
    recipe["train"] |= {"keep": "best", "warmup_steps": 6, "lr_scheduler_type": "cosine"}
    (tmp_path / "best.yaml").write_text(yaml.safe_dump(recipe))
    code, stdout, stderr = invoke("tune", str(tmp_path / "best.yaml"), "--dry-run", "--steps", "10", "--json")
    assert code == 0, stderr
    found = json.loads(stdout)
    assert len(found["runs"]) == 5 and any(line.startswith("held out: 5% of the rows") for line in found["decides"])
