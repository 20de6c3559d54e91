"""Verdicts of a local judge and of the alpaca_eval package's program, from answers to a win rate."""

import json
import stat
from pathlib import Path

import pytest
import torch
from command_line import invoke, never_stopped, refused
from eval_place import ASKED, FAST, found, make_place
from tiny import save_tiny_model

from qlora_neft.errors import UserInputError
from qlora_neft.evaluation.alpaca.local_judge import PLAIN_LEAD, QUESTION, annotate, load_judge


@pytest.fixture
def place(llama, tmp_path, monkeypatch):
    """A fresh copy, the current directory."""
    monkeypatch.chdir(make_place(llama, tmp_path / "run"))


@pytest.fixture(scope="module")
def judge_dir(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("judge"), max_position_embeddings=2048))


@pytest.fixture(scope="module")
def judge(judge_dir):
    return load_judge(judge_dir, device="cpu", precision="fp32")


def test_a_judge_has_no_favourite_place(judge):
    one, other = judge.preference("Say hello", "hello", "no"), judge.preference("Say hello", "no", "hello")
    assert 1 < one < 2 and one + other == pytest.approx(3, abs=1e-6) and one != pytest.approx(1.5, abs=1e-9)
    assert judge.preference("Say hello", "hello", "hello") == pytest.approx(1.5, abs=1e-6)


def test_a_verdict_is_the_share_of_a_letter_in_both_orders(judge):
    shares = []
    for a, b in (("one", "two"), ("two", "one")):
        text = QUESTION.format(instruction="Count", a=a, b=b) + PLAIN_LEAD + " "
        ids = judge.tokenizer(text)["input_ids"]
        with torch.no_grad():
            logits = judge.model(input_ids=torch.tensor([ids])).logits[0, -1]
        letters = judge.tokenizer.convert_tokens_to_ids(["A", "B"])
        shares.append(torch.softmax(logits[letters], 0)[1].item())
    expected = 1 + (shares[0] + 1 - shares[1]) / 2
    assert judge.preference("Count", "one", "two") == pytest.approx(expected, abs=1e-6)
    assert judge.preference("x" * 2048, "one", "two") is None  # beyond its context


def test_an_adapter_can_be_the_judge(llama):
    mine = load_judge(str(never_stopped(llama)), device="cpu", precision="fp32")
    assert mine.prompts.name == "alpaca"
    with pytest.raises(UserInputError, match="--judge"):
        load_judge(str(llama / "absent"), device="cpu", precision="fp32")


def test_a_local_judge_from_answers_to_a_win_rate(place, judge_dir):
    found("alpaca", "answer", "out", "--instructions", "asked.json", *FAST)
    result = found("alpaca", "judge", "out", "--instructions", "asked.json", "--judge", judge_dir)
    judged = json.loads(Path(result["annotations"]).read_text())
    assert [row["output_1"] for row in judged] == [f"{n}!" for n in range(7)]
    assert result["n"] + result["excluded"] == 7
    assert result["win_rate"] == pytest.approx(100 * (sum(row["preference"] for row in judged) / 7 - 1))
    again = found("alpaca", "score", result["annotations"], "--outputs", "out/alpaca_outputs.json")
    assert again["win_rate"] == result["win_rate"]
    assert json.loads(Path("out/measures.json").read_text())["alpaca"]["alpaca_win_rate"] == result["win_rate"]


def test_only_pairs_that_are_new_are_judged(place, judge):
    rows = [{"instruction": f"do {n}", "output": str(n)} for n in range(3)]
    references = [{**row, "output": "reference"} for row in rows]
    annotate(judge, rows, references, Path("a.json"))
    stored = json.loads(Path("a.json").read_text())
    stored[0]["preference"] = stored[1]["preference"] = 1.25
    Path("a.json").write_text(json.dumps(stored))
    rows[1]["output"] = "changed"
    seen = []
    result = annotate(judge, rows, references, Path("a.json"), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 3)] and result[0]["preference"] == 1.25 != result[1]["preference"]


def test_a_missing_reference_is_named(place, llama):
    Path("few.json").write_text(json.dumps([{"instruction": "Say 1", "output": "1"}]))
    found("alpaca", "answer", "out", "--instructions", "asked.json", *FAST)
    arguments = ("judge", "out/alpaca_outputs.json", "--judge", str(llama), "--reference", "few.json")
    assert "no answer to 6 instructions" in refused("eval", "alpaca", *arguments)


def test_a_run_without_answers_is_refused(place, llama):
    message = refused("eval", "alpaca", "judge", "out", "--judge", str(llama))
    assert "out: has no alpaca_outputs.json. Write it first: qlora-neft eval alpaca answer" in message


