"""eval harness: lm-eval on a trained adapter and on its base, offline, on tasks made from local files."""

import importlib.util
import json
import math
import statistics

import pytest
import torch
import yaml
from command_line import invoke, never_stopped

from qlora_neft.adapter.load import load_trained
from qlora_neft.errors import UserInputError
from qlora_neft.evaluation.harness import evaluate_adapter, paired_stderr, side_by_side

HERE = {"device": "cpu", "precision": "fp32"}
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (extra: harness)"
)
QUESTIONS = [
    {"question": f"Repeat {n}", "choices": [str(n), str(n + 1), "no " * (n % 3 + 1)], "answer": n % 3}
    for n in range(24)
]


def write_task(folder, name, rows):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}\n",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, "local_one", QUESTIONS[:10])
    write_task(folder, "local_two", QUESTIONS[10:])
    metrics = [{"metric": "acc", "weight_by_size": True}]
    group = {"group": "local", "task": ["local_one", "local_two"], "aggregate_metric_list": metrics}
    (folder / "local.yaml").write_text(yaml.safe_dump(group))
    return folder


@pytest.fixture(scope="module")
def report(llama, tasks):
    return evaluate_adapter(never_stopped(llama), tasks=["local"], include_path=tasks, **HERE)


def right_answers(trained):
    """Whether the choice of the largest log-likelihood is the right one, question by question, without lm-eval."""
    found = []
    for row in QUESTIONS:
        prompt = trained.tokenizer(row["question"] + "\n", add_special_tokens=False)["input_ids"]
        scores = []
        for choice in row["choices"]:
            ids = trained.tokenizer(choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = trained.model(input_ids=torch.tensor([prompt + ids])).logits[0]
            logs = logits[len(prompt) - 1 : -1].log_softmax(-1)
            scores.append(logs.gather(1, torch.tensor(ids)[:, None]).sum().item())
        found.append(float(scores.index(max(scores)) == row["answer"]))
    return found


@needs_lm_eval
def test_accuracies_are_those_of_an_independent_computation(llama, report):
    trained = load_trained(never_stopped(llama), **HERE)
    adapter = right_answers(trained)
    with trained.base_alone():
        base = right_answers(trained)
    entries = {entry["task"]: entry for entry in report["results"]}
    assert set(entries) == {"local", "local_one", "local_two"}
    assert adapter != base  # else sides could be mixed up unseen
    for name, part in (("local", slice(None)), ("local_one", slice(10)), ("local_two", slice(10, None))):
        entry = entries[name]
        assert entry["questions"] == len(QUESTIONS[part]) and entry["num_fewshot"] == 0
        assert entry["part_of"] == (None if name == "local" else "local")
        differences = [a - b for a, b in zip(adapter[part], base[part], strict=True)]
        assert entry["adapter"]["value"] == pytest.approx(statistics.fmean(adapter[part]))
        assert entry["base"]["value"] == pytest.approx(statistics.fmean(base[part]))
        assert entry["difference"] == pytest.approx(statistics.fmean(differences))
        assert entry["difference_stderr"] == pytest.approx(statistics.stdev(differences) / math.sqrt(len(differences)))
    one = entries["local_one"]
    assert one["adapter"]["stderr"] == pytest.approx(statistics.stdev(adapter[:10]) / math.sqrt(10))


@needs_lm_eval
def test_the_verb_prints_writes_and_limits(llama, tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = str(never_stopped(llama))
    options = ("--include-path", str(tasks), "--device", "cpu", "--precision", "fp32", "--limit", "4")
    code, stdout, _ = verb(source, "--tasks", "local_one", *options, "--no-base-alone", "--json", "--output", "o.json")
    printed = json.loads(stdout)
    assert code == 0 and printed == json.loads((tmp_path / "o.json").read_text())
    [entry] = printed["results"]
    assert entry["questions"] == 4 and printed["limit"] == 4 and "base" not in entry
    code, stdout, _ = verb(source, "--tasks", "local", *options)
    assert code == 0 and "±" in stdout and "difference" in stdout
    assert "the first 4 questions of each task only" in stdout
    assert "local_one" not in stdout  # the group's own line stands for it


@needs_lm_eval
def test_wrong_input_is_told(llama, tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = str(never_stopped(llama))
    assert "--tasks: lm-eval has no task local_three" in refused(source, "--tasks", "local_three,local_one")
    assert "--include-path: no folder" in refused(source, "--tasks", "local_one", "--include-path", "nowhere")
    assert "--output: there is no folder" in refused(source, "--output", "nowhere/a.json")
    assert "no such folder" in refused("./nowhere", "--tasks", "local_one")
    assert "--device" in refused(source, "--device", "abacus")


@needs_lm_eval
def test_data_that_cannot_be_read_is_a_failed_run(llama, tasks, tmp_path):
    write_task(tmp_path, "gone", QUESTIONS[:2])
    (tmp_path / "gone.jsonl").unlink()
    code, _, stderr = verb(
        str(never_stopped(llama)), "--tasks", "gone", "--include-path", str(tmp_path), "--device", "cpu"
    )
    assert code == 1 and "gone: the data of a task cannot be read" in stderr


def test_without_lm_eval_the_extra_is_named(llama, monkeypatch):
    run = never_stopped(llama)  # training looks for installed packages too
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserInputError, match=r"qlora-neft\[harness\]"):
        evaluate_adapter(run, tasks=["arc_easy"], **HERE)


def test_the_paired_error_is_of_the_same_questions():
    a, b = [1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]
    assert paired_stderr(a, b, 0.5) == pytest.approx(statistics.stdev([1, 0, 0, 1]) / 2)
    assert paired_stderr(a, a, 0.0) == 0
    assert paired_stderr(a, b, 0.4) is None  # no mean over questions
    assert paired_stderr(a, b[:3], 0.5) is None and paired_stderr([], [], 0.0) is None


def test_metrics_of_several_filters_are_kept_apart():
    def result(strict, flexible):
        samples = [
            {"filter": name, "exact_match": value}
            for name, values in (("strict", strict), ("flexible", flexible))
            for value in values
        ]
        metrics = {"alias": "x", "exact_match,strict": statistics.fmean(strict), "exact_match_stderr,strict": 0.25}
        metrics |= {"exact_match,flexible": statistics.fmean(flexible), "exact_match_stderr,flexible": "N/A"}
        return {
            "results": {"x": metrics},
            "samples": {"x": samples},
            "n-shot": {"x": 5},
            "n-samples": {"x": {"original": 9, "effective": 3}},
            "group_subtasks": {"x": []},
        }

    measured = {"adapter": [result([1, 1, 0], [1, 1, 1])], "base": [result([0, 1, 0], [0, 0, 1])]}
    strict, flexible = side_by_side(measured)
    assert strict["metric"] == "exact_match (strict)" and strict["questions"] == 3
    assert strict["adapter"] == {"value": pytest.approx(2 / 3), "stderr": 0.25}
    assert flexible["adapter"] == {"value": 1, "stderr": None}
    assert flexible["difference_stderr"] == pytest.approx(statistics.stdev([1, 1, 0]) / math.sqrt(3))


def verb(*arguments):
    return invoke("eval", "harness", *arguments)


def refused(*arguments):
    code, _, stderr = verb(*arguments)
    assert code == 2, stderr
    return stderr
