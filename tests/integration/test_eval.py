"""The measures on a run's model: losses, answers to training prompts, AlpacaEval from instructions to a score."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import HELD_OUT, ROWS, contents, invoke, never_stopped, refused, summary
from eval_place import ASKED, FAST, OTHER, found, make_place

from qlora_neft.adapter.folder import find_adapter
from qlora_neft.adapter.load import load_trained, tokenizer_of_adapter
from qlora_neft.errors import RunInterrupted
from qlora_neft.evaluation.alpaca.answer import answer, answers_file
from qlora_neft.evaluation.overlap import rouge_l
from qlora_neft.generation.answers import questions
from qlora_neft.generation.decode import Decoding
from qlora_neft.generation.generate import answer_texts
from qlora_neft.run_folder.stop import StopNow
from qlora_neft.runner.run_data import recipe_data


@pytest.fixture
def place(llama, tmp_path, monkeypatch):
    """A fresh copy, the current directory."""
    monkeypatch.chdir(make_place(llama, tmp_path / "run"))


@pytest.fixture(scope="module")
def trained(llama):
    return load_trained(never_stopped(llama), device="cpu", precision="fp32")


# ---- eval loss ----


def test_losses_are_those_that_training_reported(place):
    reported = summary("out")
    first = {entry["set"]: entry for entry in found("loss", "out", "--rows", "16")["sets"]}  # training's fixed slice
    sets = {entry["set"]: entry for entry in found("loss", "out")["sets"]}
    assert (sets["train"]["rows"], sets["held out"]["rows"]) == (len(ROWS), len(HELD_OUT))
    for sets_, name, key in ((first, "train", "clean_train_loss"), (sets, "held out", "held_out_loss")):
        assert sets_[name]["adapters"]["out"] == pytest.approx(reported["after"][key], abs=1e-6)
        assert sets_[name]["base"] == pytest.approx(reported["before"][key], abs=1e-6)  # LoRA begins at the base
    kept = json.loads(Path("out/measures.json").read_text())["loss"]
    assert {name: entry["rows"] for name, entry in kept.pop("made").items()} == {
        "whole_train_loss": len(ROWS),
        "held_out_loss": len(HELD_OUT),
    }
    assert kept == {
        "whole_train_loss": sets["train"]["adapters"]["out"],
        "held_out_loss": sets["held out"]["adapters"]["out"],
    }


def test_the_loss_of_other_data_is_the_mean_over_its_tokens(place, trained):
    [_, _, entry] = found("loss", "out", "--data", "far=other.jsonl")["sets"]
    total = tokens = 0
    for row in OTHER:
        prompt = trained.prompts.ids([{"role": "user", "content": row["instruction"]}])
        answer_ids = [*row["output"].encode()]
        ids = [*prompt, *trained.tokenizer(row["output"], add_special_tokens=False)["input_ids"], 258]
        assert len(ids) == len(prompt) + len(answer_ids) + 1
        with torch.no_grad():
            logits = trained.model(input_ids=torch.tensor([ids])).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
        total, tokens = total + losses[len(prompt) - 1 :].sum().item(), tokens + len(ids) - len(prompt)
    assert (entry["set"], entry["rows"], entry["tokens"]) == ("far", 4, tokens)
    assert entry["adapters"]["out"] == pytest.approx(total / tokens, abs=1e-5)


def test_batches_change_no_loss(place):
    one, eight = (found("loss", "out", "--batch-size", size)["sets"] for size in ("1", "8"))
    for a, b in zip(one, eight, strict=True):
        assert a["adapters"]["out"] == pytest.approx(b["adapters"]["out"], abs=1e-5)


def test_runs_stand_side_by_side(place):
    shutil.copytree("out", "again")
    code, stdout, _ = invoke("eval", "loss", "out", "again", "--rows", "2")
    heading, train, held_out = (line.split() for line in stdout.splitlines())
    assert code == 0 and heading[-3:] == ["base", "out", "again"]
    assert train[1] == "2" and train[-1] == train[-2] != train[-3] and held_out[:2] == ["held", "out"]
    assert not Path("out/measures.json").exists()  # of a part nothing is kept


# ---- eval overfit ----


def test_answers_to_training_prompts_are_compared_with_what_was_trained(place):
    result = found("overfit", "out", "--rows", "5", "--max-new-tokens", "20", "--answers")["out"]
    assert [answer["reference"] for answer in result["answers"]] == [row["output"] for row in ROWS[:5]]
    texts, references = ([answer[key] for answer in result["answers"]] for key in ("text", "reference"))
    assert result["rows"] == 5 and result["rouge_l"] == pytest.approx(sum(rouge_l(texts, references)) / 5)
    alone = found("overfit", "out", "--rows", "5", "--max-new-tokens", "20", "--batch-size", "1", "--answers")["out"]
    assert alone["answers"] == result["answers"]
    assert json.loads(Path("out/measures.json").read_text())["overfit"]["train_prompts_rouge_l"] == result["rouge_l"]
    code, stdout, _ = invoke("eval", "overfit", "out", "--rows", "2", "--max-new-tokens", "4")
    assert code == 0 and "ROUGE-L" in stdout


def test_data_that_has_moved_is_named(place):
    Path("train.jsonl").rename("moved.jsonl")
    assert "data.path: no file" in refused("eval", "overfit", "out")
    assert found("overfit", "out", "--rows", "1", "--max-new-tokens", "2", "--set", "data.path=moved.jsonl")


# ---- eval alpaca, eval text ----


def test_answers_are_written_in_the_official_format(place):
    found("alpaca", "answer", "out", "--instructions", "asked.json", *FAST)
    rows = json.loads(Path("out/alpaca_outputs.json").read_text())
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in ASKED]
    for row in rows:
        assert (row["generator"], row["dataset"], row["datasplit"]) == ("out", "mine", "eval")
        assert isinstance(row["output"], str) and json.loads(row["metadata"])["repetition_penalty"] == 1.2
    result = found("text", "out", "--instructions", "asked.json", "--chunk", "4", *FAST)
    assert result["characters"] == pytest.approx(sum(len(row["output"]) for row in rows) / 7)


def test_an_answer_is_the_models_own(place, trained):
    found("alpaca", "answer", "out", "--instructions", "asked.json", "--repetition-penalty", "1", *FAST)
    row = json.loads(Path("out/alpaca_outputs.json").read_text())[3]
    ids = trained.prompts.ids([{"role": "user", "content": row["instruction"]}])
    for _ in range(12):
        with torch.no_grad():
            ids.append(trained.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    said = ids[-12:][: ids[-12:].index(258)] if 258 in ids[-12:] else ids[-12:]
    assert row["output"] == trained.tokenizer.decode(said, skip_special_tokens=True)


def test_a_meta_prompt_is_asked_and_not_written(place, trained):
    def outputs(file, *options):
        found("alpaca", "answer", "out", "--instructions", file, "--output", "answers.json", *options, *FAST)
        rows = json.loads(Path("answers.json").read_text())
        Path("answers.json").unlink()
        return [row["instruction"] for row in rows], [row["output"] for row in rows]

    long = [{"instruction": f"{row['instruction']} Be long"} for row in ASKED]
    Path("long.json").write_text(json.dumps(long))
    said, answers = outputs("asked.json", "--meta-prompt", "Be long")
    assert said == [row["instruction"] for row in ASKED]
    assert answers == outputs("long.json")[1] != outputs("asked.json")[1]


def test_answers_may_be_drawn_and_have_a_least_length(place):
    asked = ("--instructions", "asked.json", "--output", "answers.json", *FAST)
    drawing = ("--sample", "--temperature", "5", "--seed", "1")
    assert "--temperature: no effect without --sample" in refused(
        "eval", "alpaca", "answer", "out", *asked, "--temperature", "5"
    )
    assert "--min-new-tokens: must be" in refused("eval", "alpaca", "answer", "out", *asked, "--min-new-tokens", "13")
    found("alpaca", "answer", "out", *asked, *drawing, "--min-new-tokens", "12")
    rows = json.loads(Path("answers.json").read_text())
    made_by = json.loads(rows[0]["metadata"])
    assert (made_by["do_sample"], made_by["temperature"], made_by["min_new_tokens"]) == (True, 5.0, 12)
    assert "seed was 1, is now 0" in refused(
        "eval", "alpaca", "answer", "out", *asked, *drawing[:3], "--min-new-tokens", "12"
    )


def test_what_was_answered_is_not_answered_again(place, trained):
    path, decoding, folder = Path("answers.json"), Decoding(max_new_tokens=12), find_adapter("out")

    def stop(done, total):
        raise StopNow(15)

    file = answers_file(path, folder, ASKED, generator="out", decoding=decoding)
    with pytest.raises(RunInterrupted, match="stopped after 3 answers, kept in 'answers") as stopped:
        answer(trained, file, ASKED, decoding, batch_size=3, progress=stop)
    assert stopped.value.signal == 15
    begun = json.loads(path.read_text())
    assert len(begun) == 3  # one batch of the three
    begun[0]["output"] = "kept"
    path.write_text(json.dumps(begun))
    asked = []
    file = answers_file(path, folder, ASKED, generator="out", decoding=decoding)
    answer(trained, file, ASKED, decoding, batch_size=3, progress=lambda done, total: asked.append((done, total)))
    assert asked == [(6, 7), (7, 7)]
    rows = json.loads(path.read_text())
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in ASKED]
    assert rows[0]["output"] == "kept" and [row["output"] for row in rows[1:3]] == [row["output"] for row in begun[1:]]


def test_answers_made_otherwise_are_not_mixed(place):
    found("alpaca", "answer", "out", "--instructions", "asked.json", *FAST)
    more = ("--instructions", "asked.json", "--max-new-tokens", "13")
    assert "max_new_tokens was 12, is now 13" in refused("eval", "alpaca", "answer", "out", *more)
    with open("out/adapter_model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    message = refused("eval", "alpaca", "answer", "out", "--instructions", "asked.json", *FAST)
    assert "adapter_sha256 was" in message and "delete this one" in message


def test_a_prompt_that_fills_the_context_is_answered_with_nothing(place):
    Path("long.json").write_text(json.dumps([{"instruction": "x" * 300}, {"instruction": "Say 1"}]))
    code, _, stderr = invoke(
        "eval", "alpaca", "answer", "out", "--instructions", "long.json", "--output", "a.json", *FAST
    )
    assert code == 0 and "1 instructions fill the model's context" in stderr
    assert json.loads(Path("a.json").read_text())[0]["output"] == ""


def test_the_instructions_are_checked(place):
    def message(rows):
        Path("bad.json").write_text(json.dumps(rows))
        return refused("eval", "alpaca", "answer", "out", "--instructions", "bad.json")

    assert "entry 1 must have instruction" in message([{"output": "a"}])
    assert "1 instructions twice" in message([ASKED[0], ASKED[0]])
    assert "from the Hub" in refused("eval", "alpaca", "answer", "out")  # offline here
    assert "no folder 'none'" in refused(
        "eval", "alpaca", "answer", "out", "--instructions", "asked.json", "--output", "none/a"
    )


def test_what_is_no_run_is_refused_before_anything_is_loaded(place):
    before = contents(".")
    assert "no such folder" in refused("eval", "loss", "./absent")
    assert "named twice" in refused("eval", "loss", "out", "out")
    assert "NAME=" in refused("eval", "loss", "out", "--data", "train=other.jsonl")
    (Path("out") / "recipe.yaml").rename("kept.yaml")
    assert "holds no recipe.yaml" in refused("eval", "overfit", "out")
    Path("kept.yaml").rename("out/recipe.yaml")
    assert contents(".") == before


# ---- Untuned models ----


def test_an_untuned_model_is_answered_with_and_measured(place, llama):
    asked = ("--instructions", "asked.json", *FAST)
    code, stdout, stderr = invoke("eval", "alpaca", "answer", str(llama), *asked)
    file = Path(f"{llama.name}.alpaca_outputs.json")  # here, not in the model's folder
    assert code == 0 and str(file) in stdout and "asked in the prompt template alpaca" in stderr
    rows = json.loads(file.read_text())
    made_by = json.loads(rows[0]["metadata"])
    assert (made_by["weights"], made_by["prompt_template"], rows[0]["generator"]) == ("nf4", "alpaca", llama.name)
    result = found("text", str(llama), "--chunk", "4", *asked)  # answered already
    assert result["characters"] == pytest.approx(sum(len(row["output"]) for row in rows) / 7)
    assert not (llama / "measures.json").exists()
    assert "prompt_template was 'alpaca', is now 'vicuna'" in refused(
        "eval", "alpaca", "answer", str(llama), *asked, "--prompt-template", "vicuna"
    )
    assert "an adapter has its own" in refused("eval", "alpaca", "answer", "out", *asked, "--prompt-template", "vicuna")


def test_an_untuned_model_is_the_adapters_base(place, trained, llama):
    asked = ("--instructions", "asked.json", *FAST, "--repetition-penalty", "1")
    found("alpaca", "answer", str(llama), *asked)
    row = json.loads(Path(f"{llama.name}.alpaca_outputs.json").read_text())[2]
    prompt = trained.prompts.ids([{"role": "user", "content": row["instruction"]}])
    with trained.base_alone():
        [(_, text)] = answer_texts(trained, [prompt], Decoding(max_new_tokens=12), batch_size=1)
    assert row["output"] == text


def test_a_runs_own_held_out_prompts_may_be_asked(place):
    result = found("text", "out", "--instructions", "held-out", "--chunk", "4", *FAST)
    rows = json.loads(Path("out/held_out_outputs.json").read_text())
    assert [row["instruction"] for row in rows] == [q.prompt for q in held_out_questions("out")]
    assert result["outputs"] == len(HELD_OUT) == len(rows)
    made = json.loads(Path("out/measures.json").read_text())["text"]["made"]
    assert (made["prompts"], made["chunk"], made["repetition_penalty"]) == ("2 held-out prompts", 4, 1.2)
    few = found("text", "out", "--instructions", "held-out", "--rows", "1", "--chunk", "4", *FAST)
    assert few["outputs"] == 1  # of the two in the file, the one that was asked


def held_out_questions(source):
    folder = find_adapter(source)
    tokenizer = tokenizer_of_adapter(folder)
    data = recipe_data(folder, tokenizer)
    return questions(data.eval, tokenizer, 99, data.stop_token_ids)


def test_losses_of_single_rows_and_their_histogram(place):
    [train, held_out] = found("loss", "out", "--samples", "--picture", "samples.png")["sets"]
    for entry, count in ((train, len(ROWS)), (held_out, len(HELD_OUT))):
        assert [len(entry["samples"][name]) for name in ("base", "out")] == [count, count]
    pairs = zip(held_out["samples"]["out"], (len(str(row["output"])) + 1 for row in HELD_OUT), strict=True)
    total = sum(loss * tokens for loss, tokens in pairs)
    assert total / held_out["tokens"] == pytest.approx(held_out["adapters"]["out"], abs=1e-6)
    assert Path("samples.png").read_bytes().startswith(b"\x89PNG")
    assert "samples" not in found("loss", "out", "--rows", "1")["sets"][0]
