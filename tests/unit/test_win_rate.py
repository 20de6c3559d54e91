"""The official win rate against naive computations; annotations and outputs in files; bad input."""

import json
import math
import random
import statistics

import pytest
from command_line import invoke, refused

from qlora_neft.errors import UserInputError
from qlora_neft.evaluation.alpaca.score import average_length, win_rate


def rows(preferences, **more):
    return [
        {"instruction": f"do {i}", "output_1": "a", "output_2": "b" * (i + 1), "preference": p, **more}
        for i, p in enumerate(preferences)
    ]


def test_ties_count_half_and_what_is_no_preference_is_left_out():
    found = win_rate([2, 2, 2, 1, 1.5, 0, None, float("nan"), -1, 3, 10**400])
    assert (found.n, found.wins, found.losses, found.ties, found.excluded) == (6, 3, 1, 2, 5)
    scores = [1, 1, 1, 0, 0.5, 0.5]
    assert found.win_rate == pytest.approx(100 * sum(scores) / 6, rel=1e-14)
    assert found.standard_error == pytest.approx(100 * statistics.stdev(scores) / math.sqrt(6), rel=1e-14)
    assert found.wins_without_draws == 75


def test_probabilities_are_averaged_as_they_are():
    draw = random.Random(0)
    preferences = [1 + draw.random() for _ in range(805)]
    found = win_rate(preferences)
    assert found.win_rate == pytest.approx(100 * (statistics.fmean(preferences) - 1), rel=1e-12)
    assert found.standard_error == pytest.approx(100 * statistics.stdev(preferences) / math.sqrt(805), rel=1e-12)
    assert found.wins == sum(p > 1.5 for p in preferences) and found.wins + found.losses == 805


def test_the_papers_human_study():
    found = win_rate([2] * 88 + [1.5] * 22 + [1] * 30)  # 140 instructions, NEFTune, "Human Study"
    assert round(found.wins_without_draws, 1) == 74.6


def test_the_reference_against_itself():
    found = win_rate([1.5] * 805)
    assert (found.win_rate, found.standard_error, found.ties, found.wins_without_draws) == (50, 0, 805, None)


def test_one_preference_has_no_standard_error():
    assert win_rate([2]).standard_error is None


@pytest.mark.parametrize("preferences", [[], [None], [5.0], [float("nan")]])
def test_nothing_to_count_is_refused(preferences):
    with pytest.raises(UserInputError, match="no usable preference"):
        win_rate(preferences)


def test_lengths_are_cut_to_whole_characters():
    assert average_length(["ab", "abc", "é"]) == 2
    assert average_length(["ab", "abc"]) == 2  # 2.5


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, content):
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return name

    return write


def test_the_command_scores_without_a_model(files):
    judged = rows([2, 1, 1.5, None])
    files("annotations.json", judged)
    files("outputs.json", [{"instruction": row["instruction"], "output": row["output_2"]} for row in judged])
    code, stdout, stderr = invoke("eval", "alpaca", "score", "annotations.json", "--outputs", "outputs.json", "--json")
    found = json.loads(stdout)
    assert code == 0 and "1 annotations without a preference" in stderr
    names = ("win_rate", "standard_error", "n", "wins", "losses", "ties", "avg_length")
    assert [found[name] for name in names] == [50, pytest.approx(100 * 0.5 / math.sqrt(3)), 3, 1, 1, 1, 2]
    assert found["not_annotated"] == 0 and "alpaca_eval" in found["length_controlled"]
    code, stdout, _ = invoke("eval", "alpaca", "score", "annotations.json")  # lengths of what was annotated
    assert code == 0 and "50.00%" in stdout and "2 characters" in stdout


def test_outputs_that_are_not_the_judged_ones(files):
    files("annotations.json", rows([2, 1]))
    files("one.json", [{"instruction": "do 0", "output": "b"}, {"instruction": "do 1", "output": "other"}])
    code, stdout, stderr = invoke("eval", "alpaca", "score", "annotations.json", "--outputs", "one.json", "--json")
    assert code == 0 and json.loads(stdout)["not_annotated"] == 1 and "not the ones that were annotated" in stderr
    files("none.json", [{"instruction": "do 0", "output": "x"}])
    assert "none of these outputs" in refused("eval", "alpaca", "score", "annotations.json", "--outputs", "none.json")


def test_bad_input_is_told_with_its_remedy(files):
    score = ("eval", "alpaca", "score")
    files("good.json", rows([1]))
    said = refused(*score, files("text.json", rows([2, "b"])))
    assert "FILE: 'text.json', entry 2: preference must be a number or null, got 'b'" in said
    assert "got True" in refused(*score, files("bool.json", rows([True])))
    assert "is not valid JSON" in refused(*score, files("deep.json", "[" * 100_000))
    assert "is not valid JSON" in refused(*score, files("deep.jsonl", "[" * 100_000))
    assert "--outputs: 'none.json' is empty" in refused(*score, "good.json", "--outputs", files("none.json", []))
    assert "no preference" in refused(*score, files("bare.json", [{"instruction": "a", "output_2": "b"}]))
    assert "entry 1 must have output_2" in refused(*score, files("no.json", [{"instruction": "a"}]))
    assert "no usable preference" in refused(*score, files("null.json", rows([None])))
    assert "does not exist" in refused(*score, "absent.json")


def test_bad_input_of_the_form_before_the_three_verbs(files):
    def said(*arguments):
        code, _, stderr = invoke("eval", "alpaca", *arguments)
        assert code == 2
        return stderr

    files("good.json", rows([1]))
    assert "--score: 'text.json', entry 1" in said("--score", files("text.json", rows(["b"])))
    assert "--output: has no effect on --score" in said("--score", "good.json", "--output", "x.json")
    assert "--reference: has no effect" in said("--score", "good.json", "--reference", "good.json")
    assert "give no DIR" in said("--score", "good.json", "--judge", "x")
    assert "give a DIR" in said("--judge", "x")
    assert "--judge or --score" in said("--outputs", "good.json")


def test_scoring_and_measuring_import_no_torch(files):
    import subprocess
    import sys

    from command_line import environment

    files("annotations.json", rows([2, 1]))
    files("outputs.json", [{"output": "a b c d " * 20}])
    code = (
        "import sys\nfrom qlora_neft.cli import app\n"
        "for verb in (['alpaca', 'score', 'annotations.json'], ['text', '--outputs', 'outputs.json']):\n"
        "    try: app(['eval', *verb, '--json'])\n"
        "    except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True, capture_output=True)
