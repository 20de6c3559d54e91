"""Notebooks executed as a person would: all cells, in a real kernel, with other values in the form."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from forked import environment, quick_python

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
SECONDS_A_CELL = 280
SMALL = "machine.eval_answers=2 data.split=train[:64] data.eval_split=train[:16]"  # what a training here reads
MISSING = [
    name for name in ("nbclient", "ipykernel", "matplotlib", "rouge_score") if not importlib.util.find_spec(name)
]
needs_notebooks = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING} (pip install -e '.[dev]')")


def execute(name: str, folder: Path, variables: Mapping[str, str] | None = None, **parameters: Any) -> Any:
    """Run a notebook in a folder, with parameters in place of those in its form.

    The kernel runs this interpreter and this clone, whatever kernels are installed. It has one thread and, unless
    ``variables`` say otherwise, no Hub; Jupyter's own files go into the folder. What the kernel starts is forked.

    Args:
        name: File in ``notebooks/``.
        folder: Current directory of the kernel; made if need be.
        variables: Environment variables of the kernel, on top.
        parameters: Values for names in the cell tagged ``parameters``.

    Returns:
        The notebook with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell raised; the message holds its traceback and output.
    """
    import nbformat
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    class Client(NotebookClient):
        def create_kernel_manager(self) -> AsyncKernelManager:  # a manager of its own: nbclient ends the kernel
            self.km = AsyncKernelManager(kernel_name="this", kernel_spec_manager=_this_interpreter(home / "kernels"))
            return self.km

    notebook = with_parameters(nbformat.read(NOTEBOOKS / name, as_version=4), parameters)
    folder.mkdir(exist_ok=True)
    home = folder / ".jupyter-of-the-test"
    startup = home / "profile_default" / "startup" / "python.py"
    startup.parent.mkdir(parents=True)
    startup.write_text(f"import sys\n\nsys.executable = {quick_python(**variables or {})!r}\n")
    client = Client(notebook, timeout=SECONDS_A_CELL, resources={"metadata": {"path": str(folder)}})
    client.execute(env=_environment(home, variables or {}))
    return notebook


def with_parameters(notebook: Any, parameters: Mapping[str, Any]) -> Any:
    """The notebook with a cell after the one tagged ``parameters``: papermill's convention."""
    import nbformat

    [place] = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
    unknown = {name for name in parameters if f"\n{name} = " not in f"\n{notebook.cells[place].source}"}
    assert not unknown, f"the form has no {sorted(unknown)}"
    source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(place + 1, cell)
    return notebook


def text_of(notebook: Any) -> str:
    """All that the cells printed, and what they showed as text."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = (output.get("text") or output.get("data", {}).get("text/markdown", "") for output in outputs)
    return "\n".join(shown)


def pictures_of(notebook: Any) -> int:
    """How many PNGs the cells show."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def _this_interpreter(folder: Path) -> Any:
    from jupyter_client.kernelspec import KernelSpecManager

    spec = {"display_name": "this", "language": "python"}
    spec["argv"] = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (folder / "this").mkdir(parents=True, exist_ok=True)
    (folder / "this" / "kernel.json").write_text(json.dumps(spec))
    return KernelSpecManager(kernel_dirs=[str(folder)], ensure_native_kernel=False)


def _environment(home: Path, variables: Mapping[str, str]) -> dict[str, str]:
    own = {
        "CUDA_VISIBLE_DEVICES": "",  # the demo in float32, the same on every machine
        "IPYTHONDIR": str(home),
        "MPLCONFIGDIR": str(home),
    }
    kept = {name: value for name, value in environment().items() if name != "COLAB_RELEASE_TAG"}
    return {**kept, **own, **variables}
