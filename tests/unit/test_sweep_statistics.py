"""Paired differences, their intervals, and what may be said of them; how words become a sweep's runs."""

import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from qlora_neft.compare.arms import Arm, arms_by, arms_of, baseline_of
from qlora_neft.compare.folder import open_sweep
from qlora_neft.compare.plan import plan_sweep, split_values, split_words
from qlora_neft.compare.records import RunRecord
from qlora_neft.compare.results import best, results_of
from qlora_neft.compare.statistics import (
    bootstrap_interval,
    difference,
    ratio_bootstrap_interval,
    t_interval,
    t_quantile,
)
from qlora_neft.errors import RecipeError, UserInputError
from qlora_neft.run_folder.record import Before, RunFile, RunSummary


def record(alpha, seed, loss, **more):
    recipe = {"train": {"seed": seed, "learning_rate": 1e-3}, "neftune": None, "machine": {}}
    if alpha is not None:
        recipe["neftune"] = {"noise_alpha": alpha, "distribution": "uniform", "final_alpha": None}
    about = RunFile(data_sha256="d", base_sha256="b", before=Before(clean_train_loss=5.0 + seed))
    summary = RunSummary(after={"clean_train_loss": 1.0, "held_out_loss": loss})
    return RunRecord(f"{alpha}-{seed}", more.pop("folder", Path("nowhere")), recipe, about, summary, **more)


def arms_from(losses):
    """Arms by alpha from lists of held-out losses, one a seed."""
    runs = [record(alpha, seed, loss) for alpha, found in losses.items() for seed, loss in enumerate(found)]
    return arms_by(runs, ["neftune.noise_alpha"])


# ---- Intervals ----


@pytest.mark.parametrize(
    ("degrees", "value"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)]
)
def test_t_quantiles_are_those_of_the_tables(degrees, value):
    assert t_quantile(0.975, degrees) == pytest.approx(value, abs=1e-4)


def test_t_interval_covers_the_truth_as_often_as_it_says():
    draw = random.Random(1)
    samples = [[draw.gauss(0.3, 2.0) for _ in range(3)] for _ in range(4000)]
    covered = sum(low < 0.3 < high for low, high in map(t_interval, samples))
    assert covered / len(samples) == pytest.approx(0.95, abs=0.015)


def test_bootstrap_of_three_pairs_ends_at_the_smallest_and_the_largest():
    # Of 27 equally likely resamples one has the smallest three times: 3.7%, more than the 2.5% of the percentile.
    assert bootstrap_interval([0.1, 0.5, 0.2]) == pytest.approx((0.1, 0.5))


def test_bootstrap_is_close_to_all_resamples_counted():
    values = [0.3, -0.1, 0.25, 0.4]
    means = [np.mean(drawn) for drawn in itertools.product(values, repeat=4)]
    assert bootstrap_interval(values) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.02)
    assert bootstrap_interval(values) == bootstrap_interval(values)


def test_a_difference_is_measurable_when_both_intervals_leave_zero_out():
    assert difference([-0.25, -0.246, -0.251]).is_measurable
    signs_alone = difference([0.1, 0.5, 0.2])  # one of four triples has equal signs by chance
    assert signs_alone.bootstrap[0] > 0 and signs_alone.t_interval[0] < 0 and not signs_alone.is_measurable
    assert difference([0.1, -0.1, 0.2]).is_measurable is False
    single = difference([0.7])
    assert (single.mean, single.t_interval, single.is_measurable) == (0.7, None, None)


def test_rows_are_weighted_by_their_tokens():
    generator = np.random.default_rng(0)
    counts = generator.integers(1, 40, size=400)
    sums = counts * 0.2 + generator.normal(size=400)
    low, high = ratio_bootstrap_interval(sums, counts)
    assert low < sums.sum() / counts.sum() < high
    # The delta method's standard error of a ratio of sums.
    ratio = sums.sum() / counts.sum()
    error = math.sqrt(((sums - ratio * counts) ** 2).sum()) / counts.sum()
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)


# ---- What may be said ----


def test_pairs_are_those_of_one_seed():
    results = results_of(arms_from({0: [1.0, 2.0, 3.0], 5: [1.5, 2.5, 3.5]}))
    [none, five] = results["measures"]["held_out_loss"]["arms"]
    assert "difference" not in none
    assert five["difference"]["values"] == [0.5, 0.5, 0.5] and five["difference"]["to"] == "noise_alpha 0"
    assert five["difference"]["measurable"] is True  # though the seeds' own spread is four times as large
    assert results["pairing"] == [
        {"arm": "noise_alpha 5", "to": "noise_alpha 0", "data": True, "base": True, "start": True}
    ]


