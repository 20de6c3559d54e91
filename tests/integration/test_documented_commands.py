"""What the documentation tells people to type is typed here.

Each command of README and docs/ (`documented.py`) is parsed by the real command line: verbs, options and recipe keys
that do not exist fail. Those in fenced blocks are run as well, each in a copy of a prepared folder; what cannot be run
in seconds without a GPU and the Hub stands in `NOT_RUN` with the reason.
"""

import contextlib
import io
import re
import tomllib

import pytest
import typer
from command_line import copied, invoke
from documented import BLOCK, PAGES, ROOT, shown_commands
from documented_place import EXTRA, made_by, make_documented_place

from qlora_neft import list_recipes, load_recipe
from qlora_neft.cli import app
from qlora_neft.recipe.keys import key_names

SHOWN = shown_commands()
OURS = [command for command in SHOWN if command.is_ours]
GPU_AND_HUB = "needs a GPU, and the base from the Hub"
HUB = "needs the Hub"
# Command, or the beginning of several: why it is not run. What does run it, where something does.
NOT_RUN = {
    "make demo": "installs; its run is tests/integration/test_demo.py",
    "make test": "is this test's own caller",
    "make lint": "installs; part of the checks before a commit",
    "make format": "changes files",
    "make package": "installs; it is tests/integration/test_installed_package.py",
    "make docs": "installs; the links are checked by tests/unit/test_docs_links.py",
    "pip install": "installs; that its extras exist is tested below",
    "qlora-neft train demo --output-dir out-demo": "a minute; tests/integration/test_demo.py runs it",
    "qlora-neft train llama2-7b-alpaca": GPU_AND_HUB,
    "qlora-neft train qwen3-4b-chat": GPU_AND_HUB,
    "qlora-neft sweep mine.yaml neftune.noise_alpha=0,5,10,15 --output-dir sweep": "twelve runs; with --dry-run below",
    "qlora-neft tune mine.yaml": "five runs, each in a process; test_tune.py",
    "qlora-neft tune qwen3-4b": GPU_AND_HUB,
    "qlora-neft train tune-qwen3-4b": GPU_AND_HUB,
    "qlora-neft sweep llama2-7b-alpaca --protocol paper": GPU_AND_HUB,
    "qlora-neft sweep mine.yaml --protocol paper": "four runs and a judge; test_sweep_decides.py",
    "qlora-neft eval flips llama2-7b-alpaca": HUB,
    "qlora-neft eval flips meta-llama/Llama-2-7b-hf": HUB,
    "qlora-neft eval text out/alpha0 out/alpha5": "needs AlpacaEval's instructions, from the Hub",
    "qlora-neft preview preview.yaml data.path=FILE": "of a measurement; FILE are public files",
    "qlora-neft eval alpaca answer out/alpha5": "needs AlpacaEval's instructions, from the Hub; test_eval.py",
    "qlora-neft eval alpaca judge out/alpha5": "needs a judge's program and key; test_eval_judges.py",
    "qlora-neft eval harness": "needs lm-eval and the Hub; test_harness.py",
    "qlora-neft export out --repo-id me/my-adapter": "needs the Hub; test_push.py pushes to a stand-in",
    "torchrun": "two processes; tests/invariant/test_ranks.py",
    "accelerate launch": "needs two GPUs",
    "python -m benchmarks.gpu": "needs a GPU; tests/integration/test_gpu_benchmark.py rehearses it",
    "sky ": "needs a cloud account",
    "hf jobs": "needs an account with credit",
    "llama-": "needs llama.cpp; tests/integration/test_gguf_runs.py loads the files with it",
    "ollama": "needs Ollama",
}
ALL_THE_SAME = {  # though a line above fits its beginning
    "qlora-neft export out --repo-id me/my-adapter --dry-run",
}


def reason_not_to_run(command):
    if command.text in ALL_THE_SAME:
        return None
    if command.text in NOT_RUN:
        return command.text
    # The longest beginning; a whole `train demo --output-dir out` is no beginning of the same with overrides.
    return max((start for start in NOT_RUN if command.text.startswith(start)), key=len, default=None)


RUN = [command for command in OURS if command.fenced and not reason_not_to_run(command)]


def names(commands):
    return {"argvalues": commands, "ids": [f"{command.page}: {command.text}" for command in commands]}


# ---- Parsed, all of them ----


def own_words(words):
    """What our own parser gets, launcher and environment left away."""
    program = next(i for i, word in enumerate(words) if word in ("qlora-neft", "qlora_neft"))
    return words[program + 1 :]


