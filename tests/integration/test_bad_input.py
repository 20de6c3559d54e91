"""Bad input ends with exit code 2 and one clear message; nothing is made and nothing is lost."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from command_line import contents, invoke
from forked import environment, quick_python

ROWS = [{"instruction": f"Say {n}", "output": str(n)} for n in range(8)]


@pytest.fixture
def workplace(llama, tmp_path, monkeypatch):
    """A current directory with a good recipe, good data and a tiny model."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Path("mine.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {"name_or_path": str(llama)},
                "quantization": {},
                "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"},
                "data": {"path": "rows.jsonl", "max_length": 250},
                "train": {
                    "effective_batch_size": 4,
                    "num_train_epochs": 1,
                    "max_steps": 1,
                    "learning_rate": 1e-3,
                    "lr_scheduler_type": "constant",
                    "optim": "adamw_torch",
                    "max_grad_norm": 0.3,
                    "seed": 0,
                },
                "machine": {"device": "cpu", "precision": "fp32"},
            }
        )
    )
    return tmp_path


def refused(*overrides, name="mine.yaml"):
    """The message with which ``train`` refuses; it is the only one, and nothing on the disk has changed."""
    before = contents(".")
    code, stdout, stderr = invoke("train", name, "--output-dir", "out", *overrides)
    assert (code, stdout) == (2, "")
    assert contents(".") == before
    assert stderr.startswith("error: ") and stderr.count("error: ") == 1
    assert stderr.endswith("\n") and "Traceback" not in stderr
    return stderr.removeprefix("error: ").strip()


def one_line(message):
    assert "\n" not in message
    return message


def changed_model(llama, **config):
    """An override that names a copy of the tiny model, ``./model``, whose configuration says something else."""
    shutil.copytree(llama, "model")
    path = Path("model/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return "model.name_or_path=./model"


def test_the_recipe_of_these_tests_is_good(workplace):
    """Else every test below would pass for the wrong reason."""
    assert invoke("train", "mine.yaml", "--output-dir", "out", "--dry-run")[0] == 0


# ---- Recipe and keys ----


@pytest.mark.parametrize(
    ("override", "key", "remedy"),
    [
        ("lora.rank=8", "lora.rank=8: unknown key", "Did you mean lora.r?"),
        ("lora.r=eight", "lora.r: expected whole number >= 1", "eight"),
        ("train.learning_rate=true", "train.learning_rate: expected number", "true"),
        ("neftune.noise_alpha=-1", "neftune.noise_alpha: expected number >= 0", "-1"),
        ("neftune.noise_alpha=nan", "neftune.noise_alpha: expected number >= 0", "nan"),
        ("neftune.noise_alpha=.inf", "neftune.noise_alpha: expected number >= 0", "inf"),
    ],
)
def test_a_wrong_key_or_value(workplace, override, key, remedy):
    message = one_line(refused(override))
    assert key in message and remedy in message


def test_an_unknown_recipe(workplace):
    message = refused(name="lama2-7b-alpaca")
    assert "Did you mean llama2-7b-alpaca?" in message


def test_several_problems_are_told_in_one_message(workplace):
    message = refused("lora.rank=8", "neftune.noise_alpha=-1", "train.seed=x")
    assert message.splitlines()[0] == "mine.yaml: 3 problems"
    assert len(message.splitlines()) == 4


# ---- Data ----


@pytest.mark.parametrize(
    ("content", "rule", "remedy"),
    [
        (None, "data.path: no file at 'bad.jsonl'", "relative to the current directory"),
        ("", "data.path: 'bad.jsonl' is empty", "one JSON object per example"),
        ('{"a": \n', "data.path: 'bad.jsonl': 1 of 1 row cannot be read: line 1 is not JSON", "Fix or remove"),
        (
            '{"verse": "a", "rhyme": "b"}\n',
            "data.path: the columns rhyme, verse of 'bad.jsonl' fit no format",
            "alpaca needs instruction and output",
        ),
        (
            '{"instruction": "a", "output": 1}\n',
            "data.path: 'bad.jsonl': 1 of 1 row cannot be read: line 1: output is int '1'",
            "Fix or remove",
        ),
        (b'{"instruction": "\xff", "output": "b"}\n', "data.path: 'bad.jsonl' is not UTF-8", "Save it as UTF-8"),
    ],
    ids=["missing", "empty", "broken", "columns", "type", "encoding"],
)
@pytest.mark.parametrize("key", ["data.path", "data.eval_path"])
def test_data_that_cannot_be_used(workplace, content, rule, remedy, key):
    if content is not None:
        Path("bad.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    message = one_line(refused(f"{key}=bad.jsonl"))
    assert message.startswith(rule.replace("data.path", key))
    assert remedy in message


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("data.split=test", "data.split: 'test' does not fit 'rows.jsonl'"),
        ("data.split=train[:0]", "data.split: 'train[:0]' takes none of its 8 rows"),
        ("data.max_length=8", "data.max_length: 8 tokens leave no room for a response"),
        ("data.max_length=1000", "data.max_length: the model's context is 256 tokens, got 1000. Write 256 or less."),
        ("data.eval_fraction=0.000001", "data.eval_fraction: 1e-06 of 8 rows leaves no rows on one side."),
        ("data.path=no-such-owner/no-such-data", "data.path: the dataset 'no-such-owner/no-such-data' cannot be read"),
        ("data.path=bundled:demo/none", "bundled:demo/none: the package holds no such file."),
    ],
)
def test_data_keys_that_leave_nothing_to_train_on(workplace, override, rule):
    assert one_line(refused(override)).startswith(rule)


