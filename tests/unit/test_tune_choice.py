"""A curve over learning rates: which to try next, which to choose, what is said of it, and the copy of the recipe."""

import difflib
import json
import math

import pytest
from command_line import contents, invoke, refused

from qlora_neft import load_recipe
from qlora_neft.compare.rates import Point, beyond, choose, grid, rates_of, text_of
from qlora_neft.compare.tune_results import sentences_of
from qlora_neft.compare.tuned_recipe import text_of_copy
from qlora_neft.errors import UserInputError
from qlora_neft.recipe.load import list_recipes, recipe_path

RATES = [1e-5, 1e-4, 1e-3, 1e-2]


def curve(*losses, worse=()):
    return [Point(rate, loss, i in worse) for i, (rate, loss) in enumerate(zip(RATES, losses, strict=False))]


def bowl(rate, at):
    return 2 + 0.1 * math.log(rate / at) ** 2


# ---- Rates ----


def test_the_grid_is_half_decades_around_the_recipes_rate():
    assert [text_of(rate) for rate in grid(2e-4)] == ["2e-5", "6.3e-5", "2e-4", "6.3e-4", "2e-3"]
    assert grid(1.234e-4)[2] == 1.234e-4  # the recipe's own as it is


def test_rates_are_read_in_any_order():
    assert rates_of("1e-3, 1e-5,0.0001") == [1e-5, 1e-4, 1e-3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1e-4,fast,-1,0,nan", "'fast', '-1', '0', 'nan'"),
        ("1e-4,0.0001", "1e-4 is named twice"),
        ("1e-4", "one rate is no search"),
        ("1e-4,,1e-3", "''"),
    ],
)
def test_rates_that_are_none_are_refused(text, message):
    with pytest.raises(UserInputError, match="--rates") as caught:
        rates_of(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("losses", "following"),
    [
        ((3, 2, 1.9, 2.5), None),  # it turns
        ((3, 2.5, 2, 1.9), 3.2e-2),
        ((1.9, 2, 2.5, 3), 3.2e-6),
        ((3, 2.5, 2, None), None),  # beyond it diverges
        ((None, None, None, None), 3.2e-6),
    ],
)
def test_the_curve_is_extended_while_the_lowest_is_at_an_end(losses, following):
    assert beyond(curve(*losses), RATES) == following


def test_the_curve_is_extended_three_times_at_most():
    points, tried = [Point(rate, -math.log(rate)) for rate in RATES], 0
    while (rate := beyond(points, RATES)) is not None:
        points, tried = [*points, Point(rate, -math.log(rate))], tried + 1
    assert tried == 3


# ---- The choice ----


def test_a_parabola_is_found_exactly():
    points = [Point(rate, bowl(rate, 2.5e-4), rate in (1e-5, 1e-2)) for rate in RATES]
    choice = choose(points, 1e-4)
    assert (choice.rate, choice.how, choice.lowest, choice.interval) == (2.5e-4, "parabola", 1e-4, (1e-5, 1e-2))


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        (curve(3, 2.5, 2, 1.5, worse=(0, 1, 2)), (1e-2, "edge", (1e-3, None))),
        (curve(1.5, 2, 2.5, 3, worse=(1, 2, 3)), (1e-5, "edge", (None, 1e-4))),
        (curve(2.1, 2.0, 2.05, 2.1), (1e-4, "kept", (None, None))),  # flat, or too noisy to tell
        (curve(3, 2.5, 2, None, worse=(0, 1)), (1e-3, "grid", (1e-4, 1e-2))),
        (curve(3, 2, 2.1, 3, worse=(0, 3)), (2.6e-4, "parabola", (1e-5, 1e-2))),
        (curve(None, 2, None), (1e-4, "grid", (1e-5, 1e-3))),
    ],
)
def test_what_is_chosen(points, expected):
    choice = choose(points, 1e-4)
    assert (choice.rate, choice.how, choice.interval) == expected


def test_a_parabola_never_leaves_its_neighbors():
    choice = choose(curve(2.0001, 2.0, 9, worse=(2,)), 1e-3)
    assert 1e-5 < choice.rate < 1e-3


@pytest.mark.parametrize("worse", [(), (0,), (2,), (0, 2), (0, 1, 3), (0, 2, 3)])
def test_the_interval_holds_the_choice(worse):
    choice = choose([Point(rate, bowl(rate, 3.9e-4), i in worse) for i, rate in enumerate(RATES)], 1e-4)
    low, high = choice.interval
    assert (low or 0) < choice.rate < (high or math.inf)


def test_nothing_is_chosen_if_all_diverged():
    assert choose(curve(None, None, None), 1e-4) is None