@pytest.mark.parametrize("command", **names(OURS))
def test_verbs_options_and_keys_exist(command):
    verb, words = typer.main.get_command(app), own_words(command.words)
    if "[" in command.text and not command.fenced:  # a synopsis, `[--json]`: its options must exist
        words = [word.strip("[]") for word in words]
    while hasattr(verb, "commands") and words and not words[0].startswith("-"):
        assert words[0] in verb.commands, f"there is no verb {words[0]}"
        verb = verb.commands[words.pop(0)]
    options = {name for param in verb.params for name in (*param.opts, *param.secondary_opts)} | {"--help", "-h"}
    used = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert used - options - {"--install-completion"} == set()
    keys = {word.partition("=")[0] for word in words if re.match(r"[a-z_]+\.[a-z_0-9]+=", word)}
    assert keys - set(key_names()) == set()
    if command.fenced and not used & {"--help", "-h"} and not hasattr(verb, "commands"):
        verb.make_context(command.text, words)


@pytest.mark.parametrize("command", **names([c for c in OURS if set(c.words) & set(list_recipes())]))
def test_a_shipped_recipe_takes_its_overrides(command):
    name = next(word for word in command.words if word in list_recipes())
    if "sweep" not in command.words:
        load_recipe(name, [word for word in command.words if re.match(r"[a-z_]+\.\w+=", word)])


# ---- Run ----


@pytest.fixture(scope="module")
def place(llama, tmp_path_factory):
    return make_documented_place(llama, tmp_path_factory.mktemp("documented"))


@pytest.mark.parametrize("command", **names(RUN))
def test_it_runs(command, place, tmp_path, monkeypatch):
    words = own_words(command.words)
    monkeypatch.chdir(copied(place, tmp_path / "here"))
    made = made_by(words)  # what the command makes must not be there yet
    monkeypatch.setattr("sys.stdin", io.StringIO("Repeat 3\n/quit\n"))
    code, stdout, stderr = invoke(*words, *EXTRA.get(" ".join(words[:2]), EXTRA.get(words[0], ())))
    assert code == 0, f"{stdout[-2000:]}\n{stderr[-2000:]}"
    assert all(path.exists() for path in made)
    assert stdout + stderr or made


def test_the_sweep_is_planned(place, tmp_path, monkeypatch):
    monkeypatch.chdir(copied(place, tmp_path / "here"))
    shown = next(c for c in OURS if c.fenced and c.words[1] == "sweep")
    made_by(own_words(shown.words))
    code, stdout, stderr = invoke(*own_words(shown.words), "--dry-run")
    assert code == 0, stderr
    assert all(len(re.findall(rf"noise_alpha_{alpha}\D*seed", stdout)) == 3 for alpha in (0, 5, 10, 15)), stdout


# ---- The tables above are true ----


def test_every_command_is_run_or_has_a_reason():
    left = [c for c in SHOWN if c.fenced and c not in RUN and not reason_not_to_run(c)]
    assert left == []
    assert len(RUN) > 30


def test_no_reason_is_left_over():
    used = {reason_not_to_run(command) for command in SHOWN if command.fenced}
    assert set(NOT_RUN) - used == set()


def test_make_targets_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    asked = {command.words[1] for command in SHOWN if command.words[0] == "make"}
    assert asked - set(targets) == set()


def test_extras_and_files_to_install_from_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for command in (command for command in SHOWN if command.text.startswith("pip install")):
        for listed in re.findall(r"\[([\w,]+)\]", command.text):
            assert set(listed.split(",")) <= set(extras), command
        for constraint in re.findall(r"-c (\S+)", command.text):
            assert (ROOT / constraint).is_file(), command


def test_python_in_the_documentation_imports_what_there_is():
    """Every ``from qlora_neft... import name`` of a Python block."""
    texts = [text for page in PAGES for *_, text in BLOCK.findall(page.read_text(encoding="utf-8"))]
    blocks = [text for text in texts if re.search(r"^from qlora_neft", text, re.MULTILINE)]
    assert len(blocks) >= 3
    for block in blocks:
        compile(block, "documentation", "exec")
        for line in re.findall(r"^from qlora_neft\S* import .+$", block, re.MULTILINE):
            module, _, wanted = line.removeprefix("from ").partition(" import ")
            with contextlib.redirect_stdout(io.StringIO()):
                found = __import__(module, fromlist=["name"])
            assert all(hasattr(found, name.strip()) for name in wanted.split(",")), line