def test_a_judge_that_is_none_is_refused(place, monkeypatch):
    Path("out/alpaca_outputs.json").write_text(json.dumps(ASKED))
    arguments = ("eval", "alpaca", "judge", "out", "--instructions", "asked.json", "--judge")
    assert "--judge: no model configuration found at 'nobody/nothing'" in refused(*arguments, "nobody/nothing")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert "pipx install alpaca_eval" in refused(*arguments, "alpaca_eval")
    Path("bare.json").write_text(json.dumps([{"instruction": "Say 1"}]))
    bare = ("eval", "alpaca", "judge", "out", "--instructions", "bare.json", "--judge", "x")
    assert "--reference: the instructions come without" in refused(*bare)


def test_the_form_before_the_three_verbs_still_does_all_of_it_and_says_so(place, judge_dir):
    def old(*arguments):
        code, stdout, stderr = invoke("eval", "alpaca", *arguments)
        notice, _, rest = stderr.partition("\n")
        assert "now three verbs" in notice and "now three verbs" not in rest
        return code, stdout, rest

    asked = ("--instructions", "asked.json")
    # A judge that is none is refused before anything is answered.
    code, _, stderr = old("out", *asked, "--judge", "nobody/nothing")
    assert code == 2 and "--judge: no model" in stderr and not Path("out/alpaca_outputs.json").exists()
    result = json.loads(old("out", *asked, *FAST, "--judge", judge_dir, "--json")[1])
    assert json.loads(Path("out/measures.json").read_text())["alpaca"]["alpaca_win_rate"] == result["win_rate"]
    assert found("alpaca", "judge", "out", *asked, "--judge", judge_dir) == result
    outputs = ("--outputs", "out/alpaca_outputs.json")
    assert json.loads(old(*outputs, *asked, "--judge", judge_dir, "--json")[1]) == result
    scored = json.loads(old("--score", result["annotations"], *outputs, "--json")[1])
    assert scored == {name: value for name, value in result.items() if name not in ("annotations", "made")}
    assert old("out", *asked, *FAST) == (0, "written: out/alpaca_outputs.json\n", "")


def program(folder: Path, text: str) -> None:
    """A program named alpaca_eval; the real one asks a paid service."""
    folder.mkdir()
    path = folder / "alpaca_eval"
    path.write_text(f"#!/usr/bin/env python3\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


JUDGE = """
import json, pathlib, sys
given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
rows = [json.loads(pathlib.Path(given[name]).read_text()) for name in ("--reference_outputs", "--model_outputs")]
folder = pathlib.Path(given["--output_path"], given["--annotators_config"])
folder.mkdir(exist_ok=True)
pairs = [{**b, "output_1": a["output"], "output_2": b["output"], "preference": 1 + i % 2}
         for i, (a, b) in enumerate(zip(*rows, strict=True))]
(folder / "annotations.json").write_text(json.dumps(pairs))
rate = "61.25" if given["--fn_metric"] == "get_length_controlled_winrate" else ""
(folder / "leaderboard.csv").write_text(f",win_rate,length_controlled_winrate\\nother,1,2\\nout,50,{rate}\\n")
print("a table of its own")
"""


def test_the_alpaca_eval_package_is_given_files_and_its_verdicts_are_scored(place, tmp_path, monkeypatch):
    found("alpaca", "answer", "out", "--instructions", "asked.json", *FAST)
    arguments = ("alpaca", "judge", "out/alpaca_outputs.json", "--judge", "alpaca_eval", "--annotator", "mine")
    arguments += ("--instructions", "asked.json")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert "pipx install alpaca_eval" in refused("eval", *arguments)
    program(tmp_path / "bin", JUDGE)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/local/bin:/usr/bin:/bin")
    result = found(*arguments)
    assert (result["wins"], result["losses"], result["n"]) == (3, 4, 7)
    assert (result["made"]["judge"], result["made"]["reference"]) == ("mine", "not named in its file")
    assert isinstance(result["length_controlled"], str)  # not computed, and why
    # AlpacaEval 2's judge, first against its own reference, then against another's.
    second = ("alpaca", "judge", "out", "--judge", "alpaca_eval", "--annotator", "weighted_alpaca_eval_gpt4_turbo")
    for name, rate, told in (("gpt4_1106_preview", 61.25, 1), ("text_davinci_003", None, 2)):
        Path("reference.json").write_text(json.dumps([{**row, "generator": name} for row in ASKED]))
        code, _, stderr = invoke("eval", *second, "--reference", "reference.json", "--json")
        kept = json.loads(Path("out/measures.json").read_text())["alpaca"]
        assert code == 0 and kept.get("alpaca_length_controlled_win_rate") == rate, stderr
        assert kept["made"].items() >= {"judge": second[-1], "reference": name, "decoding": "greedy"}.items()
        assert stderr.count("judge weighted_alpaca_eval_gpt4_turbo") == told  # shut down; and a pair of no table
    program(tmp_path / "bad", "raise SystemExit(3)")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bad'}:/usr/local/bin:/usr/bin:/bin")
    code, _, stderr = invoke("eval", *arguments)
    assert code == 1 and "exit code 3" in stderr
