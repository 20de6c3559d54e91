"""With --json an error is JSON on stdout too, one document, taken apart for programs; stderr says it as always."""

import json

import pytest
from test_cli import invoke

from qlora_neft.errors import UserInputError, as_record, problem_of


@pytest.mark.parametrize(
    ("line", "place", "key", "remedy"),
    [
        ("mine.yaml:7: lora.r: expected whole number >= 1, got 0. Write 8.", "mine.yaml:7", "lora.r", "Write 8."),
        ("override lora.r=0: lora.r: expected whole number >= 1, got 0.", "override lora.r=0", "lora.r", None),
        ("--device: must be auto, cpu or cuda, got 'tpu'.", None, "--device", None),
        ("out: holds no adapter. Give the --output-dir of a run.", None, "out", "Give the --output-dir of a run."),
        (
            "override lora.rank=1: unknown key. Did you mean lora.r?",
            "override lora.rank=1",
            "lora.rank",
            "Did you mean lora.r?",
        ),
        ("a folder/x.yaml: no such file.", None, None, None),
        ("nothing of the kind", None, None, None),
    ],
)
def test_a_message_is_taken_apart(line, place, key, remedy):
    assert problem_of(line) == {"place": place, "key": key, "message": line, "remedy": remedy}


def test_an_error_is_a_record():
    found = as_record(UserInputError("a: b. C."), 2)["error"]
    assert (found["code"], found["message"], found["problems"][0]["key"]) == (2, "a: b. C.", "a")


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (["show", "demo", "lora.r=0", "train.seed=-1", "--json"], ["lora.r", "train.seed"]),
        (["show", "demmo", "--json"], ["demmo"]),
        (["preview", "demo", "lora.rank=1", "--json"], ["lora.rank"]),
        (["diff", "demo", "demo", "lora.r=0", "--json"], ["lora.r"]),
    ],
)
def test_every_problem_is_one_object_on_stdout(arguments, keys):
    result = invoke(*arguments)
    error = json.loads(result.stdout)["error"]
    assert result.exit_code == error["code"] == 2
    assert [problem["key"] for problem in error["problems"]] == keys
    assert result.stderr.strip().startswith("error: ") and error["message"] in result.stderr


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["train", "demo", "--json"], "--output-dir"),
        (["fit", "demo", "--json", "--vran", "8GiB"], "--vran"),
        (["tune", "demo", "--steps", "0", "--json"], "--steps"),
        (["doctor", "--json", "--picture"], "--picture"),
        (["shows", "demo", "--json"], None),
        (["eval", "losses", "--json"], None),
    ],
)
def test_so_is_an_error_in_the_command_line_itself(arguments, key):
    result = invoke(*arguments)
    error = json.loads(result.stdout)["error"]
    [problem] = error["problems"]
    assert result.exit_code == error["code"] == 2
    assert problem["key"] == key and problem["message"] in result.stderr and "--help" in problem["remedy"]
    assert invoke(*(word for word in arguments if word != "--json")).stdout == ""


def test_a_verb_that_says_what_is_wrong_in_its_own_json_says_it_once():
    result = invoke("validate", "demo", "lora.r=0", "--json")
    [found] = json.loads(result.stdout)
    assert result.exit_code == 2 and not found["ok"] and len(found["problems"]) == 1


def test_without_the_option_stdout_stays_empty():
    assert invoke("show", "demo", "lora.r=0").stdout == ""


def test_a_preview_with_problems_is_one_document(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": 1, "output": "b"}\n')
    result = invoke(
        "preview", "demo", f"data.path={tmp_path / 'rows.jsonl'}", "data.eval_path=null", "machine={}", "--json"
    )
    assert result.exit_code == 2 and len(json.loads(result.stdout)["problems"]) == 1
