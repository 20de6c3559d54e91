"""A run from recipe to adapter: what it writes, that it repeats itself, and that what is saved is what was trained."""

from __future__ import annotations

import hashlib
import json
import math
import shutil

import pytest
import torch
import yaml
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from tiny import byte_tokenizer, mixed_rows, tiny_trainer
from transformers import AutoTokenizer

from qlora_neft import load_recipe
from qlora_neft.base.lora import LARGE_MODEL_PARAMETERS, default_lora_config
from qlora_neft.base.nf4 import load_nf4_base
from qlora_neft.data.encode import Encoder
from qlora_neft.data.examples import content_hash
from qlora_neft.data.formats import to_example
from qlora_neft.data.prepare import unit_interval
from qlora_neft.data.templates import AlpacaTemplate
from qlora_neft.display.plots import plot_losses
from qlora_neft.errors import UserInputError
from qlora_neft.files import finite, write_json
from qlora_neft.generation.answers import Answer, Question, exact_match, greedy_answers, questions
from qlora_neft.run_folder.metrics import versions
from qlora_neft.run_folder.record import RunFile, RunSummary
from qlora_neft.runner.run import run

NUM_ROWS, BATCH, MAX_LENGTH = 10, 4, 250
TRAIN = [
    {"instruction": f"Repeat {n}", "input": "loudly" * (n % 2), "output": f"{n} " * (1 + n % 3)}
    for n in range(NUM_ROWS)
]
HELD_OUT = [{"instruction": f"Repeat {n}", "input": "", "output": str(n)} for n in (77, 88)]


def sequences(rows):
    """What the rows should become."""
    template = AlpacaTemplate("</s>")
    pieces = [template.render(to_example(row, "alpaca")[0]) for row in rows]
    return Encoder(byte_tokenizer(), adds_special_tokens=True).encode(pieces)


def hashes(rows):
    return [content_hash(to_example(row, "alpaca")[0]) for row in rows]


def question(prompt):
    return Question(byte_tokenizer()(prompt)["input_ids"], [65], prompt, "a")


def fingerprint(rows):
    return hashlib.sha256(b"".join(hashes(rows))).hexdigest()


def recipe_for(model, folder, *overrides):
    """A recipe of three steps on ten rows, its files in ``folder``."""
    for name, rows in (("train.jsonl", TRAIN), ("held.jsonl", HELD_OUT)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": {"name_or_path": str(model)},
        "quantization": {},
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"},
        "neftune": {"noise_alpha": 5.0},
        "data": {
            "path": str(folder / "train.jsonl"),
            "eval_path": str(folder / "held.jsonl"),
            "max_length": MAX_LENGTH,
        },
        "train": {
            "effective_batch_size": BATCH,
            "num_train_epochs": 1,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "optim": "paged_adamw_32bit",
            "max_grad_norm": 0.3,
            "seed": 3,
        },
        "machine": {"device": "cpu", "precision": "fp32", "eval_answers": 1},
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(values))
    return load_recipe(folder / "mine.yaml", overrides)


def without_held_out(*more):
    return ("data.eval_path=null", "machine.eval_answers=auto", *more)


@pytest.fixture(scope="module")
def finished(llama, tmp_path_factory):
    """One finished run: its folder, its recipe, its summary."""
    folder = tmp_path_factory.mktemp("run")
    recipe = recipe_for(llama, folder)
    return folder / "out", recipe, run(recipe, folder / "out")


def metrics_of(output_dir):
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def adapter_of(output_dir):
    return (output_dir / "adapter_model.safetensors").read_bytes()


# ---- The best weights ----

BEST = ("train.keep=best", "train.early_stopping_patience=2", "train.selection_steps=1", "train.num_train_epochs=6")
SOON_WORSE = (*BEST, "train.learning_rate=0.1", "machine.eval_answers=0")


@pytest.fixture(scope="module")
def selected(llama, tmp_path_factory):
    """A run that ended early, with the weights of an earlier step."""
    folder = tmp_path_factory.mktemp("selected")
    recipe = recipe_for(llama, folder, *SOON_WORSE)
    return folder, recipe, run(recipe, folder / "out")


def test_a_run_says_whose_weights_it_ended_with(selected):
    folder, _, summary = selected
    found = RunSummary.of(summary).selection
    assert summary["steps"] == found.step + 2 < found.planned_steps == 18 and found.stopped_early
    assert summary["after"]["held_out_loss"] == pytest.approx(found.held_out_loss, abs=1e-6)
    judged = {entry["step"]: entry["eval_loss"] for entry in metrics_of(folder / "out") if "eval_loss" in entry}
    assert list(judged) == list(range(summary["steps"] + 1)) and found.held_out_loss == judged[found.step]
    assert metrics_of(folder / "out")[-1]["kept_step"] == found.step
    assert not (folder / "out" / "checkpoint-best").exists()
    [checkpoint] = (folder / "out").glob(f"checkpoint-{summary['steps']}")
    assert (checkpoint / "checkpoint-best" / "adapter_model.safetensors").read_bytes() == adapter_of(folder / "out")


