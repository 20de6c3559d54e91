"""The command line: quick help without torch, exit codes, messages instead of tracebacks."""

import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import types

import pytest
import yaml
from command_line import built_app
from json_outputs import check_json

from qlora_neft import __version__, list_recipes, load_recipe
from qlora_neft.errors import RunFailed, UserInputError
from qlora_neft.recipe.load import recipe_path

VERBS = ["ls", "show", "diff", "cp", "validate", "schema", "train", "watch", "preview", "fit", "noise", "doctor"]
VERBS += ["generate", "chat", "merge", "export", "check", "gguf", "tune", "sweep", "report", "eval"]
HELP_SECONDS = 0.5
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "accelerate", "matplotlib")


def invoke(*arguments):
    """Run a verb in this process; not typer's own runner, of which only new ones keep stderr apart."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as stdout,
        contextlib.redirect_stderr(io.StringIO()) as stderr,
        pytest.raises(SystemExit) as caught,
    ):
        built_app()(list(arguments))
    result = types.SimpleNamespace(stdout=stdout.getvalue(), stderr=stderr.getvalue())
    result.exit_code = caught.value.code or 0
    check_json(arguments, result.exit_code, result.stdout)
    return result


def command(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "qlora_neft", *arguments],
        capture_output=True,
        text=True,
        check=False,
        **kwargs,
    )


def measured(run, *arguments):
    """The result of a process and its CPU seconds: up to three attempts, since other work on the machine slows it."""
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = run(*arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        if seconds < HELP_SECONDS:
            break
    return result, seconds


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.fixture
def fake_run(monkeypatch):
    """Stands in for the module of the run, and records what it is called with."""
    module = types.ModuleType("qlora_neft.runner.run")
    module.calls = []

    def run(recipe, output_dir, **kwargs):
        module.calls.append((recipe, output_dir, kwargs))
        print("a library talks")
        return {"status": "done", "steps": 15}

    module.run = run
    monkeypatch.setitem(sys.modules, "qlora_neft.runner.run", module)
    return module


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_quick_and_imports_nothing_heavy(verb):
    arguments = [*verb.split(), "--help"]
    code = (
        "import sys; from qlora_neft.cli import app\n"
        f"try: app({arguments!r})\n"
        f"except SystemExit as end: sys.exit(end.code or ' '.join(set(sys.modules) & set({HEAVY!r})))"
    )
    result, seconds = measured(python, code)
    assert seconds < HELP_SECONDS
    assert result.stderr == "\n"
    assert "Usage:" in result.stdout


def test_the_command_itself_is_quick_too():
    result, seconds = measured(command, "--help")
    assert result.returncode == 0 and seconds < HELP_SECONDS


@pytest.mark.parametrize("arguments", [["ls"], ["show", "demo"], ["show", "--keys"], ["validate", "demo"]])
def test_reading_recipes_imports_nothing_heavy(arguments):
    code = (
        "import sys; from qlora_neft.cli import app\n"
        f"try: app({arguments!r})\n"
        f"except SystemExit: sys.exit(' '.join(set(sys.modules) & set({HEAVY!r})))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr == "\n"


def test_what_is_wrong_with_an_adapters_folder_is_told_before_torch_is_loaded(tmp_path):
    for arguments in (["check"], ["generate"], ["chat"], ["export", "--repo-id", "ann/x"]):
        code = (
            "import sys; from qlora_neft.cli import app\n"
            f"try: app([{arguments[0]!r}, {str(tmp_path)!r}, *{arguments[1:]!r}])\n"
            f"except SystemExit as end: sys.exit(' '.join([str(end.code), *set(sys.modules) & set({HEAVY!r})]))"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert result.stderr.endswith("or a Hub id.\n2\n")


def test_importing_the_package_imports_no_torch():
    code = "import sys, qlora_neft; qlora_neft.load_recipe('demo'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_version():
    assert invoke("--version").stdout == f"qlora-neft {__version__}\n"


def test_ls_lists_every_recipe():
    rows = json.loads(invoke("ls", "--json").stdout)
    assert sorted(row["name"] for row in rows) == list_recipes()
    lines = invoke("ls").stdout.splitlines()
    listed = [line.split() for line in lines if line.startswith("  ")]
    assert [line[0] for line in listed] == [row["name"] for row in rows]
    assert [line[1] for line in listed] == [str(row["card_gib"]) for row in rows]
    assert [line for line in lines if line.endswith(":")] == [
        "to try, without a GPU or the Hub:",
        "from the papers:",
        "current models:",
    ]


def test_show_prints_a_recipe_that_loads_again(tmp_path):
    (tmp_path / "again.yaml").write_text(invoke("show", "demo", "lora.r=4").stdout)
    assert load_recipe(tmp_path / "again.yaml") == load_recipe("demo", ["lora.r=4"])
    assert json.loads(invoke("show", "demo", "--json").stdout) == load_recipe("demo").to_dict()


def test_show_keys_lists_every_key():
    output = invoke("show", "--keys").stdout
    assert "data.max_length" in output
    assert "maximum number of tokens per sequence. whole number >= 8; required" in output
    assert {key["name"] for key in json.loads(invoke("show", "--keys", "--json").stdout)} > {"lora.r"}


def test_show_keys_lists_those_that_begin_so():
    named = json.loads(invoke("show", "--keys", "lora.", "train.seed", "--json").stdout)
    assert {key["name"].partition(".")[0] for key in named} == {"lora", "train"} and named[-1]["name"] == "train.seed"
    refused = invoke("show", "demo", "--keys")
    assert refused.exit_code == 2 and "no key begins with 'demo'" in refused.stderr


def test_show_without_a_name_says_what_to_do():
    result = invoke("show")
    assert result.exit_code == 2
    assert "qlora-neft ls" in result.stderr


def test_diff_shows_only_what_differs():
    result = invoke("diff", "llama2-7b-alpaca", "llama-30b-alpaca", "--json")
    differences = json.loads(result.stdout)
    assert differences["train.effective_batch_size"] == [16, 32]
    assert differences["train.learning_rate"] == [2e-4, 1e-4]
    assert "lora.r" not in differences
    assert invoke("diff", "demo", "demo").stdout == "no difference\n"


def test_diff_takes_overrides_of_the_second():
    lines = invoke("diff", "demo", "demo", "lora.r=3").stdout.splitlines()
    assert [line.split() for line in lines] == [["demo", "demo"], ["lora.r", "16", "3"]]


def test_cp_keeps_the_file_as_it_is_and_does_not_overwrite(tmp_path):
    target = tmp_path / "mine.yaml"
    assert invoke("cp", "demo", str(target)).exit_code == 0
    assert target.read_bytes() == recipe_path("demo").read_bytes()
    target.write_text("precious")
    refused = invoke("cp", "demo", str(target))
    assert (refused.exit_code, target.read_text()) == (2, "precious")
    assert "--force" in refused.stderr
    assert invoke("cp", "demo", str(target), "--force").exit_code == 0
    assert target.read_bytes() == recipe_path("demo").read_bytes()


def test_cp_into_a_folder_onto_itself_and_into_nowhere(tmp_path):
    assert invoke("cp", "demo", str(tmp_path)).exit_code == 0
    copy = tmp_path / "demo.yaml"
    assert invoke("cp", str(copy), str(copy), "--force").exit_code == 2
    assert copy.read_bytes() == recipe_path("demo").read_bytes()
    assert "no folder" in invoke("cp", "demo", str(tmp_path / "a" / "b.yaml")).stderr


def test_validate_reports_every_file(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump({"lora": {"rank": 8}}))
    result = invoke("validate", "demo", str(bad))
    assert result.exit_code == 2
    assert "demo: ok" in result.stdout
    assert f"{bad}:2: lora.rank: unknown key. Did you mean lora.r?" in result.stderr
    report = json.loads(invoke("validate", "demo", str(bad), "--json").stdout)
    assert [entry["ok"] for entry in report] == [True, False]


def test_validate_tells_overrides_from_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.yaml").write_bytes(recipe_path("demo").read_bytes())
    assert invoke("validate", "demo", "a=b.yaml", "lora.r=8").exit_code == 0
    result = invoke("validate", "demo", "a=b.yaml", "lora.r=0")
    assert (result.exit_code, result.stderr.count("override lora.r=0")) == (2, 2)
    assert invoke("validate", "lora.r=8").exit_code == 2


def test_train_hands_the_recipe_to_run(fake_run, tmp_path):
    result = invoke("train", "demo", "--output-dir", str(tmp_path / "out"), "lora.r=4", "--dry-run")
    assert result.exit_code == 0
    [(recipe, output_dir, kwargs)] = fake_run.calls
    assert recipe == load_recipe("demo", ["lora.r=4"])
    assert output_dir == tmp_path / "out"
    assert kwargs == {"resume": "auto", "dry_run": True, "quiet": False}


def test_train_json_prints_the_summary_alone(fake_run, tmp_path):
    result = invoke("train", "demo", "--output-dir", str(tmp_path), "--json")
    assert json.loads(result.stdout) == {"status": "done", "steps": 15}
    assert "a library talks" in result.stderr
    assert fake_run.calls[0][2] == {"resume": "auto", "dry_run": False, "quiet": True}


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserInputError("data.path: no such file."), 2, "error: data.path: no such file.\n"),
        (RunFailed("the loss is not finite"), 1, "failed: the loss is not finite\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_for_the_user_become_one_message_and_a_code(fake_run, monkeypatch, tmp_path, error, code, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(fake_run, "run", fail)
    result = invoke("train", "demo", "--output-dir", str(tmp_path))
    assert (result.exit_code, result.stderr) == (code, message)


def test_an_unexpected_error_keeps_its_traceback(fake_run, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(fake_run, "run", fail)
    with pytest.raises(ZeroDivisionError):
        invoke("train", "demo", "--output-dir", str(tmp_path))


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "demmo", "--output-dir", "out"],
        ["train", "demo", "--output-dir", "out", "neftune.noise_alpha=-1"],
        ["train", "demo", "--output-dir", "out", "lora.rank=8"],
        ["train", "demo"],
        ["show", "missing.yaml"],
        ["noise", "demo", "lora.r=x"],
        ["trian"],
        ["ls", "--jsno"],
    ],
)
def test_wrong_input_ends_with_code_2_and_no_traceback(arguments, tmp_path):
    root = os.getcwd()
    result = command(*arguments, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root})
    assert result.returncode == 2
    assert result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_shell_completes_names_and_keys():
    def complete(words, number):
        variables = {"_QLORA_NEFT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(number)}
        code = "from qlora_neft.cli import app; app(prog_name='qlora-neft')"
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **variables},
        )
        return result.stdout.split()

    assert complete("qlora-neft show llama2-13b", 2) == ["llama2-13b-alpaca", "llama2-13b-evol"]
    assert complete("qlora-neft train demo neftune.noise", 3) == ["neftune.noise_alpha="]
