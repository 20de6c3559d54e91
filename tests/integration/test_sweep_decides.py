"""A paper's recipe, its base replaced by a tiny one, ends in a decision: by held-out loss, and by a local judge."""

import contextlib
import json
from pathlib import Path

import pytest
from command_line import contents, invoke, refused, summary
from sweep_runs import InThisProcess
from tiny import save_tiny_model

from qlora_neft.compare.asking import Asking
from qlora_neft.compare.folder import is_done, is_trained
from qlora_neft.compare.measures import measure_run
from qlora_neft.compare.plan import plan_sweep
from qlora_neft.compare.queue import Outcome
from qlora_neft.compare.records import read_run

ASKED = [{"instruction": f"Say {n}", "output": f"{n}!", "generator": "somebody"} for n in range(3)]


class Measuring(InThisProcess):
    """Trains in this process, and measures."""

    def __init__(self, output_dir, measures, parallel, asking):
        super().__init__(output_dir)
        self.measures, self.asking = measures, asking

    def train(self, name, tell):
        folder = self.output_dir / name
        outcome = Outcome(name, 0) if is_trained(folder) else super().train(name, tell)
        with contextlib.redirect_stdout(None):
            measure_run(folder, self.measures, self.asking)
        return outcome


@pytest.fixture(scope="module")
def place(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decides")
    rows = [{"instruction": f"Say {n}", "input": "", "output": f"{n} " * (1 + n % 4)} for n in range(60)]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "asked.json").write_text(json.dumps(ASKED))
    save_tiny_model(folder / "judge", max_position_embeddings=2048)
    return folder


@pytest.fixture
def sweep(place, llama, monkeypatch):
    """`qlora-neft sweep llama2-7b-alpaca`, short."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("qlora_neft.cli.compare.runner_of", Measuring)
    words = [
        f"model.name_or_path={llama}",
        "data.path=rows.json",
        "data.max_length=250",
        "lora.r=4",
        "train.max_steps=2",
    ]
    words += ["machine.device=cpu", "machine.precision=fp32"]
    return lambda *more: ("sweep", "llama2-7b-alpaca", *words, *more)


def test_a_recipe_without_held_out_rows_is_decided_by_a_share_it_holds_out(sweep):
    command = sweep("neftune.noise_alpha=0,15", "--seeds", "1", "--output-dir", "by-loss")
    said = ("decides: held-out loss, lower is better; with one seed no arm", "held out: 5% of the rows")
    before = contents(".")
    code, stdout, stderr = invoke(*command, "--dry-run")
    assert code == 0, stderr
    assert all(line in stdout for line in said) and contents(".") == before
    code, stdout, stderr = invoke(*command)
    assert code == 0, stderr
    assert all(line in stdout.split("1/2")[0] for line in said)  # before the first run
    results = json.loads(Path("by-loss/results.json").read_text())
    assert results["best"]["by"] == "held_out_loss" and results["best"]["leading"].startswith("noise_alpha ")
    assert results["best"]["sentence"] in Path("by-loss/sweep.md").read_text().replace("\\_", "_")
    held_out = {summary(folder)["data"]["eval"]["sha256"] for folder in Path("by-loss").glob("*-seed_*")}
    assert len(held_out) == 1  # the same rows in every run
    code, stdout, stderr = invoke(*command, "--dry-run")  # again: the share is the same, so it is the same sweep
    assert code == 0, stderr
    assert stdout.count("finished") == 2 and ", 0 tokens still to train" in stdout


def test_the_papers_protocol_is_decided_by_a_local_judge(sweep):
    command = sweep("--protocol", "paper", "--judge", "judge", "--instructions", "asked.json", "--output-dir", "paper")
    code, stdout, stderr = invoke(*command)
    assert code == 0, stderr
    assert "decides: win rate, higher is better: the best number of one run each, as in the paper" in stdout
    assert "judge judge, a local model, against somebody: compares with no published table" in stdout
    assert "held out:" not in stdout  # all rows are trained on, as the paper did
    results = json.loads(Path("paper/results.json").read_text())
    rates = {row["arm"]: row["mean"] for row in results["measures"]["alpaca.alpaca_win_rate"]["arms"]}
    assert list(rates) == [f"noise_alpha {alpha}" for alpha in (0, 5, 10, 15)]
    assert results["best"]["arm"] == max(rates, key=rates.get) and len(results["seeds"]) == 1
    made = read_run(Path("paper/noise_alpha_0-seed_0")).made("alpaca.alpaca_win_rate")
    assert made.items() > {
        "prompts": "3 instructions", "prompt_template": "alpaca", "decoding": "greedy", "repetition_penalty": 1.2,
        "max_new_tokens": 1024, "judge": "judge", "reference": "somebody",
    }.items()  # fmt: skip
    own = Asking("asked.json", judge="judge")
    assert all(is_done(folder, ["alpaca"], own) for folder in Path("paper").glob("*-seed_*"))
    assert not is_done(Path("paper/noise_alpha_0-seed_0"), ["alpaca"], Asking("asked.json", 2, judge="judge"))
    invoke("report", "paper", "--output", "paper/page.html")
    assert results["best"]["sentence"] in Path("paper/page.md").read_text().replace("\\_", "_")


def test_what_cannot_decide_is_refused_or_said(sweep):
    alphas = "neftune.noise_alpha=0,5"
    assert "--judge: --measure alpaca needs one" in refused(*sweep(alphas, "--rank-by", "alpaca"))
    assert "--judge: no effect without" in refused(*sweep(alphas, "--judge", "judge"))
    assert "Omit neftune.noise_alpha" in refused(*sweep(alphas, "--protocol", "paper"))
    assert "Omit --seeds 3" in refused(*sweep("--protocol", "paper", "--seeds", "3"))
    assert "--judge: no model configuration" in refused(
        *sweep("--protocol", "paper", "--judge", "no/judge", "--instructions", "asked.json")
    )
    code, stdout, stderr = invoke(*sweep(alphas, "data.eval_fraction=null", "--dry-run"))
    assert code == 0, stderr
    assert "decides: nothing, as there are no held-out rows (the command says so)" in stdout


def test_a_sweep_that_began_without_held_out_rows_goes_on_without(sweep, place):
    words = [word for word in sweep("neftune.noise_alpha=0,5")[2:] if "=" in word]
    plan = plan_sweep("llama2-7b-alpaca", words, seeds=3).to_dict()
    del plan["decides"]  # as an earlier version wrote it
    (place / "old").mkdir()
    (place / "old" / "sweep.json").write_text(json.dumps(plan))
    code, stdout, stderr = invoke(*sweep("neftune.noise_alpha=0,5", "--output-dir", "old", "--dry-run"))
    assert code == 0, stderr
    assert "decides: nothing" in stdout and "this sweep began without" in stdout
