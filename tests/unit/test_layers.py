"""The house has floors: a module imports only from the floors below its own.

A new module belongs into LAYERS; until it is there, the test says so. Modules of one floor do not know each
other.
A part (all that is below the recipe) takes flat arguments and never sees a Recipe: only run.py unpacks one.
"""

import ast
from pathlib import Path

import pytest

import qlora_neft

PACKAGE = Path(qlora_neft.__file__).parent

# Lowest first. A name stands for a module, for a package with all its modules, or for one module of a package whose
# modules stand on several floors; `package.__init__` is then what the package itself gives out.
LAYERS = (
    {
        "display.picture",
        "display.preview_text",
        "display.quiet",
        "errors",
        "files.file_hash",
        "files.text_file",
        "lazy_names",
        "running.processes",
    },
    {
        "display.length_plot",
        "display.loss_plot",
        "display.rows_progress",
        "display.speed_line",
        "files.disk_errors",
        "files.json_file",
        "files.record_file",
        "files.suffixes",
    },
    {
        "files.bundled",
        "precision",
        "run_folder.checkpoint_files",
        "run_folder.lock",
        "run_folder.record",
        "steps.philox",
        "steps.randomness",
        "steps.sequences",
    },
    {
        "decoding.settings",
        "decoding.token_choice",
        "neftune",
        "remote_code",
        "run_folder.mirror",
        "run_folder.stop_request",
        "steps.rows",
        "trainer.smaller_steps",
    },
    {"base_config", "decoding.decode", "run_folder.when_to_save", "steps.batch", "steps.freelb"},
    {"decoding.__init__"},
    # the parts
    {
        "data",
        "fit",
        "lora",
        "quantization",
        "run_folder.adapter",
        "run_folder.resume",
        "trainer.activation_checkpointing",
        "trainer.clean_loss",
        "trainer.label_check",
    },
    {"run_folder.output_folder", "running.plan", "tokenizer", "trainer.config", "trainer.memory_probe"},
    {"trained", "trainer.clean_evaluation", "trainer.setup"},
    {"consumers", "gguf_export", "talk", "trainer.checkpointed_trainer"},
    {"trainer.finite_steps"},
    {"trainer.step_trainer"},
    {"decoding.answers", "trainer.qlora_neft_trainer"},
    {"trainer.__init__"},
    {"display.console", "display.run_lines", "evaluation", "run_report", "running.measure"},
    {"evaluation.embedding_noise", "evaluation.harness", "hub"},
    # the recipe: above the parts, so that none of them can see it
    {"recipe.files", "recipe.value_types", "recipe.yaml_text"},
    {"running.push_while_training"},
    {"recipe.data"},
    {"recipe.schema"},
    {"recipe.keys"},
    {"recipe.overrides", "recipe.problems"},
    {"recipe.load"},
    {"recipe.__init__"},
    # what is told to do something with a recipe
    {"running.unpack_fit"},
    {"running.unpack"},
    {"running.session", "running.unpack_trainer"},
    {
        "inspection.doctor",
        "inspection.embedding_noise_report",
        "inspection.eval_runs",
        "inspection.noise_report",
        "inspection.preview",
        "merging",
        "notebook",
        "run",
    },
    {"sweeping"},
    {"cli.answering"},
    {"cli.export", "cli.fit", "cli.preview", "cli.recipes", "cli.report", "cli.talk"},
    {"cli.consumers", "cli.merge", "cli.sweep"},
    {"cli.eval"},
    {"cli.verbs"},
    {"cli.__init__"},
    {"__main__"},
)
FLOOR = {name: floor for floor, names in enumerate(LAYERS) for name in names}
RECIPE = {name for name in FLOOR if name.startswith("recipe.")}

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def file_of(path):
    return path.relative_to(PACKAGE).as_posix()


def name_of(path):
    """The name in LAYERS that a file belongs to."""
    return named(path.relative_to(PACKAGE).with_suffix("").parts)


def named(parts):
    """The name in LAYERS of what is found along ``parts`` under our package, or the one it would have there."""
    whole, own = parts[0], ".".join(parts[:2])
    if own in FLOOR:
        return own
    if whole in FLOOR or not (PACKAGE / whole).is_dir():
        return whole
    inside = PACKAGE.joinpath(*parts[:2])
    is_module = inside.with_suffix(".py").is_file() or (len(parts) > 1 and inside.is_dir())
    return own if is_module else f"{whole}.__init__"


def imports_of(path):
    """Modules of ours that a file imports, anywhere in it."""
    found = set()
    package = ("qlora_neft", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            # "from . import cli" names the module last, "from .cli import main" first.
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {named(name.split(".")[1:]) for name in names if name.startswith("qlora_neft.")}
    return found - {"__version__"}


def test_no_module_stands_on_two_floors():
    assert sum(len(names) for names in LAYERS) == len(FLOOR)


@pytest.mark.parametrize("path", MODULES, ids=file_of)
def test_a_module_imports_only_from_below(path):
    name = name_of(path)
    if name not in FLOOR and path.name == "__init__.py" and not imports_of(path):
        return  # it says what the package is, and no more
    assert name in FLOOR, f"{name} is new: give it a floor in LAYERS"
    wrong = {other for other in imports_of(path) - {name} if FLOOR.get(other, len(LAYERS)) >= FLOOR[name]}
    assert not wrong, f"{name} (floor {FLOOR[name]}) must not import {sorted(wrong)}"


@pytest.mark.parametrize("path", [path for path in MODULES if name_of(path) in RECIPE], ids=file_of)
def test_the_recipe_knows_no_part(path):
    assert imports_of(path) <= RECIPE | {"errors", "files.bundled", "files.suffixes", "lazy_names"}


def test_the_test_sees_imports_in_every_form(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.py").touch()
    forms = {
        "a.py": ("from .x import y\ndef f():\n    import qlora_neft.run\n", {"x", "run"}),
        "b.py": ("from . import cli, __version__\nfrom qlora_neft.data import z\n", {"cli", "data"}),
        "sub/c.py": ("from .d import e\nfrom ..run import run\nimport os\n", {"sub.d", "run"}),
        "sub/f.py": ("from . import d\nfrom ..sub import g\n", {"sub.d", "sub.__init__"}),
        "sub/h.py": ("from ..data.split import i\nfrom ..recipe.load import j\n", {"data", "recipe.load"}),
    }
    monkeypatch.setattr("test_layers.PACKAGE", tmp_path)
    for file, (text, expected) in forms.items():
        (tmp_path / file).write_text(text)
        assert imports_of(tmp_path / file) == expected
