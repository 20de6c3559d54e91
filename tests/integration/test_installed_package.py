"""What a stranger gets: sdist, a wheel made from it, installed where nothing else is, and the demo run from there.

Needs the package index: it installs torch and all the rest (minutes, a gigabyte), with pip and, where it is at hand,
uv. `make package` runs it and leaves what it has built in ``dist/``; `make test-slow` builds into a temporary folder.
"""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import qlora_neft

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), pytest.mark.xdist_group("installed")]  # installed once
# Python's own word for every file it opens or folder it lists below the clone; none may appear.
WATCH = """
import sys
def _watch(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith({clone!r}):
        with open({log!r}, "a") as file:
            print(event, arguments[0], file=file)
sys.addaudithook(_watch)
"""


def has_nvidia_driver():
    """As the Makefile asks: with a driver, the torch that fits it; without one, the CPU build."""
    return Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi") is not None


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Folder with the sdist and the wheel, the wheel built from the sdist in an environment of its own."""
    pytest.importorskip("build", reason="build is not installed (pip install -e '.[dev]')")
    folder = Path(os.environ.get("DIST") or tmp_path_factory.mktemp("dist")).resolve()
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True)
    return folder


class Place:
    """An environment with the wheel and what it needs, and a current directory far from the clone."""

    def __init__(self, folder, wheel):
        self.work, self.log = folder / "work", folder / "opened-in-the-clone"
        self.work.mkdir()
        venv.create(folder / "venv", with_pip=True)
        self.bin = folder / "venv" / "bin"
        pins = [] if has_nvidia_driver() else ["-c", ROOT / "constraints" / "cpu.txt"]
        subprocess.run([self.bin / "python", "-I", "-m", "pip", "install", "-q", *pins, wheel], check=True)
        [site] = (folder / "venv" / "lib").glob("python*/site-packages")
        self.package = site / "qlora_neft"
        (site / "watch.py").write_text(WATCH.format(clone=f"{ROOT}{os.sep}", log=str(self.log)))
        (site / "watch.pth").write_text("import watch\n")

    def run(self, program, *words):
        """What a program of the environment prints; it knows of no other Python path, Hub or cache."""
        own = {
            "HOME": str(self.work),
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [self.bin / program, *map(str, words)], capture_output=True, text=True, cwd=self.work, env=own, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def place(dist, tmp_path_factory):
    [wheel] = dist.glob(f"qlora_neft-{qlora_neft.__version__}-*.whl")
    return Place(tmp_path_factory.mktemp("installed"), wheel)


def test_the_environment_watches_what_is_read_from_the_clone(place):
    place.run("python", "-c", f"open({str(ROOT / 'README.md')!r}).close()")
    assert "README.md" in place.log.read_text()
    place.log.unlink()


def test_recipes_and_machine_are_told(place):
    assert (
        Path(place.run("python", "-c", "import qlora_neft; print(qlora_neft.__file__)").strip()).parent == place.package
    )
    listed = place.run("qlora-neft", "ls")
    assert all(path.stem in listed for path in (ROOT / "recipes").glob("*.yaml"))
    machine = json.loads(place.run("qlora-neft", "doctor", "--json"))
    assert "torch" in json.dumps(machine)
    assert not place.log.exists(), place.log.read_text()


def test_the_demo_learns_and_answers(place):
    shown = place.run("qlora-neft", "train", "demo", "--output-dir", "out")
    run = place.work / "out"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "done" and summary["base_unchanged"] is True
    assert summary["after"]["held_out_loss"] < summary["before"]["held_out_loss"] / 5
    assert summary["after"]["exact_match"] > 0.7 and "exact answers, held out" in shown
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "recipe.yaml", "metrics.jsonl"):
        assert (run / name).stat().st_size > 0
    answer = json.loads(place.run("qlora-neft", "generate", "out", "Say thank you to Clara the swan.", "--json"))
    assert "Clara" in answer["text"]
    assert not place.log.exists(), place.log.read_text()


def test_uv_installs_it_as_a_tool_and_runs_it_without_installing(dist, tmp_path):
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not at hand")
    [wheel] = dist.glob(f"qlora_neft-{qlora_neft.__version__}-*.whl")
    wanted, work = f"qlora-neft[plots] @ {wheel.as_uri()}", tmp_path / "work"
    work.mkdir()
    # UV_CONSTRAINT names the torch where uv's own index of CPU builds is out of reach.
    cpu = [] if has_nvidia_driver() or "UV_CONSTRAINT" in os.environ else ["--torch-backend", "cpu"]
    bins, own = (
        tmp_path / "bin",
        {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "UV_TOOL_DIR": str(tmp_path / "tools")},
    )
    environment = {**os.environ, **own, "HOME": str(tmp_path), "UV_TOOL_BIN_DIR": str(bins)}

    def run(*words):
        done = subprocess.run(words, capture_output=True, text=True, cwd=work, env=environment, check=False)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        return done.stdout

    run(uv, "tool", "install", *cpu, wanted)
    assert "torch" in run(bins / "qlora-neft", "doctor", "--json")
    run(bins / "qlora-neft", "train", "demo", "--output-dir", "out", "train.max_steps=2", "machine.eval_answers=0")
    assert (work / "out" / "loss.png").stat().st_size > 0  # the extra came along
    listed = run(uv, "tool", "run", *cpu, "--from", wanted, "qlora-neft", "ls")
    assert all(path.stem in listed for path in (ROOT / "recipes").glob("*.yaml"))
