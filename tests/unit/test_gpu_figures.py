"""The figures of the GPU benchmark: ceilings, committed lengths, and which arms are void."""

from __future__ import annotations

import statistics

import pytest

from benchmarks.gpu import figures
from benchmarks.gpu.lengths import IGNORE_INDEX, NAMES, distribution, rows, tokens_of_steps
from benchmarks.gpu.plan import GEOMETRIES, MAIN, geometry, schedule
from benchmarks.gpu.roofline import Ceiling, Work, linear_weights, lora_weights, tokens_per_second
from qlora_neft.fit.geometry import geometry_of

H200 = Ceiling(flops=788e12, bandwidth=4.3e12)  # what one was seen to do


@pytest.mark.parametrize(
    ("length", "tokens", "checkpointing", "ceiling"),
    [(2048, 8192, True, 14.9e3), (512, 512, True, 11.4e3), (2048, 8192, False, 21.5e3), (512, 512, False, 16.7e3)],
)
def test_the_ceiling_is_that_of_the_tables_it_was_derived_in(length, tokens, checkpointing, ceiling):
    sizes = geometry("7b")
    work = Work(tokens, 1, length, 1.0, lora_weights(sizes, 16), checkpointing)
    assert tokens_per_second(sizes, work, H200) == pytest.approx(ceiling, rel=0.01)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_weights_are_counted_as_the_planner_counts_them(name):
    counted = geometry_of({"model_type": "llama", **geometry(name)})
    assert linear_weights(geometry(name)) == counted.quantized_parameters()
    assert lora_weights(geometry(name), 64) == counted.lora_parameters(64)


def test_alpaca_lengths_are_those_of_alpaca():
    drawn = sorted(distribution("alpaca").draw(600))
    found = [drawn[int(share * len(drawn))] for share in (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)]
    # Quantiles of 9,229 rows of Stanford Alpaca, characters over four.
    assert found == pytest.approx([59, 81, 112, 166, 254, 375], rel=0.25)
    assert max(drawn) <= 512


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_the_same_wherever_they_are_drawn_and_train_something(name):
    lengths = distribution(name)
    made = rows(lengths, 2, 32000)
    assert made == rows(lengths, 2, 32000)
    assert [len(row["input_ids"]) for row in made] == lengths.draw(2)
    assert made[:4] == rows(lengths, 5, 32000)[:4]  # a longer run begins with the same rows
    for row in made:
        assert row["labels"][0] == IGNORE_INDEX
        assert row["labels"][-1] == row["input_ids"][-1]
        assert 4 <= min(row["input_ids"]) <= max(row["input_ids"]) < 32000


def test_a_long_micro_batch_is_about_4096_tokens():
    lengths = distribution("long")
    step = statistics.mean(tokens_of_steps(lengths, 20))
    assert step * lengths.rows_per_micro_batch / lengths.sequences_per_step == pytest.approx(4096, rel=0.05)


def test_every_arm_is_measured_once_before_any_is_measured_twice():
    runs = [run for session in schedule() for run in session.runs if (run.base, run.cap_gib) == ("7b", None)]
    order = [run.arm for run in runs if run.lengths == "alpaca"]
    assert order[:10] == [*MAIN, *reversed(MAIN)]
    assert len({run.key for session in schedule() for run in session.runs}) == sum(len(s.runs) for s in schedule())


def run_of(arm, gradient_error=0.01, loss_error=1e-4, checksum=7, unchanged=True):
    return {
        "run": {"arm": arm, "base": "7b", "lengths": "alpaca", "repeat": 0, "cap_gib": None},
        "check": {"loss_error": loss_error, "gradient_error": gradient_error},
        "base_checksum": checksum,
        "base_unchanged": unchanged,
    }


@pytest.mark.parametrize(
    ("arm", "reason"),
    [
        (run_of("fused", gradient_error=0.2), "gradient off by 20.0%, 5.0% allowed"),
        (run_of("fused", gradient_error=float("nan")), "gradient off by nan%"),
        (run_of("fused", loss_error=0.02), "loss off by 2.00%, 1% allowed"),
        (run_of("fused", checksum=8), "other NF4 bytes"),
        (run_of("fused", unchanged=False), "not those it began with"),
    ],
)
def test_a_fast_arm_that_computes_something_else_is_void(arm, reason):
    parts = {"a": run_of("trl-default"), "b": run_of("unfused"), "c": run_of("trl-tuned"), "d": arm}
    found = figures.void(parts)
    assert list(found) == ["fused"]
    assert reason in found["fused"]


def test_where_upstream_itself_rounds_more_an_arm_may_as_well():
    parts = {name: run_of(name, gradient_error=0.06) for name in ("trl-default", "unfused")}
    assert "fused" not in figures.void({**parts, "c": run_of("fused", gradient_error=0.1)})
    assert "fused" in figures.void({**parts, "c": run_of("fused", gradient_error=0.13)})
