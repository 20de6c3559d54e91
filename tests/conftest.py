"""Fixtures shared by every test; nothing here needs a network, a GPU or files from outside the repository."""

from __future__ import annotations

import gc
import os
import signal
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts what it puts in the background so
    signal.signal(signal.SIGINT, signal.default_int_handler)  # and what the tests start would inherit it
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # the same under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors gain nothing from threads, and two test processes would fight
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Prepared data is kept beside what `datasets` keeps: of one test process only, and not in the user's cache.
_folder = tempfile.TemporaryDirectory(prefix="qlora_neft-tests-")
os.environ["HF_DATASETS_CACHE"] = _folder.name
# What the processes of a session share (`forked.py`); pytest-xdist's inherit the variables.
os.environ.setdefault("QLORA_NEFT_TEST_SESSION", _folder.name)
os.environ.setdefault("QLORA_NEFT_TEST_SESSION_OWNER", str(os.getpid()))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the garbage collector from what is imported: a walk over it takes half a second, and there are many."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def float32_on_a_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact comparisons are made in float32 on a CPU, also where ``auto`` would find a GPU or bf16 matrix units."""
    own_machine = {"cpu", "gpu"} & set(request.fixturenames) or request.node.get_closest_marker("gpu")
    if "torch" in sys.modules and not own_machine:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        monkeypatch.setattr("qlora_neft.base.precision.cpu_has_bf16_matrix_unit", lambda: False)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama on disk."""
    from tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def architecture_dir(tmp_path_factory: pytest.TempPathFactory):
    """Tiny random models on disk by architecture, each made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        from tiny import save_tiny_model

        if name not in made:
            made[name] = save_tiny_model(tmp_path_factory.mktemp(name.replace("-", "_")), name)
        return made[name]

    return get
