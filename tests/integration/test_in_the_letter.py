"""A tiny twin of `llama2-7b-alpaca` trains in the letter of QLoRA: what its rows become."""

import json

from tiny import byte_tokenizer

from qlora_neft import load_recipe
from qlora_neft.data.prepare import prepare_data
from qlora_neft.runner.run import run

ROWS = [{"instruction": f"Repeat {n}", "input": "", "output": "ab " * (8 + 30 * (n % 2))} for n in range(12)]


def test_a_tiny_twin_trains(llama, tmp_path):
    (tmp_path / "alpaca.json").write_text(json.dumps(ROWS))
    recipe = load_recipe(
        "llama2-7b-alpaca",
        [
            "@qlora",
            f"model.name_or_path={llama}",
            f"data.path={tmp_path / 'alpaca.json'}",
            "data.max_length=240",  # the twin's context is 256 bytes, a fifth of QLoRA's tokens
            "data.max_prompt_length=200",
            "data.max_response_length=40",
            "train.effective_batch_size=4",
            "train.max_steps=2",
            "machine.eval_answers=0",
        ],
    )
    run(recipe, tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["recipe"]["train"]["loss_mean"] == "sequences"
    [source] = json.loads((tmp_path / "out" / "data_report.json").read_text())["sources"]
    assert source["prompt_template"] == "alpaca-space"


def test_a_long_response_is_cut_at_its_own_length_and_loses_its_end(tmp_path):
    rows = [{**row, "output": "ab" * (90 if number % 2 else 9)} for number, row in enumerate(ROWS)]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    data = load_recipe("llama2-7b-alpaca", ["@qlora", f"data.path={tmp_path / 'alpaca.json'}"]).data
    prepared = prepare_data(byte_tokenizer(), data).train
    end = byte_tokenizer().eos_token_id
    found = {(sum(label != -100 for label in row["labels"]), row["input_ids"][-1] == end) for row in prepared}
    assert found == {(128, False), (19, True)}  # QLoRA's 128, and a whole response with its end token
