"""The doctor says what is wrong, and what to do about it."""

import importlib.metadata
import json

import pytest
from typer.testing import CliRunner

from qlora_neft.cli import app, doctor


@pytest.fixture
def versions(monkeypatch):
    """Packages whose version the doctor is told, by name; the others are as installed."""
    told = {}
    real = importlib.metadata.version

    def version(name):
        found = told.get(name) if name in told else real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    return told


def finding(name):
    return next(entry for entry in doctor.examine()["findings"] if entry["name"] == name)


def test_the_report_is_ready_for_json_and_names_every_package():
    report = doctor.examine()
    assert json.loads(json.dumps(report)) == report
    assert {"torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate"} <= set(report["packages"])
    assert report["machine"]["cpu_cores"] >= 1
    assert "float32 LoRA" in finding("precision")["message"]


@pytest.mark.parametrize(
    ("package", "version", "status", "remedy"),
    [
        ("trl", "1.15.0", "fail", "pip install 'trl<2,>=1.16'"),
        ("trl", "1.16.0", "ok", ""),
        ("transformers", "6.0", "fail", "pip install 'transformers<6,>=5.15'"),
        ("torch", "2.6.0+cu124", "ok", ""),
        ("peft", None, "fail", "pip install 'peft>=0.20'"),
        ("torchao", "0.15.0", "fail", "pip uninstall torchao (it is not used)"),
        ("torchao", "0.16.0", "ok", ""),
        ("torchao", None, "ok", ""),
        ("matplotlib", None, "warn", "pip install 'qlora-neft[plots]'"),
    ],
)
def test_a_version_is_judged_with_a_remedy(versions, package, version, status, remedy):
    versions[package] = version
    found = finding(package)
    assert (found["status"], found["remedy"]) == (status, remedy)


def test_what_would_break_training_gives_exit_code_1(versions):
    versions["torchao"] = "0.10"
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "fail  torchao: 0.10 is too old for PEFT\n      remedy: pip uninstall torchao" in result.output
    assert json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)["status"] == "fail"


def test_a_driver_that_torch_does_not_see_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert finding("CUDA")["status"] == "warn"
    assert "CUDA build" in finding("CUDA")["remedy"]
