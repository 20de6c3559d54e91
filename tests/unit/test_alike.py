"""One name, one measurement: what was made in two ways is told apart, and never compared."""

import json
from pathlib import Path

import pytest

from qlora_neft.compare.alike import kinds_of
from qlora_neft.compare.arms import arms_by
from qlora_neft.compare.asking import Asking
from qlora_neft.compare.decide import WIN_RATE, Decision, best, decision_by
from qlora_neft.compare.folder import missing
from qlora_neft.compare.records import RunRecord
from qlora_neft.compare.results import results_of
from qlora_neft.compare.tables import apart_lines, made_table, measures_table, verdict_lines
from qlora_neft.errors import UserInputError
from qlora_neft.evaluation.defaults import CUTOFFS, cutoff_of, greedy, prompts_made
from qlora_neft.evaluation.texts import chunk_of_run
from qlora_neft.run_folder.record import RunData, RunSummary

WITH, WITHOUT = {"repetition_penalty": 1.2, "chunk": 50}, {"repetition_penalty": 1.0, "chunk": 50}


def record(alpha, seed, *, held_out="a" * 64, **measures):
    rows = {"rows": 2, "tokens": 4, "sha256": held_out}
    recipe = {"train": {"seed": seed}, "neftune": {"noise_alpha": alpha}, "data": {}, "machine": {}}
    summary = RunSummary(after={"held_out_loss": 1.0 + alpha / 10 + seed}, data=RunData.of({"eval": rows}))
    return RunRecord(f"{alpha}-{seed}", Path("nowhere"), recipe, summary=summary, measures=measures)


def text(value, made):
    return {"characters": value, **({} if made is None else {"made": made})}


def arms(runs):
    return arms_by(runs, ["neftune.noise_alpha"])


def test_numbers_made_in_two_ways_are_two_measures():
    runs = [record(0, 0, text=text(10, WITH)), record(0, 1, text=text(11, WITH))]
    runs += [record(5, 0, text=text(20, WITH)), record(5, 1, text=text(90, WITHOUT))]
    results = results_of(arms(runs))
    keys = [key for key in results["measures"] if key.startswith("text")]
    assert keys == ["text.characters (repetition_penalty 1.2)", "text.characters (repetition_penalty 1.0)"]
    [_, noisy] = results["measures"][keys[0]]["arms"]
    assert noisy["difference"]["values"] == [10]  # of the pair that is alike, not of 90 against 11
    [none, other] = results["measures"][keys[1]]["arms"]
    assert none["values"] == {} and other["values"] == {1: 90} and "difference" not in other
    assert apart_lines(results) == [
        "text: characters: made in 2 ways, which are not compared: repetition_penalty 1.2; repetition_penalty 1.0"
    ]
    assert measures_table(results).rows[1][-1] == "90"
    assert any("not compared" in line for line in verdict_lines(results))


def test_what_earlier_versions_stored_is_shown_as_not_recorded():
    old = results_of(arms([record(alpha, 0, text=text(9 + alpha, None)) for alpha in (0, 5)]))
    assert old["measures"]["text.characters"]["arms"][1]["difference"]["values"] == [5]  # as it always was
    assert made_table(old).rows == [("text: characters", "not recorded")]
    mixed = results_of(arms([record(0, 0, text=text(9, None)), record(5, 0, text=text(8, WITH))]))
    assert {"text.characters (not recorded)", "text.characters (repetition_penalty 1.2, chunk 50)"} < set(
        mixed["measures"]
    )


def test_numbers_of_one_measure_may_each_have_their_own_way():
    made = {"whole_train_loss": {"rows_sha256": "1" * 16}, "far_loss": {"rows_sha256": "2" * 16}}
    other = {**made, "whole_train_loss": {"rows_sha256": "3" * 16}}
    runs = [record(a, 0, loss={"whole_train_loss": 1, "far_loss": 2, "made": m}) for a, m in ((0, made), (5, other))]
    assert len(kinds_of("loss.far_loss", runs)) == 1
    assert [kind.name for kind in kinds_of("loss.whole_train_loss", runs)] == [
        "loss.whole_train_loss (rows 11111111)",
        "loss.whole_train_loss (rows 33333333)",
    ]


