"""The planner: what it says, that its choices are allowed ones, and that its weights weigh what it says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from forked import environment, quick_python
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from qlora_neft import list_recipes, load_recipe
from qlora_neft.cli import app
from qlora_neft.display.progress import SpeedLine
from qlora_neft.errors import UserInputError
from qlora_neft.fit import card_of, choose, fit_report
from qlora_neft.fit.cards import CARDS, GIB, this_machine
from qlora_neft.fit.choose import USABLE, candidates
from qlora_neft.fit.geometry import geometry_of, shipped_config
from qlora_neft.fit.report import lines, picture
from qlora_neft.runner.plan import planned_for
from qlora_neft.trainer.memory import MemoryProbe, Split

LLAMA_7B = geometry_of(shipped_config("meta-llama/Llama-2-7b-hf"))
LLAMA_30B = geometry_of(shipped_config("huggyllama/llama-30b"))
RECIPE_7B, RECIPE_30B = load_recipe("llama2-7b-alpaca"), load_recipe("llama-30b-alpaca")


def fit(*arguments):
    result = CliRunner().invoke(app, ["fit", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_every_shipped_recipe_is_answered_without_a_network_and_without_torch(tmp_path):
    code = (
        "import sys; from qlora_neft.cli import app\n"
        "for name in sys.argv[1:]:\n"
        "    try: app(['fit', name, '--vram', '24GiB', '--json'])\n"
        "    except SystemExit as end: assert not end.code, (name, end.code)\n"
        "    loaded = {'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)\n"
        "    assert not loaded, (name, loaded)\n"
        "    print('END')"
    )
    names = list_recipes()
    arguments = [sys.executable, "-c", code, *names]
    variables = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = subprocess.run(arguments, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    reports = done.stdout.split("END\n")
    assert reports.pop() == "" and len(reports) == len(names)
    keys = {
        "fits",
        "peak_bytes",
        "terms",
        "parameters",
        "quantized_parameters",
        "nf4_bytes",
        "lora_parameters",
        "plan",
    }
    for name, text in zip(names, reports, strict=True):
        report = json.loads(text)
        assert keys <= report.keys()
        assert report["peak_bytes"] == sum(report["terms"].values()) - report["paged_out_bytes"]
        assert set(report["plan"]) == set(load_recipe(name).machine.model_dump())


def test_the_answer_for_people(tmp_path):
    code, out, _ = fit("llama-30b-alpaca", "--vram", "rtx4090", "--picture", str(tmp_path / "fit.png"))
    assert code == 0 and out.startswith("llama-30b-alpaca: fits on rtx4090: ")
    assert "base weights, NF4" in out and "not measured on this card" in out
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = fit("llama-30b-alpaca", "--vram", "12GiB")
    assert code == 0 and "does not fit" in out and "to make it fit: as it is, it fits on " in out


@pytest.mark.parametrize("wrong", ["lots", "-3GiB", "0", "24 bananas", "rtx9999"])
def test_a_card_that_is_none(wrong):
    code, out, err = fit("demo", "--vram", wrong)
    assert (code, out) == (2, "") and err.startswith("error: --vram: must be an amount of memory")


def test_amounts_and_names():
    assert card_of("24GiB").memory == card_of("24").memory == card_of("24 gib").memory == 24 * GIB
    assert card_of("8GB").memory == 8 * 10**9
    assert card_of("T4") is CARDS["t4"] and not CARDS["t4"].has_bf16
    assert this_machine().memory > GIB


def test_how_long_a_run_takes_is_a_range_by_the_size_of_its_data(tmp_path):
    (tmp_path / "rows.jsonl").write_text("x" * 1_000_000)
    arguments = ["llama2-7b-alpaca", f"data.path={tmp_path / 'rows.jsonl'}", "data.split=train", "--vram", "rtx4090"]
    report = json.loads(fit(*arguments, "--json")[1])
    low, high = report["tokens_per_second"]
    assert report["seconds"] == [round(200_000 / high), round(400_000 / low)]
    assert "the whole run: " in fit(*arguments)[1]
    freelb = ["neftune.adversarial_steps=3", "neftune.adversarial_step_size=1"]  # three passes a step
    assert json.loads(fit(*arguments, *freelb, "--json")[1])["seconds"][1] == pytest.approx(
        3 * report["seconds"][1], abs=2
    )
    assert "FreeLB makes 3 passes a step, which costs 3 times as much time" in fit(*arguments, *freelb)[1]
    without = json.loads(fit(*arguments, *freelb, "neftune.noise_alpha=0", "--json")[1])  # nothing to climb
    assert without["seconds"] == report["seconds"] and not any("FreeLB" in note for note in without["notes"])
    symmetric = json.loads(fit(*arguments, "neftune.symmetric=true", "--json")[1])
    assert symmetric["seconds"][1] == pytest.approx(2 * report["seconds"][1], abs=2)
    assert any("SymNoise makes 2 passes a step" in note for note in symmetric["notes"])
    twice = json.loads(fit(*arguments, "train.num_train_epochs=2", "--json")[1])
    assert twice["seconds"][1] == pytest.approx(2 * report["seconds"][1], abs=1)
    assert json.loads(fit("llama2-7b-alpaca", "--vram", "rtx4090", "--json")[1])["seconds"] is None  # on the Hub


def test_a_base_that_is_not_there_is_refused(tmp_path, monkeypatch):
    code, _, err = fit("demo", "model.name_or_path=no-such-owner/no-such-model")
    assert code == 2 and "no-such-owner/no-such-model" in err and "Check its name" in err
    (tmp_path / "config.json").write_text("{")
    code, _, err = fit("demo", f"model.name_or_path={tmp_path}")
    assert code == 2 and "no model configuration could be read" in err


# ---- The choice ----


@pytest.mark.parametrize("gibibytes", [6, 8, 12, 16, 24, 48, 80])
def test_what_is_chosen_fits_and_nothing_faster_does(gibibytes):
    card = card_of(f"{gibibytes}GiB")
    choice, fits = choose(RECIPE_7B, LLAMA_7B, card)
    others = [other for other in candidates(RECIPE_7B, LLAMA_7B, card) if other.peak_bytes <= USABLE * card.memory]
    if fits and not choice.paged_out:
        assert choice.peak_bytes <= USABLE * card.memory
        assert choice.speed == max(other.speed for other in others)
    else:
        assert not others


def test_more_memory_is_never_slower_and_the_step_is_never_exceeded():
    speeds = [choose(RECIPE_7B, LLAMA_7B, card_of(f"{g}GiB"))[0] for g in (8, 12, 16, 24, 40, 80, 140)]
    assert [c.speed for c in speeds] == sorted(c.speed for c in speeds)
    assert all(512 <= c.step.tokens <= 16 * 512 for c in speeds)
    assert not speeds[-1].checkpointing


def test_thirty_billion_fit_a_24_gib_card_with_paged_optimizer_states_and_not_without():
    choice, fits = choose(RECIPE_30B, LLAMA_30B, card_of("24GiB"))
    assert fits and choice.paged_out == choice.terms["optimizer"] and choice.checkpointing
    assert not choose(load_recipe("llama-30b-alpaca", ["train.optim=adamw_torch"]), LLAMA_30B, card_of("24GiB"))[1]


def test_what_the_recipe_states_is_kept():
    stated = ("per_device_train_batch_size=2", "activation_checkpointing=true", "per_device_eval_batch_size=3")
    asked = ["data.eval_fraction=0.1", *(f"machine.{key}" for key in stated)]
    choice, _ = choose(load_recipe("llama2-7b-alpaca", asked), LLAMA_7B, card_of("80GiB"))
    assert (choice.rows, choice.eval_rows, choice.checkpointing, choice.step.tokens) == (2, 3, True, 1024)
    recipe = load_recipe("llama2-7b-alpaca", ["machine.activation_checkpointing=true"])
    planned = planned_for(recipe, shipped_config("meta-llama/Llama-2-7b-hf"), card_of("80GiB"))
    assert "activation_checkpointing" not in planned.machine and planned.machine["max_tokens_per_micro_batch"] == 8192


def test_some_blocks_are_checkpointed_where_that_is_enough_and_the_plan_says_how_many():
    choice, fits = choose(RECIPE_7B, LLAMA_7B, card_of("12GiB"))
    assert fits and 0 < choice.checkpointing < LLAMA_7B.num_layers
    report = fit_report(RECIPE_7B, LLAMA_7B, card_of("12GiB"))
    assert report["plan"]["activation_checkpointing"] == choice.checkpointing
    planned = planned_for(RECIPE_7B, shipped_config("meta-llama/Llama-2-7b-hf"), card_of("12GiB"))
    assert planned.machine["activation_checkpointing"] == choice.checkpointing
    assert f"checkpointing in {choice.checkpointing} blocks of 32" in planned.notes[1]


def test_activations_go_to_the_host_only_where_nothing_fits_without():
    long = load_recipe("llama2-7b-alpaca", ["data.max_length=32768", "lora.r=16"])
    cards = [card_of(f"{gibibytes}GiB") for gibibytes in range(12, 40)]
    choices = [choose(long, LLAMA_7B, card) for card in cards]
    offloaded = [choice.step.offloading for choice, fits in choices if fits]
    assert offloaded == sorted(offloaded, reverse=True) and {True, False} == set(offloaded)
    refused = load_recipe(
        "llama2-7b-alpaca", ["data.max_length=32768", "lora.r=16", "machine.activation_offloading=false"]
    )
    for card, (choice, fits) in zip(cards, choices, strict=True):
        if fits and choice.step.offloading:
            assert not choose(refused, LLAMA_7B, card)[1]


def test_the_plan_says_how_rows_are_laid_out():
    gemma = geometry_of({"model_type": "gemma2"})
    flat, padded = (fit_report(RECIPE_7B, geometry, card_of("80GiB")) for geometry in (LLAMA_7B, gemma))
    assert flat["plan"]["padding_free"] is True and padded["plan"]["padding_free"] is False
    assert "padding-free micro-batches" in "".join(lines(flat, "x"))
    assert [note for note in padded["notes"] if note.startswith("rows are padded: gemma2: ")] and not flat["notes"]


def test_a_path_that_is_switched_off_needs_more():
    off = load_recipe("llama2-7b-alpaca", ["machine.fused_lora=false", "machine.fused_norms=false"])
    ours, modules = (
        next(c for c in candidates(recipe, LLAMA_7B, card_of("80GiB")) if c.tokens == 4096 and not c.checkpointing)
        for recipe in (RECIPE_7B, off)
    )
    assert modules.terms["activations"] > 1.7 * ours.terms["activations"]


def test_the_remedies_do_what_they_say():
    asked = ["train.optim=adamw_torch", "machine.activation_checkpointing=false"]
    asked += ["machine.per_device_train_batch_size=8"]
    recipe = load_recipe("llama2-7b-alpaca", asked)
    report = fit_report(recipe, LLAMA_7B, card_of("7GiB"))
    assert not report["fits"] and "machine.activation_checkpointing=auto" in report["remedies"][0]
    for remedy in report["remedies"][:-1]:
        overrides = [word for word in remedy.split() if "=" in word]
        choice, fits = choose(load_recipe("llama2-7b-alpaca", [*asked, *overrides]), LLAMA_7B, card_of("7GiB"))
        assert f"{choice.peak_bytes / GIB:.2f} GiB" in remedy
        assert fits == ("fit (" in remedy)
    named = report["remedies"][-1].split("it fits on ")[1].split(" ")[0]
    assert choose(recipe, LLAMA_7B, CARDS[named])[1]


def test_a_base_the_planner_does_not_know_is_said_and_not_planned():
    planned = planned_for(load_recipe("demo"), {"model_type": "t5"}, card_of("24GiB"))
    assert planned.machine == {} and planned.estimate is None and "not planned" in planned.notes[0]


def test_a_picture_of_any_report(tmp_path):
    report = fit_report(RECIPE_7B, LLAMA_7B, card_of("200GiB"))
    assert picture(report, tmp_path / "a.png", "title")


# ---- Against what is really there ----

WEIGHED = """
import ctypes, gc, sys, torch
from qlora_neft.base.nf4 import load_nf4_base
def anonymous():  # without what is mapped from the checkpoint's file, which the system may drop at any time
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
load_nf4_base(sys.argv[2], device=torch.device("cpu"), compute_dtype=torch.float32)  # what loading itself leaves behind
before = anonymous()
model = load_nf4_base(sys.argv[1], device=torch.device("cpu"), compute_dtype=torch.float32)
print(anonymous() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's account of a process's memory")
def test_resident_weights_weigh_what_the_model_says_within_15_percent(llama, tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": 16_000}
    save_tiny_model(tmp_path, "llama", **sizes, num_attention_heads=16, num_key_value_heads=16, head_dim=64)
    AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).save_pretrained(tmp_path)  # as usual
    arguments = [quick_python(), "-c", WEIGHED, str(tmp_path), str(llama)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    geometry = geometry_of(json.loads((tmp_path / "config.json").read_text()))
    expected = geometry.nf4_bytes(True) + 4 * geometry.unquantized_parameters()
    assert int(done.stdout.split()[-1]) == pytest.approx(expected, rel=0.15)


# ---- The first step's real peak ----


def test_speed_and_time_left_are_said_once_after_a_few_steps():
    tokens, said = iter(range(0, 10_000, 100)), []
    line = SpeedLine(lambda: next(tokens), said.append)
    for step in range(1, 9):
        line.on_step_end(None, SimpleNamespace(global_step=step, max_steps=100), None)
    assert len(said) == 1 and re.fullmatch(r"speed: [\d,]+ tokens a second; about \d+ s left", said[0])


class _Trainer:
    def __init__(self):
        self.split, self.said = Split(8, 4096), []

    def say(self, line):
        self.said.append(line)


@pytest.mark.parametrize(("peak", "rows"), [(5, 8), (9.6, 4)])
def test_the_plan_is_corrected_once_where_the_first_step_came_too_near_the_limit(peak, rows):
    trainer = _Trainer()
    probe = MemoryProbe(trainer, 10 * GIB, 6 * GIB, lambda: int(peak * GIB))
    for _ in range(3):
        probe.on_step_end(None, None, None)
    assert trainer.split.rows == rows
    assert trainer.said[0] == f"memory: {peak:.2f} GiB after the first step, 6.00 GiB expected"
    assert len(trainer.said) == (1 if rows == 8 else 2)


def test_evaluation_batches_are_planned_only_where_there_are_held_out_rows():
    assert choose(load_recipe("demo"), LLAMA_7B, card_of("80GiB"))[0].eval_rows > 0
    assert choose(RECIPE_7B, LLAMA_7B, card_of("80GiB"))[0].eval_rows == 0


def test_a_target_that_the_model_does_not_have_is_refused():
    with pytest.raises(UserInputError):
        LLAMA_7B.lora_parameters(8, ["nope"])
