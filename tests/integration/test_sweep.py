"""A sweep's runs are pairs that differ in the noise alone; what is finished stays; what fails ends no other run."""

import contextlib
import json
import signal
from pathlib import Path

import pytest
import torch
from command_line import adapter, contents, invoke, logged, make_workplace, process, refused, summary, until
from sweep_runs import WORDS, Watched, swept_in

from qlora_neft import load_recipe
from qlora_neft.compare import one_run
from qlora_neft.compare.arms import arms_by
from qlora_neft.compare.asking import Asking
from qlora_neft.compare.measures import MEASURES, measure_run
from qlora_neft.compare.plan import MEASURES as CHECKED
from qlora_neft.compare.records import read_row_losses, read_run
from qlora_neft.compare.results import results_of
from qlora_neft.errors import RunFailed, RunInterrupted, UserInputError
from qlora_neft.fit import card_of
from qlora_neft.runner.run import run

NAMES = ["noise_alpha_0-seed_3", "noise_alpha_15-seed_3", "noise_alpha_0-seed_4", "noise_alpha_15-seed_4"]


@pytest.fixture(scope="module")
def workplace(llama, tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("sweep") / "workplace", llama)


@pytest.fixture(scope="module")
def swept(workplace):
    for noted in (Watched.start, Watched.tokens, Watched.dropped):  # other files sweep as well
        noted.clear()
    results, who, _ = swept_in(workplace)
    assert who.begun == NAMES
    return workplace / "sw", results


# ---- Pairs ----


@pytest.mark.parametrize("seed", [3, 4])
def test_the_noise_is_the_only_difference_of_a_pair(swept, seed):
    without, noisy = f"noise_alpha_0-seed_{seed}", f"noise_alpha_15-seed_{seed}"
    start = Watched.start
    assert all(torch.equal(start[without][n], start[noisy][n]) for n in start[without])
    assert any(p.abs().sum() > 0 for p in start[without].values())
    assert Watched.tokens[without] == Watched.tokens[noisy] and len(Watched.tokens[without]) >= 8
    assert Watched.dropped[without] == Watched.dropped[noisy] and len(set(Watched.dropped[without])) > 4
    folder = swept[0]
    for key in ("clean_loss", "eval_loss"):
        assert logged(folder / without, key)[0] == logged(folder / noisy, key)[0]
    assert adapter(folder / without) != adapter(folder / noisy)


def test_another_seed_is_another_run(swept):
    one, other = "noise_alpha_0-seed_3", "noise_alpha_0-seed_4"
    assert any(not torch.equal(Watched.start[one][n], Watched.start[other][n]) for n in Watched.start[one])
    assert Watched.tokens[one] != Watched.tokens[other]
    assert Watched.dropped[one] != Watched.dropped[other]


def test_the_arm_without_noise_is_the_plain_run(swept, workplace, tmp_path):
    with contextlib.chdir(workplace):
        run(load_recipe("mine.yaml", ["neftune=null", "train.max_steps=8"]), tmp_path / "plain", quiet=True)
    assert adapter(tmp_path / "plain") == adapter(swept[0] / "noise_alpha_0-seed_3")


# ---- Results ----


def test_results_are_those_of_the_summaries(swept):
    folder, results = swept
    assert json.loads((folder / "results.json").read_text())["measures"].keys() == results["measures"].keys()
    losses = {name: summary(folder / name)["after"]["held_out_loss"] for name in NAMES}
    [none, noisy] = results["measures"]["held_out_loss"]["arms"]
    assert none["values"] == {3: losses[NAMES[0]], 4: losses[NAMES[2]]}
    assert noisy["difference"]["values"] == [losses[NAMES[1]] - losses[NAMES[0]], losses[NAMES[3]] - losses[NAMES[2]]]
    assert [{k: v for k, v in pair.items() if k not in ("arm", "to")} for pair in results["pairing"]] == [
        {"data": True, "base": True, "start": True}
    ]
    page = (folder / "sweep.md").read_text()
    assert f"{none['mean']:.3f}" in page and "Pairs share the seed, training rows, base weights" in page
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_pairs_with_other_rows_are_said_to_have_them(workplace, tmp_path):
    results, _, _ = swept_in(
        workplace, "data.split=train[:13],train", "train.max_steps=1", seeds=1, output_dir=str(tmp_path / "sw")
    )
    [pair] = results["pairing"]
    assert (pair["to"], pair["data"], pair["base"]) == ("split train[:13]", False, True)
    assert "Not shared: training rows" in (tmp_path / "sw" / "sweep.md").read_text()


