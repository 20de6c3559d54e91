"""Blind pairs for people: random order, the key apart, the paper's formula; and which judge belongs to which table."""

import json

import pytest
from command_line import invoke, refused

from qlora_neft.evaluation.alpaca.judges import PUBLISHED, hub_file_of, words_on

ASKED = [f"Question {n}?" for n in range(200)]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("noisy", "plain"):
        rows = [{"instruction": text, "output": f"{name} {text}", "generator": name} for text in ASKED]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


def filled(files, verdicts):
    """The study with verdicts for the model, for the other, or draws, written as people do: by place."""
    study, key = (json.loads((files / name).read_text()) for name in ("study.json", "study.key.json"))
    for pair, first, verdict in zip(study, key["first"], verdicts, strict=True):
        pair["verdict"] = 0 if verdict == "draw" else 1 if first == verdict else 2
    (files / "study.json").write_text(json.dumps(study))


def test_people_judge_blind_and_the_papers_formula_scores(files):
    code, stdout, _ = invoke("eval", "alpaca", "pairs", "noisy.json", "plain.json")
    assert code == 0 and "140 pairs" in stdout
    text, key = (files / "study.json").read_text(), json.loads((files / "study.key.json").read_text())
    assert "generator" not in text and (key["model"], key["other"]) == ("noisy", "plain")
    pairs = json.loads(text)
    assert len({pair["instruction"] for pair in pairs}) == 140 and 50 < key["first"].count("model") < 90
    for pair, first in zip(pairs, key["first"], strict=True):
        assert pair["answer_1"] == f"{'noisy' if first == 'model' else 'plain'} {pair['instruction']}"
    filled(files, ["model"] * 88 + ["draw"] * 22 + ["other"] * 30)
    code, stdout, _ = invoke("eval", "alpaca", "score", "study.json", "--key", "study.key.json", "--json")
    found = json.loads(stdout)
    assert (found["wins"], found["losses"], found["ties"]) == (88, 30, 22)
    assert round(found["wins_without_draws"], 1) == 74.6  # 88 / (140 - 22), NEFTune's human study
    assert found["made"] == {"judge": "people", "reference": "plain", "prompts": "140 blind pairs"}


def test_a_study_is_repeatable_and_its_key_is_its_own(files):
    def write(*options):
        assert invoke("eval", "alpaca", "pairs", "noisy.json", "plain.json", "--rows", "9", *options)[0] == 0
        return (files / "study.json").read_text()

    assert write() == write() != write("--seed", "1")
    invoke(
        "eval", "alpaca", "pairs", "noisy.json", "plain.json", "--rows", "9", "--output", "s2.json", "--key", "k2.json"
    )
    score = ("eval", "alpaca", "score", "study.json", "--key")
    assert "is not the key of 'study.json'" in refused(*score, "k2.json")
    pairs = json.loads((files / "study.json").read_text())
    (files / "study.json").write_text(json.dumps([{**pair, "verdict": "better"} for pair in pairs]))
    assert "pair 1: verdict must be 1 or 2" in refused(*score, "study.key.json")
    (files / "study.json").write_text(json.dumps([{**pair, "answer_1": "edited"} for pair in pairs]))
    assert "Only verdicts may be filled in" in refused(*score, "study.key.json")


def test_too_few_shared_instructions_are_refused(files):
    assert "share 200 instructions, 201" in refused(
        "eval", "alpaca", "pairs", "noisy.json", "plain.json", "--rows", "201"
    )
    same = ("--output", "x.json", "--key", "x.json")
    assert "must be another file" in refused("eval", "alpaca", "pairs", "noisy.json", "plain.json", *same)


# ---- Judges ----


def test_a_judge_goes_with_the_reference_of_its_tables():
    assert (
        hub_file_of("alpaca_eval", "alpaca_eval_gpt4") == hub_file_of("alpaca_eval", "chatgpt_fn") == "alpaca_eval.json"
    )
    assert hub_file_of("alpaca_eval", "weighted_alpaca_eval_gpt4_turbo") == "alpaca_eval_gpt4_baseline.json"
    for annotator, known in PUBLISHED.items():
        own = words_on("alpaca_eval", annotator, known.references[0])
        assert len(own) == bool(known.gone) and all("has shut down" in line for line in own)


@pytest.mark.parametrize(
    ("judge", "annotator", "reference"),
    [
        ("alpaca_eval", "alpaca_eval_gpt4", "gpt4_turbo"),
        ("alpaca_eval", "weighted_alpaca_eval_gpt4_turbo", "text_davinci_003"),
        ("alpaca_eval", "chatgpt_fn", "not named in its file"),
        ("alpaca_eval", "mine/configs.yaml", "text_davinci_003"),
        ("some/judge", "alpaca_eval_gpt4", "text_davinci_003"),
    ],
)
def test_one_judges_rate_against_anothers_reference_is_said(judge, annotator, reference):
    said = words_on(judge, annotator, reference)[0]
    assert reference in said and ("no published table" in said or "no table" in said)