def test_a_run_that_ended_early_is_finished_and_its_lost_result_is_made_again(selected, tmp_path, llama):
    folder, recipe, summary = selected
    before = (folder / "out" / "summary.json").stat().st_mtime_ns
    assert run(recipe, folder / "out")["selection"] == summary["selection"]
    assert (folder / "out" / "summary.json").stat().st_mtime_ns == before
    out = tmp_path / "out"
    shutil.copytree(folder / "out", out)
    (out / "adapter_model.safetensors").unlink()
    again = run(recipe, out, quiet=True)
    assert again["selection"] == summary["selection"] and adapter_of(out) == adapter_of(folder / "out")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.keep=last", 'train.keep: "best" before'),
        ("train.early_stopping_patience=3", "train.early_stopping_patience: 2 before, 3 now"),
        ("train.selection_steps=2", "train.selection_steps"),
        ("train.early_stopping_threshold=0", "train.early_stopping_threshold"),
    ],
)
def test_a_resume_by_another_rule_is_refused(selected, llama, override, said):
    folder = selected[0]
    with pytest.raises(UserInputError, match=said):
        run(recipe_for(llama, folder, *SOON_WORSE, override), folder / "out")


def test_the_rows_that_decide_are_part_of_the_run(selected, llama, tmp_path):
    folder, _, summary = selected
    out, moved = tmp_path / "out", tmp_path / "moved.jsonl"
    shutil.copytree(folder / "out", out)
    (out / "summary.json").unlink()
    shutil.copy(folder / "held.jsonl", moved)
    elsewhere = recipe_for(llama, folder, *SOON_WORSE, f"data.eval_path={moved}")
    assert run(elsewhere, out)["selection"] == summary["selection"]  # a path is no part of it
    (out / "summary.json").unlink()
    moved.write_text(json.dumps(HELD_OUT[0]) + "\n")
    with pytest.raises(UserInputError, match=r"data\.eval_path: the held-out rows are not those"):
        run(elsewhere, out)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (without_held_out("train.keep=best"), "train.keep: goes by the loss on held-out rows"),
        (without_held_out("train.early_stopping_patience=2"), "train.early_stopping_patience: goes by the loss"),
        (("train.selection_steps=5",), "train.selection_steps: has no effect without keep: best"),
        (("train.early_stopping_threshold=0",), "train.early_stopping_threshold: has no effect"),
        (("train.keep=best", "train.selection_steps=2.5"), "a whole number of steps, or a share below 1, got 2.5"),
    ],
)
def test_a_selection_that_cannot_be_is_refused(llama, tmp_path, overrides, said):
    with pytest.raises(UserInputError, match=said):
        recipe_for(llama, tmp_path, *overrides)


# ---- What is written ----


def test_every_file_of_a_run_is_there_and_no_pickle(finished):
    output_dir = finished[0]
    files = {path.relative_to(output_dir).as_posix() for path in output_dir.rglob("*") if path.is_file()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    records = {"recipe.yaml", "run.json", "metrics.jsonl", "live.jsonl", "summary.json", "data_report.json"}
    records |= {"answers.json", "loss.png", "lengths.png"}
    kept = {name for name in files if name.startswith("checkpoint-")}
    assert {name.partition("/")[0] for name in kept} == {"checkpoint-3"}  # of the last step, before it was measured
    assert not any(name.endswith((".bin", ".pkl")) for name in files)
    assert files - kept - {"special_tokens_map.json", "chat_template.jinja"} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        *tokenizer,
        *records,
    }


def test_the_saved_recipe_is_the_recipe(finished):
    output_dir, recipe, summary = finished
    assert load_recipe(output_dir / "recipe.yaml") == recipe
    assert summary["recipe"] == recipe.to_dict()
    pieces = summary["fast_path"]
    assert (
        pieces["fused_norms"] > 0 and pieces["fused_rotary"] > 0 and pieces["fused_layers"] > 0
    )  # on a CPU too; kernels are for GPUs
    assert not pieces["triton_kernels"] and pieces["liger"] == [] and not pieces["torch_compile"]