def test_a_report_of_the_sweep(swept, tmp_path):
    code, stdout, _ = invoke("report", str(swept[0]), "--output", str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert code == 0 and str(tmp_path / "page.md") in stdout
    assert all(name in page for name in NAMES) and page.count("<polyline") == 3 * len(NAMES)
    assert "Repeat 77" in page and "before training" in page
    assert "held-out loss" in (tmp_path / "page.md").read_text()


# ---- Going on ----


def test_finished_runs_are_not_touched_and_new_ones_are_added(swept, workplace):
    before = {name: contents(swept[0] / name) for name in NAMES}
    results, who, lines = swept_in(workplace)
    assert who.begun == [] and results["finished"] == 4 and lines == ["going on: 4 of 4 runs are finished"]
    assert {name: contents(swept[0] / name) for name in NAMES} == before


def test_a_run_that_fails_ends_no_other(workplace, tmp_path):
    failed, who, _ = swept_in(workplace, output_dir=str(tmp_path / "sw"), broken=NAMES[1:2], seeds=1)
    assert isinstance(failed, RunFailed) and who.begun == NAMES[:2]
    assert "1 of 2 runs are finished" in str(failed) and "no luck" in str(failed) and "THE COMMAND" in str(failed)
    assert json.loads((tmp_path / "sw" / "results.json").read_text())["finished"] == 1
    results, who, _ = swept_in(workplace, output_dir=str(tmp_path / "sw"), seeds=1)
    assert who.begun == NAMES[1:2] and results["finished"] == 2


def test_a_signal_ends_the_queue_and_says_how_to_go_on(workplace, tmp_path):
    stopped, who, lines = swept_in(workplace, output_dir=str(tmp_path / "sw"), stop_in=NAMES[0])
    assert isinstance(stopped, RunInterrupted) and stopped.signal == signal.SIGINT
    assert who.begun == NAMES[:1] and who.stopped == [signal.SIGINT]
    assert "0 of 4 runs are finished" in str(stopped) and str(stopped).endswith("THE COMMAND")
    assert any(line.startswith("SIGINT: waiting for the next checkpoint") for line in lines)


def test_ctrl_c_reaches_the_process_of_a_run_once(workplace, swept):
    words = ("neftune.noise_alpha=0,15", "train.max_steps=4000", "machine.logging_steps=1")
    arguments = ("sweep", "mine.yaml", *words, "--seeds", "1", "--output-dir", "cut", "--measure", "rows")
    with contextlib.chdir(workplace), process(*arguments) as started:
        metrics = Path("cut", NAMES[0], "metrics.jsonl")
        until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3, started)
        started.send_signal(signal.SIGINT)
        _, stderr = started.communicate(timeout=60)
        assert started.returncode == 130 and "--output-dir cut" in stderr, stderr
        assert list(Path("cut", NAMES[0]).glob("checkpoint-*")) and not Path("cut", NAMES[1]).exists()
        assert "the checkpoint is written" in Path("cut", "logs", f"{NAMES[0]}.log").read_text()
        assert not Path("cut", NAMES[0], "row_losses.json").exists()


# ---- The process of a run ----


