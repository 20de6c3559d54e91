"""What ships, and that it is found: from a clone, an sdist and a wheel. And the names the package gives out."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import qlora_neft
from qlora_neft import list_recipes
from qlora_neft.errors import UserInputError
from qlora_neft.paths import resolve_bundled
from qlora_neft.recipe.load import recipe_dir
from scripts.set_version import released

ROOT = Path(__file__).resolve().parents[2]
WHERE = (
    "import qlora_neft; print(qlora_neft.__file__);"
    "from qlora_neft.recipe.load import recipe_dir; print(recipe_dir());"
    "print(*qlora_neft.list_recipes()); print(qlora_neft.load_recipe('demo').lora.r);"
    "from qlora_neft.paths import resolve_bundled; print(resolve_bundled('bundled:demo/train.jsonl'))"
)


def python(code, path, cwd):
    """Run code with ``path`` as the first place to import from."""
    paths = [str(path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=cwd, env=environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def built(kind, source, folder):
    """The file that the build backend makes of a source tree: its "wheel" or its "sdist"."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds the wheel, is not installed (pip install -e '.[dev]')")
    code = f"from hatchling.build import build_{kind} as build; print(build({str(folder)!r}))"
    return folder / python(code, source, cwd=source)[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return built("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return built("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


def files_of(archive):
    """Names of the files in a wheel; in an sdist, below its one folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            return {name for name in opened.namelist() if not name.endswith("/")}
    with tarfile.open(archive) as opened:
        return {member.name.partition("/")[2] for member in opened if member.isfile()}


def test_a_clone_finds_its_own_recipes(tmp_path):
    file, recipes, names, _, rows = python(WHERE, ROOT, cwd=tmp_path)
    assert Path(file).parent.parent == ROOT
    assert Path(recipes) == ROOT / "recipes"
    assert names.split() == list_recipes()
    assert Path(rows).is_file()


def test_a_stale_copy_of_the_recipes_does_not_win_in_a_clone(tmp_path, monkeypatch):
    package = tmp_path / "qlora_neft"
    for folder in (package / "recipes", tmp_path / "recipes"):
        folder.mkdir(parents=True)
    monkeypatch.setattr("qlora_neft.recipe.load._PACKAGE", package)
    assert recipe_dir() == package / "recipes"  # a "recipes" beside the package is not ours in site-packages
    (tmp_path / "pyproject.toml").touch()
    assert recipe_dir() == tmp_path / "recipes"


def test_a_wheel_holds_recipes_data_and_license(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for recipe in sorted((ROOT / "recipes").glob("*.yaml")):
            assert archive.read(f"qlora_neft/recipes/{recipe.name}") == recipe.read_bytes()
    data = [path for path in (ROOT / "qlora_neft" / "demo").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {path.relative_to(ROOT).as_posix() for path in data} <= names
    assert "qlora_neft/demo/train.jsonl" in names
    assert any(name.endswith("model.safetensors") for name in names)
    assert "qlora_neft/py.typed" in names
    assert any(name.endswith("/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names} == {
        "qlora_neft",
        f"qlora_neft-{qlora_neft.__version__}.dist-info",
    }


def test_an_unpacked_wheel_finds_its_recipes(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "site" / "recipes").mkdir()  # as another package may leave one
    file, recipes, names, rank, rows = python(WHERE, tmp_path / "site", cwd=tmp_path)
    assert Path(file).parent == tmp_path / "site" / "qlora_neft"
    assert Path(recipes) == tmp_path / "site" / "qlora_neft" / "recipes"
    assert names.split() == list_recipes()
    assert int(rank) == qlora_neft.load_recipe("demo").lora.r
    assert Path(rows).is_file()


def test_an_sdist_holds_what_users_developers_and_tests_need(sdist):
    names = files_of(sdist)
    assert {name.split("/")[0] for name in names if "/" in name} == set(
        ".github benchmarks constraints docs jobs notebooks qlora_neft recipes scripts tests".split()
    )
    pages = "AGENTS.md CHANGELOG.md CONTRIBUTING.md README.md SECURITY.md"
    single = (
        f"{pages} CITATION.cff Dockerfile .dockerignore LICENSE Makefile mkdocs.yml pyproject.toml .gitignore PKG-INFO"
    )
    assert {name for name in names if "/" not in name} == set(single.split())
    assert {"recipes/demo.yaml", "constraints/cpu.txt", "docs/index.md", "tests/unit/test_packaging.py"} <= names


def test_an_sdist_leaves_out_no_file_under_version_control(sdist):
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {name for name in listed.splitlines() if not name.startswith(".ci/")} <= files_of(sdist)


def test_an_sdist_makes_the_same_wheel_and_sdist_whatever_lies_about(sdist, wheel, tmp_path):
    shutil.unpack_archive(sdist, tmp_path, filter="data")
    [source] = tmp_path.iterdir()
    litter = ".venv/bin/python site/index.html out/summary.json dist/old.whl qlora_neft/__pycache__/x.cpython-311.pyc"
    for name in (*litter.split(), "notebooks/.ipynb_checkpoints/x.ipynb", "my_rows.jsonl", "sweep/results.json"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    again = {kind: built(kind, source, tmp_path) for kind in ("wheel", "sdist")}
    assert files_of(again["wheel"]) == files_of(wheel)
    assert files_of(again["sdist"]) == files_of(sdist)


def test_the_version_is_the_same_in_every_place_and_semantic():
    version = qlora_neft.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?", version)
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"## [{version}] - " in (ROOT / "CHANGELOG.md").read_text()


def test_a_release_takes_the_unreleased_lines_under_their_headings():
    head = "# Changes\n\n"
    before = f"{head}## [Unreleased]\n\n### Fixed\n- c\n\n### Added\n- a\n\n## [0.2.0] - 2026-01-01\n\n### Added\n- b\n"
    after = released(before, "0.2.0", "2026-01-02", "me/it")
    assert after.startswith(
        f"{head}## [Unreleased]\n\n## [0.2.0] - 2026-01-02\n\n### Added\n- a\n- b\n\n### Fixed\n- c\n"
    )
    assert "[0.2.0]: https://github.com/me/it/releases/tag/v0.2.0" in after
    assert released(after, "0.2.0", "2026-01-02", "me/it") == after
    with pytest.raises(SystemExit, match="Novelties"):
        released(f"{head}## [Unreleased]\n\n### Novelties\n- a\n", "0.2.0", "2026-01-02", "me/it")


def test_on_pypi_no_link_of_the_readme_is_relative(wheel):
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("/METADATA")]
        page = archive.read(name).decode()
    place = f"https://github.com/qlora-neft/qlora_neft/blob/v{qlora_neft.__version__}"
    assert f"]({place}/docs/quick_start.md)" in page
    assert "](docs/" not in page and "raw.githubusercontent.com" in page


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda p: p.stem)
def test_an_issue_form_is_one_that_github_shows(path):
    """Its rules: keys, kinds of fields, unique ids and labels. With a mistake the form vanishes without a word."""
    form = yaml.safe_load(path.read_text())
    assert set(form) == {"name", "description", "labels", "body"}
    ids = [field["id"] for field in form["body"]]
    labels = [field["attributes"]["label"] for field in form["body"]]
    assert len(set(ids)) == len(ids) and len(set(labels)) == len(labels)
    for field in form["body"]:
        assert field["type"] == "textarea" and re.fullmatch(r"[\w-]+", field["id"])
        assert set(field) <= {"type", "id", "attributes", "validations"}
        assert set(field["attributes"]) <= {"label", "description", "placeholder", "value", "render"}
        assert field.get("validations", {"required": True}) == {"required": True}


def test_everybody_checks_a_change_with_the_same_commands():
    """On GitHub, elsewhere and by hand: the two that CONTRIBUTING.md names."""
    said = re.findall(r"^make [a-z]+$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert said == ["make lint", "make test"]
    targets = re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {command.removeprefix("make ") for command in said} <= set(targets)
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    [job] = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == said
    script = ROOT / ".ci" / "run"
    if script.exists():  # not in an sdist
        assert [line for line in script.read_text().splitlines() if line.startswith("make ")] == said
        assert os.access(script, os.X_OK)


def test_the_workflow_may_read_only_and_takes_actions_by_major_version():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert set(workflow) == {"name", True, "permissions", "concurrency", "jobs"}  # YAML 1.1 reads "on" as true
    assert set(workflow[True]) == {"push", "pull_request"}
    assert workflow["permissions"] == {"contents": "read"}
    [job] = workflow["jobs"].values()
    assert "permissions" not in job
    used = [step["uses"] for step in job["steps"] if "uses" in step]
    assert len(used) == 2 and all(re.fullmatch(r"actions/[a-z-]+@v\d+", action) for action in used)


def test_the_workflow_runs_every_python_from_the_oldest_that_is_supported():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    [job] = workflow["jobs"].values()
    pythons = [tuple(map(int, version.split("."))) for version in job["strategy"]["matrix"]["python"]]
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    assert pythons == [(3, 11), (3, 12), (3, 13)] and pythons[0] == tuple(map(int, oldest.split(".")))


def test_run_is_the_function_whatever_was_imported_before():
    import qlora_neft.runner.run as module

    assert qlora_neft.run is module.run


def test_public_names_are_listed_and_others_refused():
    assert set(qlora_neft.__all__) <= set(dir(qlora_neft))
    assert qlora_neft.RecipeError is importlib.import_module("qlora_neft.errors").RecipeError
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = qlora_neft.nonsense


@pytest.mark.parametrize("path", ["bundled:", "bundled:demo/missing", "bundled:../recipes", "bundled:run.py"])
def test_bundled_reaches_the_data_folder_only(path):
    with pytest.raises(UserInputError, match="holds no such file"):
        resolve_bundled(path)


def test_other_paths_pass_through_bundled_as_they_are():
    assert resolve_bundled("some/model") == "some/model"
    assert Path(resolve_bundled("bundled:demo/train.jsonl")).is_file()