# ---- Model and tokenizer ----


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("./none", "model.name_or_path: no folder at './none'. Give a folder or a Hub id."),
        ("no-such-owner/no-such-model", "model.name_or_path: no model configuration found at 'no-such-owner/no-such"),
        (".", "model.name_or_path: no model configuration found at '.'. Give a Hub id you can reach or a directory"),
    ],
)
def test_a_model_that_is_not_there(workplace, path, rule):
    assert one_line(refused(f"model.name_or_path={path}")).startswith(rule)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "vit", "architectures": ["BertForMaskedLM"]},
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        {"architectures": ["LlamaForSequenceClassification"]},
    ],
    ids=lambda config: config["architectures"][0],
)
def test_a_model_that_is_no_causal_language_model(workplace, llama, config):
    message = one_line(refused(changed_model(llama, **config)))
    assert message.startswith("model.name_or_path: must be a causal language model, './model' is ")
    assert config["architectures"][0] in message and "Choose a decoder" in message


BITSANDBYTES_4_BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(
    ("stored", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({**BITSANDBYTES_4_BIT, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes fp4"),
        pytest.param(
            BITSANDBYTES_4_BIT,
            "bitsandbytes fp4",
        ),
    ],
    ids=["gptq", "awq", "8 bit", "fp4", "fp4 unsaid"],
)
def test_a_model_quantized_some_other_way(workplace, llama, stored, named):
    message = one_line(refused(changed_model(llama, quantization_config=stored)))
    assert message.startswith("model.name_or_path: the base must be unquantized or stored in bitsandbytes NF4")
    assert f"is quantized with {named}. Start from the original 16-bit checkpoint." in message


@pytest.mark.parametrize(
    "damage",
    [
        lambda weights: weights.unlink(),
        pytest.param(
            lambda weights: weights.write_bytes(weights.read_bytes()[:5000]),
        ),
    ],
    ids=["missing", "cut short"],
)
def test_weights_that_cannot_be_read(workplace, llama, damage):
    override = changed_model(llama)
    damage(Path("model/model.safetensors"))
    code, _, stderr = invoke("train", "mine.yaml", "--output-dir", "out", override)
    assert code == 2
    assert stderr.startswith("error: model.name_or_path: no weights could be read from './model'.")
    assert not Path("out").exists()


def test_a_tokenizer_without_an_end_token(workplace, llama):
    override = changed_model(llama)
    path = Path("model/tokenizer_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": None}))
    message = one_line(refused(override))
    assert message.startswith("model.name_or_path: the tokenizer of './model' has no end token")
    assert "Set eos_token in its tokenizer_config.json." in message


def test_no_tokenizer_at_all(workplace, llama):
    override = changed_model(llama)
    for path in Path("model").glob("*token*"):
        path.unlink()
    assert refused(override).startswith("model.name_or_path: no tokenizer could be read from './model'.")


OWN_CODE = "from pathlib import Path\n\nPath('ran').touch()\nfrom transformers import {name} as Own\n"


