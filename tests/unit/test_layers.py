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

# Lowest first. A name stands for a module or for a package with all its modules.
LAYERS = (
    {"errors", "file_hash", "picture", "preview_text", "processes", "quiet", "text_file"},
    {"disk_errors", "json_file", "length_plot", "loss_plot", "record_file", "rows_progress", "speed_line", "suffixes"},
    {"bundled", "checkpoint_files", "philox", "precision", "randomness", "run_lock", "run_record", "sequences"},
    {"mirror", "neftune", "remote_code", "smaller_steps", "step_data", "stop_request", "token_choice"},
    {"decoding", "freelb", "step_batch", "when_to_save"},
    # the parts
    {"adapter", "checkpointing", "clean_loss", "data", "fit", "label_check", "lora", "quantization", "resume"},
    {"memory_probe", "output_folder", "plan", "tokenizer", "trainer_config"},
    {"clean_evaluation", "trained", "trainer_setup"},
    {"checkpointed_trainer", "consumers", "gguf_export", "talk"},
    {"step_trainer"},
    {"answers", "trainer"},
    {"console", "evaluation", "measure", "run_lines", "run_report"},
    {"embedding_noise", "harness", "hub"},
    # the recipe: above the parts, so that none of them can see it
    {"recipe_files", "recipe_types", "recipe_yaml"},
    {"push_while_training"},
    {"recipe_data"},
    {"recipe_schema"},
    {"recipe_keys"},
    {"overrides", "recipe_problems"},
    {"recipe"},
    # what is told to do something with a recipe
    {"unpack_fit"},
    {"unpack"},
    {"session", "unpack_trainer"},
    {"doctor", "embedding_noise_report", "eval_runs", "merging", "noise_report", "notebook", "preview", "run"},
    {"sweeping"},
    {"cli_export", "cli_fit", "cli_preview", "cli_recipes", "cli_report", "cli_talk"},
    {"cli_consumers", "cli_eval_more", "cli_merge", "cli_sweep"},
    {"cli_eval"},
    {"cli"},
    {"__main__"},
)
FLOOR = {name: floor for floor, names in enumerate(LAYERS) for name in names}
RECIPE = {"recipe", "overrides", *(name for name in FLOOR if name.startswith("recipe_"))}

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def file_of(path):
    return path.relative_to(PACKAGE).as_posix()


def name_of(path):
    """The module, or the package directly under ours, that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


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
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "qlora_neft" else [module]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("qlora_neft.")}
    return {name for name in found if name != "__version__"}


def test_no_module_stands_on_two_floors():
    assert sum(len(names) for names in LAYERS) == len(FLOOR)


@pytest.mark.parametrize("path", MODULES, ids=file_of)
def test_a_module_imports_only_from_below(path):
    name = name_of(path)
    assert name in FLOOR, f"{name} is new: give it a floor in LAYERS"
    wrong = {other for other in imports_of(path) - {name} if FLOOR.get(other, len(LAYERS)) >= FLOOR[name]}
    assert not wrong, f"{name} (floor {FLOOR[name]}) must not import {sorted(wrong)}"


@pytest.mark.parametrize("path", [path for path in MODULES if name_of(path) in RECIPE], ids=file_of)
def test_the_recipe_knows_no_part(path):
    assert imports_of(path) <= RECIPE | {"errors", "bundled", "suffixes"}


def test_the_test_sees_imports_in_every_form(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    forms = {
        "a.py": ("from .x import y\ndef f():\n    import qlora_neft.run\n", {"x", "run"}),
        "b.py": ("from . import cli, __version__\nfrom qlora_neft.data import z\n", {"cli", "data"}),
        "sub/c.py": ("from .d import e\nfrom ..run import run\nimport os\n", {"sub", "run"}),
    }
    monkeypatch.setattr("test_layers.PACKAGE", tmp_path)
    for file, (text, expected) in forms.items():
        (tmp_path / file).write_text(text)
        assert imports_of(tmp_path / file) == expected