def test_no_measurable_difference_is_said_and_no_best_named():
    results = results_of(arms_from({0: [1.0, 1.3, 0.8], 5: [1.1, 1.0, 0.9], 10: [0.9, 1.2, 1.0]}))
    assert results["measures"]["held_out_loss"]["verdict"] == "no measurable difference"
    assert results["best"]["arm"] is None and "not distinguishable" in results["best"]["sentence"]


def test_the_best_is_named_only_against_every_other_arm():
    clear = {0: [3.65, 3.66, 3.64], 5: [3.5, 3.51, 3.49], 15: [3.4, 3.411, 3.39]}
    assert best(arms_from(clear))["arm"] == "noise_alpha 15"
    close = {**clear, 5: [3.41, 3.40, 3.42]}
    found = best(arms_from(close))
    assert found["arm"] is None and found["leading"] == "noise_alpha 15"
    assert found["sentence"].endswith("not measurably below noise_alpha 5")


def test_more_comparisons_ask_for_more_confidence():
    pair = {0: [1.0, 1.0, 1.0], 5: [0.95, 0.90, 0.92]}
    assert best(arms_from(pair))["arm"] == "noise_alpha 5"
    many = {**pair, **{alpha: [1.0, 1.0, 1.0] for alpha in range(10, 20)}}
    assert best(arms_from(many))["arm"] is None


def test_arms_of_several_keys_are_told_apart_in_a_sentence():
    runs = [record(alpha, seed, 1.0 - alpha / 50) for alpha in (0, 5, 10) for seed in (0, 1)]
    results = results_of(arms_by(runs, ["neftune.noise_alpha", "neftune.distribution"]))
    assert results["measures"]["held_out_loss"]["verdict"] == (
        "measurable: noise_alpha 5, distribution uniform -0.100; noise_alpha 10, distribution uniform -0.200"
    )


def test_one_seed_says_nothing():
    results = results_of(arms_from({0: [1.0], 5: [0.1]}))
    assert results["measures"]["held_out_loss"]["verdict"] == "one seed: no difference can be told from chance"
    assert results["best"]["arm"] is None


def test_intervals_over_rows_count_where_they_are_known(tmp_path):
    def with_rows(alpha, seed, sums):
        folder = tmp_path / f"{alpha}-{seed}"
        folder.mkdir()
        (folder / "row_losses.json").write_text(json.dumps({"rows": "r", "sums": sums, "counts": [10] * len(sums)}))
        return record(alpha, seed, sum(sums) / 10 / len(sums), folder=folder)

    # Both seeds agree, but one row of four makes all the difference.
    runs = [with_rows(0, seed, [20, 20, 20, 40 + seed]) for seed in (0, 1)]
    runs += [with_rows(5, seed, [20, 20, 20, 20 + seed]) for seed in (0, 1)]
    [_, five] = results_of(arms_by(runs, ["neftune.noise_alpha"]))["measures"]["held_out_loss"]["arms"]
    low, high = five["difference"]["rows_interval"]
    assert low < five["difference"]["mean"] < high == 0
    assert five["difference"]["t_interval"][1] < 0 and five["difference"]["measurable"] is False


def test_a_run_without_the_measure_leaves_its_pair_out():
    arms = arms_from({0: [1.0, 2.0], 5: [1.5, float("nan")]})
    arms[1].runs[1].summary.after["held_out_loss"] = None
    [_, five] = results_of(arms)["measures"]["held_out_loss"]["arms"]
    assert five["difference"]["values"] == [0.5]


def test_the_baseline_has_no_noise_and_the_same_rest():
    runs = [record(alpha, 0, 1.0) for alpha in (None, 5)] + [record(5, 0, 1.0), record(0.0, 0, 1.0)]
    for run in runs[2:]:
        run.recipe["train"]["learning_rate"] = 1e-4
    arms = arms_of(runs)
    assert [baseline_of(arm, arms) and arms.index(baseline_of(arm, arms)) for arm in arms] == [None, 0, 3, None]
    other = [Arm({"lora.r": r}, (record(5, 0, 1.0),)) for r in (4, 8)]
    assert baseline_of(other[1], other) is None and baseline_of(other[1], other, first=True) is other[0]


# ---- Words ----