@pytest.mark.parametrize(
    ("file", "described", "upstream"),
    [
        ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}, "LlamaConfig"),
        ("config.json", {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "own.Own"}}, "LlamaForCausalLM"),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}},
            "PreTrainedTokenizer",
        ),
    ],
    ids=["config", "model", "tokenizer"],
)
def test_code_that_a_model_brings_is_not_run_whoever_says_yes(workplace, llama, monkeypatch, file, described, upstream):
    override = changed_model(llama)
    path = Path("model", file)
    path.write_text(json.dumps({**json.loads(path.read_text()), **described}))
    Path("model/own.py").write_text(OWN_CODE.format(name=upstream))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))  # upstream asks, unless it is told
    message = one_line(refused(override))
    assert message.startswith("model.name_or_path: './model' needs Python code from its own repository")
    assert "trust_remote_code=True" in message and not Path("ran").exists()


def test_layers_that_the_model_does_not_have(workplace):
    code, _, stderr = invoke("train", "mine.yaml", "--output-dir", "out", "lora.target_modules=[nope]")
    assert code == 2
    assert "lora.target_modules" in stderr and "nope" in stderr


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("machine.precision=fp16", "precision: fp16 training needs a CUDA device"),
        ("machine.device=cuda", "device: cuda was asked for, but torch sees no CUDA device"),
    ],
)
def test_what_this_machine_cannot_do(workplace, monkeypatch, override, rule):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert one_line(refused(override)).startswith(rule)


# ---- The output directory ----


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"recipe.yaml": "a", "summary.json": "b", "adapter_model.safetensors": "c"}, "holds a finished run"),
        ({"recipe.yaml": "a", "metrics.jsonl": "b"}, "holds an unfinished run"),
        ({"thesis.txt": "years of work"}, "is not empty, and nothing in it may be lost"),
        ({"sub/notes.txt": "a"}, "is not empty"),
    ],
    ids=["finished run", "unfinished run", "other files", "a folder"],
)
@pytest.mark.parametrize("flags", [[], ["--dry-run"]], ids=["train", "dry run"])
def test_an_occupied_output_directory_is_refused_and_left_alone(workplace, files, said, flags):
    for name, text in files.items():
        path = Path("out", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    message = one_line(refused(*flags))
    assert message.startswith("--output-dir: 'out' ")
    assert said in message and "Give a new folder" in message


def test_an_output_directory_that_is_a_file_is_refused_and_left_alone(workplace):
    Path("out").write_text("precious")
    code, _, stderr = invoke("train", "mine.yaml", "--output-dir", "out")
    assert code == 2
    assert "--output-dir" in stderr and "file" in stderr
    assert Path("out").read_text() == "precious"


def test_an_output_directory_that_cannot_be_made_is_refused(workplace):
    code, _, stderr = invoke("train", "mine.yaml", "--output-dir", "rows.jsonl/out")
    assert (code, "--output-dir" in stderr) == (2, True)


def test_an_empty_output_directory_will_do(workplace):
    Path("out").mkdir()
    assert invoke("train", "mine.yaml", "--output-dir", "out", "--dry-run")[0] == 0
    assert contents("out") == {}


# ---- Other verbs, and the command as a process ----


@pytest.mark.parametrize("override", ["data.path=no.jsonl", "model.name_or_path=./none"])
def test_noise_refuses_as_train_does(workplace, override):
    code, stdout, stderr = invoke("noise", "mine.yaml", override)
    assert (code, stdout) == (2, "")
    assert stderr.startswith(f"error: {override.split('=')[0]}: ") and stderr.count("\n") == 1


def test_noise_refuses_a_model_without_tokenizer(workplace, llama):
    override = changed_model(llama)
    for path in Path("model").glob("*token*"):
        path.unlink()
    code, _, stderr = invoke("noise", "mine.yaml", override)
    assert code == 2
    assert stderr.startswith("error: model.name_or_path: no tokenizer could be read from './model'.")


def test_the_command_itself_gives_code_2_one_line_and_no_traceback(workplace):
    result = subprocess.run(
        [quick_python(), "-m", "qlora_neft", "train", "mine.yaml", "--output-dir", "out", "data.path=no.jsonl"],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: data.path: no file at 'no.jsonl'. Paths are relative to the current directory.\n"
    assert not Path("out").exists()
