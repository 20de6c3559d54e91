"""Imports run downward only: a package knows the packages below its own layer, and none beside or above it.

A new package or top-level module belongs into LAYERS; until it is there, the test says so.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import qlora_neft

PACKAGE = Path(qlora_neft.__file__).parent

# Lowest first, one line a layer. A name is a package with all its modules, or a module at the top level.
LAYERS = (
    {"errors", "imports", "yaml_budget", "processes"},
    {"disks", "files", "hub_client", "output", "paths", "steps"},
    {"noise", "recipe"},
    {"base", "data", "display", "run_folder"},
    {"adapter", "fit", "fused"},
    {"export", "generation", "trainer"},
    {"runner"},
    {"evaluation"},
    {"compare"},
    {"watch"},
    {"cli"},
    {"__main__", "notebook"},
)
LAYER = {name: layer for layer, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def file_of(path):
    return path.relative_to(PACKAGE).as_posix()


def module_of(path):
    """Dotted name inside the package, such as ``data.prepare``; a package's own is that of its folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path):
    """Dotted names of ours that a file imports, anywhere in it: a module, or a name inside one."""
    found = set()
    package = ("qlora_neft", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.removeprefix("qlora_neft.") for name in names if name.startswith("qlora_neft.")}
    return found - {"__version__"}


def test_every_package_stands_on_one_layer():
    assert sum(len(names) for names in LAYERS) == len(LAYER)
    found = {module_of(path).split(".")[0] for path in MODULES}
    assert found == set(LAYER), "LAYERS and the package differ"


@pytest.mark.parametrize("path", MODULES, ids=file_of)
def test_a_module_imports_only_from_below(path):
    own = module_of(path).split(".")[0]
    others = {name.split(".")[0] for name in imports_of(path)} - {own}
    wrong = {other for other in others if LAYER.get(other, len(LAYERS)) >= LAYER[own]}
    assert not wrong, f"{own} (layer {LAYER[own]}) must not import {sorted(wrong)}"


def test_modules_of_a_package_do_not_import_each_other_in_a_circle():
    known = {module_of(path) for path in MODULES}
    graph = {}
    for path in MODULES:
        # "from .d import e" names a module and something in it, "from . import d" the module itself.
        targets = {name if name in known else name.rpartition(".")[0] for name in imports_of(path)}
        graph[module_of(path)] = targets & known - {module_of(path)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


def test_the_test_sees_imports_in_every_form(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    forms = {
        "a.py": ("from .x import y\ndef f():\n    import qlora_neft.runner\n", {"x.y", "runner"}),
        "b.py": ("from . import cli, __version__\nfrom qlora_neft.data import z\n", {"cli", "data.z"}),
        "sub/c.py": ("from .d import e\nfrom ..run import run\nimport os\n", {"sub.d.e", "run.run"}),
        "sub/f.py": ("from . import d\nfrom ..sub import g\n", {"sub.d", "sub.g"}),
    }
    monkeypatch.setattr("test_layers.PACKAGE", tmp_path)
    for file, (text, expected) in forms.items():
        (tmp_path / file).write_text(text)
        assert imports_of(tmp_path / file) == expected