def test_losses_on_other_held_out_rows_decide_nothing():
    assert best(arms([record(a, s) for a in (0, 5) for s in (0, 1)]))["leading"] == "noise_alpha 0"
    found = best(arms([record(a, s, held_out=str(a) * 64) for a in (0, 5) for s in (0, 1)]))
    assert found["leading"] is None and "made in 2 ways (rows 00000000; rows 55555555)" in found["sentence"]


def test_the_paper_takes_the_best_number_and_we_do_not():
    judged = {0: 26.71, 5: 31.43, 10: 28.57, 15: 29.01}  # NEFTune, Table 3, LLaMA-2 7B, Alpaca
    runs = [
        record(a, 0, alpaca={"alpaca_win_rate": rate, "made": {"judge": "chatgpt_fn"}}) for a, rate in judged.items()
    ]
    found = best(arms(runs), Decision(WIN_RATE, "highest"))
    assert found["arm"] == "noise_alpha 5" and "(31.43 against 26.71 without noise)" in found["sentence"]
    tied = [record(a, 0, alpaca={"alpaca_win_rate": 50 + a / 1e5}) for a in (0, 5)]
    found = best(arms(tied), Decision(WIN_RATE, "highest"))
    assert found["arm"] is None and found["sentence"].endswith("none, as noise_alpha 5, noise_alpha 0 have 50.00 alike")
    ours = best(arms(runs), Decision(WIN_RATE))
    assert (ours["arm"], ours["leading"]) == (None, "noise_alpha 5") and "is highest, not measurably above" in ours[
        "sentence"
    ]


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("alpaca", WIN_RATE),
        ("held_out_loss", "held_out_loss"),
        ("loss.evol_loss", "loss.evol_loss"),
        ("harness.x", "harness.x"),
    ],
)
def test_a_sweep_ranks_by_what_it_is_told_to(word, key):
    assert decision_by(word) == key


@pytest.mark.parametrize("word", ["text.characters", "clean_train_loss", "loss.whole_train_loss", "blue"])
def test_it_does_not_rank_by_what_has_no_better_end(word):
    with pytest.raises(UserInputError, match=r"--rank-by: must be .*\(alpaca, held_out_loss"):
        decision_by(word)


def test_a_measure_made_in_another_way_is_made_again_and_an_old_one_stays(tmp_path):
    (tmp_path / "recipe.yaml").write_text("data: {path: WizardLM/evol_instruct_70k}")
    (tmp_path / "run.json").write_text(
        json.dumps({"recipe": {"train": {"seed": 0}, "model": {"name_or_path": "m"}, "data": {"path": "p"}}})
    )

    def stored(made):
        (tmp_path / "measures.json").write_text(json.dumps({"text": text(1, made)}))
        return missing(tmp_path, ["text"], Asking("held-out"))

    like = {**greedy(1024), "chunk": chunk_of_run(tmp_path), "prompts": "8 held-out prompts"}
    assert like["chunk"] == 100 and stored(like) == [] == stored(None)
    assert stored({**like, "repetition_penalty": 1.0}) == ["text"] == stored({**like, "chunk": 50})


@pytest.mark.parametrize(
    ("path", "cutoff"),
    [
        ("tatsu-lab/alpaca", "alpaca"),
        ("WizardLMTeam/WizardLM_evol_instruct_70k", "evol"),
        ("anon8231489123/ShareGPT_Vicuna_unfiltered", "sharegpt"),
        ("garage-bAInd/Open-Platypus", "platypus"),
        ("mine/rows.jsonl", None),
    ],
)
def test_the_papers_cut_offs_go_by_data_set(path, cutoff):
    assert cutoff_of(path) == cutoff and (cutoff is None or CUTOFFS[cutoff] in (50, 100, 150))


def test_two_files_of_the_same_prompts_are_one():
    assert prompts_made(["a", "b"]) == prompts_made(iter(["a", "b"])) != prompts_made(["ab"])
