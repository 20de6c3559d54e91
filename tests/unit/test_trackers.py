"""Which trackers a run may report to, and what is left of the process when it has."""

import logging
import os
from types import SimpleNamespace

import pytest

from qlora_neft import load_recipe
from qlora_neft.cli import doctor
from qlora_neft.errors import RecipeError, UserInputError
from qlora_neft.runner.trackers import ready
from qlora_neft.runner.trackers.environment import environment, only_errors_of, unless_set
from qlora_neft.runner.trackers.told import numbers_of


@pytest.fixture
def none_installed(monkeypatch):
    monkeypatch.setattr(ready, "is_installed", lambda tracker: False)
    monkeypatch.setattr(doctor, "is_installed", lambda tracker: tracker == "mlflow")


@pytest.mark.parametrize(
    ("value", "trackers"),
    [
        ("tensorboard", ("tensorboard",)),
        ("[]", ()),
        ("[trackio, wandb, tensorboard, mlflow]", ("trackio", "wandb", "tensorboard", "mlflow")),
    ],
)
def test_trackers_are_one_name_or_a_list(value, trackers):
    assert load_recipe("demo", [f"machine.report_to={value}"]).machine.trackers == trackers


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("tensorbord", ["tensorbord", "trackio", "wandb", "tensorboard", "mlflow"]),
        ("[wandb, comet]", ["comet", "trackio", "wandb", "tensorboard", "mlflow"]),
        ("[wandb, mlflow, wandb]", ["names a tracker twice, got wandb, mlflow, wandb"]),
        ("all", ["all", "trackio"]),
        ("3", ["3", "trackio"]),
    ],
)
def test_another_name_is_refused_with_the_list(value, said):
    with pytest.raises(RecipeError) as refused:
        load_recipe("demo", [f"machine.report_to={value}"])
    assert all(word in str(refused.value) for word in ["machine.report_to", *said])


def test_one_that_is_not_installed_is_refused_with_its_extra(none_installed):
    ready.check_trackers(())
    line = r"machine.report_to: trackio is not installed. Install it \(pip install 'qlora-neft\[trackio\]'\)"
    with pytest.raises(UserInputError, match=line):
        ready.check_trackers(["trackio"])
    with pytest.raises(RecipeError, match=r"2 problems(.|\n)*qlora-neft\[wandb\](.|\n)*qlora-neft\[mlflow\]"):
        ready.check_trackers(["wandb", "mlflow"])


def test_a_folder_of_a_trackers_files_is_no_tracker(tmp_path, monkeypatch):
    (tmp_path / "a_tracker").mkdir()  # as ./wandb and ./mlflow
    monkeypatch.syspath_prepend(tmp_path)
    assert not ready.is_installed("a_tracker")
    (tmp_path / "a_tracker" / "__init__.py").touch()
    assert ready.is_installed("a_tracker")


def test_wandb_without_a_key_is_refused_before_it_would_ask(monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is an extra that dev leaves out")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def no_key(**asked):
        assert asked == {"prompt": False}
        raise wandb.errors.UsageError("no key")

    settings = SimpleNamespace(mode="online")
    monkeypatch.setattr(wandb, "setup", lambda: SimpleNamespace(settings=settings))  # the real one reads variables once
    monkeypatch.setattr(wandb, "login", no_key)
    with pytest.raises(UserInputError, match=r"wandb login.*WANDB_API_KEY.*WANDB_MODE=offline"):
        ready.check_trackers(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    ready.check_trackers(["wandb"])


def test_doctor_lists_the_trackers(none_installed):
    [finding] = [entry for entry in doctor.examine()["findings"] if entry["name"] == "trackers"]
    assert finding["status"] == "ok" and "no trackio, no wandb, no tensorboard, mlflow" in finding["message"]


def test_variables_and_loggers_are_as_before(monkeypatch):
    monkeypatch.setenv("USERS_OWN", "1")
    logger = logging.getLogger("some.tracker")
    logger.setLevel(logging.INFO)
    assert unless_set({"USERS_OWN": "2", "OURS": "3"}) == {"OURS": "3"}

    def now():
        return os.environ.get("OURS"), os.environ.get("USERS_OWN"), logger.level

    with environment({"OURS": "3", "USERS_OWN": None}), only_errors_of((logger.name,)):
        assert now() == ("3", None, logging.ERROR)
    assert now() == (None, "1", logging.INFO)


def test_only_numbers_are_told():
    logs = {"loss": 1.5, "epoch": 1, "nan": float("nan"), "answers": ["a row"], "note": "text", "none": None}
    assert numbers_of(logs) == {"loss": 1.5, "epoch": 1}
