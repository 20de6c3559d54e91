"""jobs/train.py: what it states about itself, and what it refuses; and the Dockerfile's parts that need no engine."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "jobs" / "train.py"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def command_of(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    return runpy.run_path(str(SCRIPT))["command_of"]


def test_it_states_its_dependencies_as_pep_723_has_it():
    [block] = re.findall(r"(?m)^# /// script$\n((?:^#(?: .*)?$\n)+)^# ///$", SCRIPT.read_text())
    stated = tomllib.loads(re.sub(r"(?m)^# ?", "", block))
    assert stated["requires-python"] == PROJECT["requires-python"]
    assert stated["dependencies"] == [f"qlora-neft[plots] @ git+{PROJECT['urls']['Repository']}"]


@pytest.mark.parametrize(
    "words",
    [
        ["demo", "--push-to", "me/x"],
        ["demo", "--push-to=me/x"],
        ["demo", "machine.push_to=me/x"],
        ["demo", "machine.mirror_dir=/mirror"],
    ],
)
def test_arguments_are_those_of_train(command_of, words):
    assert command_of(words) == ["train", *words, "--output-dir", "out"]
    assert command_of([*words, "--output-dir", "there"]) == ["train", *words, "--output-dir", "there"]
    assert command_of([*words, "--output-dir=there"]) == ["train", *words, "--output-dir=there"]


def test_a_run_that_would_be_lost_does_not_begin(command_of, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        command_of(["demo", "lora.r=8"])
    assert "--push-to: required" in capsys.readouterr().err
    assert command_of(["demo", "--throw-away"]) == ["train", "demo", "--output-dir", "out"]
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SystemExit, match="2"):
        command_of(["demo", "--push-to", "me/x"])
    assert "HF_TOKEN: required" in capsys.readouterr().err
    assert command_of(["demo", "machine.mirror_dir=/mirror"])[0] == "train"


@pytest.mark.parametrize("words", [[], ["--push-to", "me/x"]])
def test_the_recipe_comes_first(command_of, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        command_of(words)
    assert "RECIPE: required" in capsys.readouterr().err


def test_the_images_files_are_those_the_wheel_is_built_from():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == {"qlora_neft", "recipes", "scripts/pypi_readme.py", "pyproject.toml", "README.md", "LICENSE"}
    assert all((ROOT / name).exists() for name in kept)
    dockerfile = (ROOT / "Dockerfile").read_text()
    [user] = re.findall(r"(?m)^USER (.+)$", dockerfile)
    assert user != "root" and dockerfile.index("\nUSER") < dockerfile.index("\nENTRYPOINT")
    for extra in re.findall(r"\['optional-dependencies'\]\['(\w+)'\]", dockerfile):
        assert extra in PROJECT["optional-dependencies"]