def test_commas_inside_brackets_and_quotes_belong_to_the_value():
    assert split_values("0,5, 10") == ["0", "5", "10"]
    assert split_values("[q_proj,v_proj],all-linear") == ["[q_proj,v_proj]", "all-linear"]
    assert split_values('"a,b.jsonl"') == ['"a,b.jsonl"'] and split_values("it's,x") == ["it's", "x"]
    swept, fixed, problems = split_words(["lora.r=4,8", "lora.target_modules=[q,v]"])
    assert [key.key for key in swept] == ["lora.r"] and fixed == ["lora.target_modules=[q,v]"] and not problems


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lora.r=8"], "no key has several values"),
        (["lora.r=4,,8"], "a value is empty"),
        (["lora.r=4,8", "lora.r=16,32"], "swept twice"),
        (["lora.r=4,8", "lora.r=16"], "set to a single value as well"),
        (["train.seed=0,1"], "--seeds 2"),
        (["neftune=null,{}"], "whole section"),
        (["lora.r=4,04"], "are the same run"),
    ],
)
def test_words_that_make_no_sweep_are_refused(words, said):
    with pytest.raises(UserInputError, match=said):
        plan_sweep("demo", words)


def test_every_problem_of_every_run_is_told_at_once():
    with pytest.raises(RecipeError) as caught:
        plan_sweep("demo", ["lora.r=0,4", "neftune.noise_alpha=-1,5", "train.learnin_rate=1"], seeds=2)
    assert len(caught.value.problems) == 3 and "learning_rate" in str(caught.value)


def test_a_grid_takes_every_combination_and_a_list_the_pairs():
    words = ["neftune.noise_alpha=0,5", "lora.r=4,8", "train.seed=7"]
    grid = plan_sweep("demo", words, seeds=2)
    assert len(grid.runs) == 8 and grid.seeds == [7, 8]
    assert [run.seed for run in grid.runs] == [7] * 4 + [8] * 4
    assert grid.runs[1].name == "noise_alpha_0-r_8-seed_7" and grid.runs[1].recipe.lora.r == 8
    pairs = plan_sweep("demo", words, combine="list")
    assert [(run.recipe.neftune.noise_alpha, run.recipe.lora.r) for run in pairs.runs] == [(0, 4), (5, 8)]
    with pytest.raises(UserInputError, match="the same number of values"):
        plan_sweep("demo", ["neftune.noise_alpha=0,5", "lora.r=4,8,16"], combine="list")


def test_without_noise_its_kind_makes_no_second_run():
    plan = plan_sweep("demo", ["neftune.noise_alpha=0,5", "neftune.distribution=uniform,gaussian"])
    assert [run.name for run in plan.runs] == [
        "noise_alpha_0-distribution_uniform-seed_0",
        "noise_alpha_5-distribution_uniform-seed_0",
        "noise_alpha_5-distribution_gaussian-seed_0",
    ]


def test_each_run_has_a_mirror_of_its_own():
    plan = plan_sweep("demo", ["neftune.noise_alpha=0,5", "machine.mirror_dir=drive"])
    assert [run.recipe.machine.mirror_dir for run in plan.runs] == [f"drive/{run.name}" for run in plan.runs]


def test_a_sweep_may_grow_and_not_change(tmp_path):
    folder = tmp_path / "sweep"
    assert len(open_sweep(plan_sweep("demo", ["neftune.noise_alpha=0,5"], seeds=2), folder)) == 4
    grown = plan_sweep("demo", ["neftune.noise_alpha=0,5,10", "machine.threads=1"], seeds=3)
    assert len(open_sweep(grown, folder)) == 5
    with pytest.raises(UserInputError, match=r"noise_alpha_10-seed_0: no longer in this sweep"):
        open_sweep(plan_sweep("demo", ["neftune.noise_alpha=0,5"], seeds=3), folder)
    with pytest.raises(UserInputError, match=r"lora.r: 16 before, 8 now"):
        open_sweep(plan_sweep("demo", ["neftune.noise_alpha=0,5,10", "lora.r=8"], seeds=3), folder)
    plan = json.loads((folder / "sweep.json").read_text())  # as a version without two of today's keys wrote it
    for run in plan["runs"]:
        del run["recipe"]["data"]["keep_end_token"], run["recipe"]["quantization"]["bnb_4bit_use_double_quant"]
    (folder / "sweep.json").write_text(json.dumps(plan))
    assert open_sweep(grown, folder) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(UserInputError, match="holds no sweep"):
        open_sweep(grown, tmp_path / "mine")