def test_one_process_trains_a_run_and_measures_it(workplace, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(workplace)
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(load_recipe("mine.yaml", ["train.max_steps=2"]).to_yaml())
    assert one_run.main([str(folder), str(recipe), "rows"]) == 0
    assert summary(folder)["steps"] == 2 and read_run(folder).measures == {"rows": {}}

    def trains(*arguments, **options):
        raise AssertionError("is trained already")

    monkeypatch.setattr("qlora_neft.runner.run.run", trains)
    before = contents(folder)
    assert one_run.main([str(folder), str(recipe), "rows", "answers"]) == 0
    assert read_run(folder).measures == {"rows": {}, "answers": {}}
    changed = {name for name, digest in contents(folder).items() if before[name] != digest}
    assert changed == {"measures.json", "answers.json"}
    Path(workplace, "held.jsonl").rename(tmp_path / "held.jsonl")
    try:
        assert one_run.main([str(folder), str(recipe), "loss"]) == 2
    finally:
        Path(tmp_path, "held.jsonl").rename(workplace / "held.jsonl")
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: data.eval_path: ")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserInputError("a"), 2, "error: a"),
        (RunFailed("b"), 1, "failed: b"),
        (RunInterrupted(signal.SIGTERM, "c"), 143, "interrupted: c"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_process_ends_as_the_command_line_does(monkeypatch, capsys, error, code, line):
    def ends(*arguments):
        raise error

    monkeypatch.setattr(one_run, "train_and_measure", ends)
    assert one_run.main(["folder", "recipe.yaml"]) == code
    assert capsys.readouterr().err == f"{line}\n"


def test_every_measure_has_a_name_that_is_checked_before_training():
    assert tuple(MEASURES) == CHECKED


# ---- Measures ----


def test_losses_of_rows_are_the_held_out_loss(swept, workplace, monkeypatch):
    monkeypatch.chdir(workplace)  # the recipe names its data from there
    for name in NAMES:
        measure_run(swept[0] / name, ["rows", "answers"])
        rows = read_row_losses(swept[0] / name)
        mean = sum(rows.sums) / sum(rows.counts)
        assert mean == pytest.approx(summary(swept[0] / name)["after"]["held_out_loss"], rel=1e-5)
    record = read_run(swept[0] / NAMES[0])
    assert record.measures == {"rows": {}, "answers": {}} and record.answers[0].reference == "77"
    arms = arms_by([read_run(swept[0] / name) for name in NAMES], ["neftune.noise_alpha"])
    [_, noisy] = results_of(arms)["measures"]["held_out_loss"]["arms"]
    assert noisy["difference"]["rows_interval"][0] <= noisy["difference"]["mean"]


def test_what_is_measured_is_not_measured_again(swept, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    folder = swept[0] / NAMES[0]
    measure_run(folder, ["rows"])
    before = contents(folder)
    monkeypatch.setattr("qlora_neft.compare.measures.MEASURES", {"rows": None})
    measure_run(folder, ["rows"])
    assert contents(folder) == before
    with pytest.raises(UserInputError, match=r"must be names from rows, .* got rouge"):
        measure_run(folder, ["rouge"])


def test_measures_of_the_evaluation(swept, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    folder = swept[0] / NAMES[1]
    measure_run(folder, ["loss", "overfit", "text"], Asking("held-out"))
    values = read_run(folder).values
    made = read_run(folder).made("overfit.train_prompts_rouge_l")
    assert (made["decoding"], made["repetition_penalty"]) == ("greedy", 1.2)  # NEFTune's, "across all experiments"
    assert read_run(folder).made("text.characters")["prompts"] == "2 held-out prompts"
    assert 0 <= values["overfit.train_prompts_rouge_l"] <= 100 and values["text.characters"] >= 0
    assert values["loss.whole_train_loss"] > 0 and "loss.held_out_loss" not in values


# ---- The command ----


def test_a_dry_run_counts_and_writes_nothing(workplace):
    with contextlib.chdir(workplace):
        before = contents(".")
        code, stdout, _ = invoke("sweep", "mine.yaml", *WORDS, "lora.r=2,4", "--dry-run", "--json")
        assert contents(".") == before and code == 0
    report = json.loads(stdout)
    assert len(report["runs"]) == 12 and {run["steps"] for run in report["runs"]} == {8}
    tokens = training_tokens(workplace)
    assert report["runs"][0]["tokens"] == round(8 * 4 * tokens / 26)
    assert report["tokens"] == 12 * report["runs"][0]["tokens"]


def training_tokens(workplace):
    """Of the training rows, by a run's own report."""
    return json.loads((workplace / "sw" / NAMES[0] / "data_report.json").read_text())["train"]["tokens"]


def test_bad_input_is_refused_before_any_run(swept, workplace):
    with contextlib.chdir(workplace):
        assert "must be names from" in refused("sweep", "mine.yaml", *WORDS, "--measure", "blue")
        assert "needs held-out rows" in refused(
            "sweep", "mine.yaml", *WORDS, "--measure", "rows", "data.eval_path=null", "machine.eval_steps=auto",
            "machine.eval_answers=auto",
        )  # fmt: skip
        assert "holds no sweep" in refused("sweep", "mine.yaml", *WORDS, "--output-dir", "sw/recipes")
        assert "another sweep" in refused(
            "sweep", "mine.yaml", *WORDS, "lora.r=2", "--output-dir", "sw", "--seeds", "2"
        )
        message = refused("sweep", "mine.yaml", "neftune.noise_alpha=0,-5", "lora.r=0")
        assert "neftune.noise_alpha" in message and "lora.r" in message


def test_runs_on_one_gpu_go_one_at_a_time(workplace, monkeypatch):
    monkeypatch.setattr("qlora_neft.fit.this_machine", lambda: card_of("T4"))
    with contextlib.chdir(workplace):
        arguments = ("sweep", "mine.yaml", *WORDS, "machine.device=auto", "--parallel", "2")
        assert "go one at a time, got 2" in refused(*arguments)