def said(points, own=1e-4, *, seeds=1, steps=(50, 500), before=4.0):
    rows = [
        {"rate": p.rate, "losses": {}, "loss": p.loss, "difference": None, "interval": None, "verdict": "lowest"}
        for p in points
    ]
    return "\n".join(sentences_of(rows, choose(points, own), own, seeds=seeds, steps=steps, before=before))


@pytest.mark.parametrize(
    ("points", "phrase"),
    [
        (curve(2.1, 2.0, 2.05, 2.1), "no measurable difference between 1e-5 and 1e-2: the recipe's 1e-4 is kept"),
        (curve(3, 2.5, 2, 1.5, worse=(0, 1, 2)), "the best is at the edge, nothing above it"),
        (curve(1.5, 2, 2.5, 3, worse=(1, 2, 3)), "the best is at the edge, nothing below it"),
        (curve(3, 2, 2.1, None, worse=(0,)), "diverged, and counted as worse than any loss: 1e-2"),
        (curve(None, None, None), "no rate can be chosen, as all diverged"),
        (
            curve(3, 2, 2.1, 3, worse=(0, 3)),
            "the best lies between 1e-5 (measurably worse) and 1e-2 (measurably worse)",
        ),
        (curve(3, 2, 2.1, 3, worse=(0, 2, 3)), "the best lies between 1e-5 (measurably worse) and 1e-3"),
        (curve(3, 2, 2.1, 2.2, worse=(0,)), "the best lies above 1e-5 (measurably worse)"),
        (curve(3, 2, 2.1, 2.2, worse=(2,)), "the best lies below 1e-3 (measurably worse)"),
        (curve(3, 2, 1.9, None), "the best lies below 1e-2 (diverged)"),
        (curve(5, 4.5, 6, worse=(0, 2)), "no rate lowered the held-out loss, 4.0000 before training"),
        (curve(3, 2, 2.1, 3, worse=(0, 3)), "the best rate of all 500 may differ"),
        (curve(3, 2, 2.1, 3, worse=(0, 3)), "over held-out rows; another seed may move it"),
    ],
)
def test_what_is_said(points, phrase):
    assert phrase in said(points)


# ---- The copy ----


@pytest.mark.parametrize("name", list_recipes())
def test_the_copy_differs_in_the_rate_alone(name):
    before = recipe_path(name).read_text()
    text, in_place = text_of_copy(name, [], 3.3e-4, ["found"])
    assert in_place
    lines = list(difflib.unified_diff(before.splitlines(), text.splitlines(), n=0, lineterm=""))[2:]
    removed, added = ([line[1:] for line in lines if line.startswith(sign)] for sign in "-+")
    assert len(removed) == 1 and removed[0].strip().startswith("learning_rate:")
    assert added[0].strip() == "# found" and added[-1].strip() == "learning_rate: 3.3e-4"
    assert all(line.strip().startswith("#") for line in added[:-1])


def test_overrides_belong_to_the_copy(tmp_path):
    words = ["data.path=mine.jsonl", "lora.r=32", "machine.threads=2", "train.warmup_steps=0.03"]
    words += ["train.lr_scheduler_type=cosine"]
    text, in_place = text_of_copy("qwen3-0.6b", words, 1e-3, ["found"])
    (tmp_path / "tuned.yaml").write_text(text)
    assert in_place and load_recipe(tmp_path / "tuned.yaml") == load_recipe(
        "qwen3-0.6b", [*words, "train.learning_rate=1e-3"]
    )


def test_a_copy_without_a_place_for_the_changes_states_every_key(tmp_path):
    text, in_place = text_of_copy("qwen3-0.6b", ["neftune=null"], 1e-3, ["found"])
    (tmp_path / "tuned.yaml").write_text(text)
    assert not in_place and text.startswith("# found\n")
    assert load_recipe(tmp_path / "tuned.yaml") == load_recipe(
        "qwen3-0.6b", ["neftune=null", "train.learning_rate=1e-3"]
    )


# ---- What is refused before anything is loaded ----


def test_what_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.yaml").write_text("mine")
    assert "is there already" in refused("tune", "qwen3-0.6b", "--output", "there.yaml")
    assert "there is no folder" in refused("tune", "qwen3-0.6b", "--output", "none/there.yaml")
    assert "--rates: must be positive" in refused("tune", "qwen3-0.6b", "--rates", "a,b")
    assert "Name those to try with --rates" in refused("tune", "qwen3-0.6b", "train.learning_rate=1e-4,1e-3")
    assert "Did you mean" in refused("tune", "qwen3-0.6b", "train.learning_rat=1e-4")
    assert "hold out none" in refused("tune", "qwen3-0.6b", "data.eval_fraction=null")
    code, stdout, _ = invoke("tune", "nothing", "--json")
    assert code == 2 and "unknown recipe" in json.loads(stdout)["error"]["message"]
    assert contents(".").keys() == {"there.yaml"}