def test_the_saved_tokenizer_is_the_tokenizer(finished):
    tokenizer = AutoTokenizer.from_pretrained(finished[0])
    assert tokenizer("Hello </s>")["input_ids"] == byte_tokenizer()("Hello </s>")["input_ids"]


def test_the_adapter_config_is_sorted_and_the_adapter_is_float32(finished):
    text = (finished[0] / "adapter_config.json").read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True) + "\n"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.1)
    weights = load_file(finished[0] / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert len(weights) == 2 * 7 * 2  # A and B, seven linear layers, two blocks: not the head
    assert all(weights[name].abs().max() > 0 for name in weights if "lora_B" in name)  # every one has learned


def test_metrics_hold_train_clean_and_held_out_losses_of_a_growing_step(finished):
    output_dir, _, summary = finished
    entries = metrics_of(output_dir)
    assert [entry["step"] for entry in entries] == sorted(entry["step"] for entry in entries)
    for key in ("loss", "clean_loss", "eval_loss"):
        values = {entry["step"]: entry[key] for entry in entries if key in entry}
        first = 1 if key == "loss" else 0  # the clean ones are measured before training as well
        assert list(values) == list(range(first, summary["steps"] + 1)), key
        assert all(math.isfinite(value) and value > 0 for value in values.values())
    assert entries[0]["eval_loss"] == pytest.approx(summary["before"]["held_out_loss"], rel=1e-6)
    assert [entry for entry in entries if "clean_loss" in entry][-1]["clean_loss"] == pytest.approx(
        summary["after"]["clean_train_loss"], rel=1e-6
    )
    assert [entry for entry in entries if "eval_loss" in entry][-1]["eval_loss"] == pytest.approx(
        summary["after"]["held_out_loss"], rel=1e-6
    )


def test_metrics_hold_the_measured_noise(finished):
    noisy = [entry for entry in metrics_of(finished[0]) if "neftune_norm" in entry]
    assert noisy
    for entry in noisy:
        assert entry["neftune_expected_norm"] == pytest.approx(5 / math.sqrt(3))
        assert entry["neftune_norm"] == pytest.approx(5 / math.sqrt(3), rel=0.05)
        assert entry["neftune_noise_to_embedding"] > 0


def test_the_summary_on_disk_is_the_one_returned_and_says_what_was_run(finished):
    output_dir, recipe, summary = finished
    written = json.loads((output_dir / "summary.json").read_text())
    assert written == json.loads(json.dumps(summary))
    assert RunSummary.model_validate(written).model_dump(mode="json", exclude_unset=True) == written  # no key untyped
    about = json.loads((output_dir / "run.json").read_text())
    assert RunFile.model_validate(about).model_dump(mode="json", exclude_unset=True) == about
    assert not list(output_dir.glob("*.part"))
    assert summary["status"] == "done"
    assert summary["seed"] == recipe.train.seed == 3
    assert summary["versions"] == versions()
    assert {"python", "torch", "transformers", "trl", "peft", "bitsandbytes"} <= summary["versions"].keys()
    assert summary["base_unchanged"] is True
    assert 0 < summary["train_seconds"] <= summary["wall_seconds"]
    assert summary["peak_memory"]["host_bytes"] > 100e6  # torch alone takes more
    assert summary["hardware"]["device"] == "cpu"


def test_the_summary_counts_what_was_seen(finished):
    _, _, summary = finished
    rows = sequences(TRAIN)
    tokens = sum(len(row.ids) for row in rows)
    trained = sum(row.num_trained() for row in rows)
    assert summary["steps"] == math.ceil(NUM_ROWS / BATCH) == 3
    assert (summary["tokens_seen"], summary["trained_tokens_seen"]) == (tokens, trained)
    counts = {"rows": NUM_ROWS, "truncated": 0, "dropped": 0, "duplicates": 0, "tokens": tokens}
    counts |= {"trained_tokens": trained, "ended": NUM_ROWS, "sha256": fingerprint(TRAIN)}
    assert {name: summary["data"]["train"][name] for name in counts} == counts
    assert summary["data"]["eval"]["rows"] == len(HELD_OUT)
    assert summary["data"]["eval"]["sha256"] == fingerprint(HELD_OUT)


def test_the_data_report_stands_beside_the_summary(finished):
    output_dir, _, summary = finished
    report = json.loads((output_dir / "data_report.json").read_text())
    assert (report["problems"], report["truncated"], report["rows"]) == ([], 0, NUM_ROWS)
    assert report["trained_tokens"] == summary["trained_tokens_seen"]
    assert 0 <= report["train"]["padding_waste"]["as_run"] <= report["train"]["padding_waste"]["random_batches"] < 1
    assert (output_dir / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_the_summary_counts_parameters(finished, llama):
    summary = finished[2]
    weights = load_file(finished[0] / "adapter_model.safetensors")
    assert summary["lora_parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert summary["parameters"] == sum(tensor.numel() for tensor in load_file(llama / "model.safetensors").values())


def test_the_loss_curves_are_a_png(finished):
    image = (finished[0] / "loss.png").read_bytes()
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    assert image.rstrip().endswith(b"IEND\xaeB`\x82")
    width, height = (int.from_bytes(image[start : start + 4], "big") for start in (16, 20))
    assert width > height > 400


def test_no_secret_of_the_environment_is_written(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_neverwritethis")
    run(recipe_for(llama, tmp_path, "train.max_steps=1", *without_held_out()), tmp_path / "out")
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"neverwritethis" not in path.read_bytes(), path


# ---- What is learned ----


def test_the_same_recipe_gives_the_same_bytes(finished, tmp_path):
    output_dir, recipe, _ = finished
    run(recipe, tmp_path / "again")
    assert adapter_of(tmp_path / "again") == adapter_of(output_dir)
    for name in ("adapter_config.json", "recipe.yaml", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (output_dir / name).read_bytes()


def test_without_held_out_rows_and_with_other_cadences_the_same_is_learned(finished, llama, tmp_path):
    overrides = without_held_out("machine.logging_steps=2", "machine.clean_loss_steps=0")
    recipe = recipe_for(llama, tmp_path, *overrides)
    summary = run(recipe, tmp_path / "out")
    assert adapter_of(tmp_path / "out") == adapter_of(finished[0])
    assert summary["data"]["eval"] is None
    assert "held_out_loss" not in summary["after"]


def test_another_seed_gives_another_adapter(finished, llama, tmp_path):
    run(recipe_for(llama, tmp_path, "train.seed=4", *without_held_out()), tmp_path / "out")
    assert adapter_of(tmp_path / "out") != adapter_of(finished[0])


def test_no_noise_section_is_alpha_zero_bit_for_bit_and_differs_from_noise(finished, llama, tmp_path):
    for name, override in (("none", "neftune=null"), ("zero", "neftune.noise_alpha=0")):
        run(recipe_for(llama, tmp_path, override, *without_held_out()), tmp_path / name)
    assert adapter_of(tmp_path / "none") == adapter_of(tmp_path / "zero")
    assert adapter_of(tmp_path / "none") != adapter_of(finished[0])
    assert not any("neftune_norm" in entry for entry in metrics_of(tmp_path / "none"))


def test_max_steps_ends_a_run_early(llama, tmp_path):
    summary = run(recipe_for(llama, tmp_path, "train.max_steps=2", *without_held_out()), tmp_path / "out")
    lengths = [len(row.ids) for row in sequences(TRAIN)]
    assert summary["steps"] == 2
    assert sum(sorted(lengths)[: 2 * BATCH]) <= summary["tokens_seen"] <= sum(sorted(lengths)[-2 * BATCH :])


def test_eval_fraction_holds_rows_out_of_training(llama, tmp_path):
    recipe = recipe_for(llama, tmp_path, "data.eval_path=null", "data.eval_fraction=0.4", "train.max_steps=1")
    is_out = [unit_interval(digest) < 0.4 for digest in hashes(TRAIN)]
    train = [row for row, out in zip(TRAIN, is_out, strict=True) if not out]
    held_out = [row for row, out in zip(TRAIN, is_out, strict=True) if out]
    assert train and held_out
    data = run(recipe, tmp_path / "out")["data"]
    assert (data["train"]["rows"], data["eval"]["rows"]) == (len(train), len(held_out))
    assert (data["train"]["sha256"], data["eval"]["sha256"]) == (fingerprint(train), fingerprint(held_out))


def test_the_saved_adapter_on_the_nf4_base_is_the_trained_model_bit_for_bit(llama, tmp_path):
    trainer = tiny_trainer(llama, tmp_path / "trainer", mixed_rows(8), max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert not [path for path in (tmp_path / "adapter").rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    base = load_nf4_base(str(llama), device=torch.device("cpu"), compute_dtype=torch.float32)
    reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.tensor([[257, *range(40, 90)]])
    with torch.no_grad():
        trained, again = trainer.model.eval()(ids).logits, reloaded(ids).logits
        with reloaded.disable_adapter():
            untrained = reloaded(ids).logits
    assert torch.equal(trained, again)
    assert (trained - untrained).abs().max() > 1e-4


# ---- Dry run ----


def test_a_dry_run_checks_and_tells_and_writes_nothing(finished, llama, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    recipe = recipe_for(llama, tmp_path)
    summary = run(recipe, tmp_path / "out", dry_run=True)
    assert sorted(tmp_path.rglob("*")) == sorted(
        [*before, *(tmp_path / n for n in ("train.jsonl", "held.jsonl", "mine.yaml"))]
    )
    done = finished[2]
    assert summary["status"] == "dry run"
    for key in ("plan", "precision", "seed", "versions"):
        assert summary[key] == done[key]
    assert summary["data"]["train"] == done["data"]["train"]
    told = capsys.readouterr().out
    assert "3 optimizer steps of 4 sequences" in told
    assert f"norm {5 / math.sqrt(3):.2f} per sequence" in told


def test_a_dry_run_needs_no_weights(llama, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(llama, model, ignore=shutil.ignore_patterns("*.safetensors"))
    assert run(recipe_for(model, tmp_path), tmp_path / "out", dry_run=True)["status"] == "dry run"


# ---- Answers ----


def test_no_answers_may_be_asked_for(llama, tmp_path):
    recipe = recipe_for(llama, tmp_path, "machine.eval_answers=0", "train.max_steps=1")
    assert "exact_match" not in run(recipe, tmp_path / "out")["after"]


def test_answers_do_not_depend_on_the_batch_and_keep_within_the_context(architecture_dir):
    folder = architecture_dir("opt")  # learned positions: one token beyond the context is an error
    model = load_nf4_base(str(folder), device=torch.device("cpu"), compute_dtype=torch.float32)
    context = model.config.max_position_embeddings
    examples = [question("Q" * length) for length in (3, context - 2, 40, context, context + 9, context - 1, 7)]
    one, many = (
        greedy_answers(model, byte_tokenizer(), examples, max_new_tokens=5, batch_size=size) for size in (1, 4)
    )
    assert one == many
    assert [answer.prompt for answer in one] == [example.prompt for example in examples]
    assert all(one[i].text for i in (0, 2, 6))
    assert (one[3].text, one[4].text) == ("", "")


def test_answers_leave_mode_and_random_stream_alone(llama):
    model = load_nf4_base(str(llama), device=torch.device("cpu"), compute_dtype=torch.float32).train()
    before = torch.get_rng_state()
    greedy_answers(model, byte_tokenizer(), [question("Q")], max_new_tokens=3, batch_size=2)
    assert model.training
    assert torch.equal(before, torch.get_rng_state())


def test_an_answer_is_exact_but_for_white_space_at_its_ends():
    answers = [Answer("p", "yes", text) for text in ("yes", " yes\n", "yes.", "Yes")]
    assert [answer.is_exact for answer in answers] == [True, True, False, False]
    assert exact_match(answers) == 0.5


# ---- Records ----


def test_a_number_that_json_has_no_word_for_is_null(tmp_path):
    write_json(tmp_path / "a.json", finite({"nan": math.nan, "inf": -math.inf, "one": 1.0, "text": "a"}))
    assert json.loads((tmp_path / "a.json").read_text()) == {"nan": None, "inf": None, "one": 1.0, "text": "a"}


def test_a_title_with_dollar_signs_does_not_end_a_finished_run(tmp_path):
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}]
    assert plot_losses(history, tmp_path / "loss.png", r"$\model on a$b_{")
    assert (tmp_path / "loss.png").exists()


# ---- LoRA defaults ----


@pytest.mark.parametrize(
    ("billions", "dropout"), [(0.1, 0.1), (6.74, 0.1), (13.02, 0.1), (14.0, 0.05), (32.5, 0.05), (65.2, 0.05)]
)
def test_lora_defaults_are_qloras(billions, dropout):
    config = default_lora_config(int(billions * 1e9))
    assert (config.r, config.lora_alpha, config.lora_dropout) == (64, 16, dropout)
    assert (config.target_modules, config.bias) == ("all-linear", "none")
    assert LARGE_MODEL_PARAMETERS == 14e9


def test_a_question_is_a_held_out_row_up_to_its_last_response():
    ids = byte_tokenizer()("ab</s>cdef</s>\n")["input_ids"]
    labels = [-100, *ids[1:3], -100, -100, *ids[5:8], -100]
    rows = Dataset.from_list([{"input_ids": ids, "labels": labels}, {"input_ids": ids[5:8], "labels": ids[5:8]}])
    [asked] = questions(rows, byte_tokenizer(), 5, [258])  # the second has no prompt
    assert (asked.prompt, asked.reference) == ("abcd", "ef")
    assert asked.prompt_ids == ids[:5] and asked.reference_ids == ids[5:7]
    assert questions(rows, byte_tokenizer(), 0, [258]) == []
