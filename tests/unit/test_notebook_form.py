"""What every notebook has in common, read without running it: form, metadata, and public names alone."""

import ast
import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import qlora_neft
from scripts.set_repository import repository_of

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("export_to_hub.ipynb", "finetune.ipynb", "noise_and_alpha.ipynb", "thirty_billion.ipynb")
OWNER = repository_of(ROOT)
MOST_CODE_CELLS = 12
TYPES = {"boolean": bool, "integer": int, "string": str, "slider": int}


def notebook_of(name):
    return json.loads((ROOT / "notebooks" / name).read_text(encoding="utf-8"))


def code_of(name):
    """Sources of the code cells; lines for pip, which is no Python, as `pass`."""
    cells = [cell for cell in notebook_of(name)["cells"] if cell["cell_type"] == "code"]
    return [(cell, re.sub(r"^( *)%pip .*$", r"\1pass", "".join(cell["source"]), flags=re.M)) for cell in cells]


def test_these_are_all_notebooks():
    assert tuple(sorted(path.name for path in (ROOT / "notebooks").iterdir() if path.suffix)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_opens_with_title_badge_and_what_to_expect(name):
    first = notebook_of(name)["cells"][0]
    text = "".join(first["source"])
    assert first["cell_type"] == "markdown" and text.startswith("# ")
    badge = "https://colab.research.google.com/assets/colab-badge.svg"
    page = f"https://colab.research.google.com/github/{OWNER}/blob/main/notebooks/{name}"
    assert f"[![Open in Colab]({badge})]({page})" in text
    assert "**What you get:**" in text and "**How long it takes:**" in text


@pytest.mark.parametrize("name", NAMES)
def test_it_asks_colab_for_a_t4_and_holds_no_output(name):
    notebook = notebook_of(name)
    assert notebook["metadata"]["accelerator"] == "GPU"
    assert notebook["metadata"]["colab"] == {"gpuType": "T4", "provenance": []}
    cells = [cell for cell, _ in code_of(name)]
    assert 0 < len(cells) <= MOST_CODE_CELLS
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


@pytest.mark.parametrize("name", NAMES)
def test_its_form_is_one_cell_of_plain_values(name):
    [source] = [source for cell, source in code_of(name) if "parameters" in cell["metadata"].get("tags", ())]
    assert source.startswith("# @title ")
    for line in source.splitlines()[1:]:
        if line.startswith("#"):
            continue
        [assignment] = ast.parse(line).body
        [target] = assignment.targets
        value = ast.literal_eval(assignment.value)
        comment = line.partition("# @param ")[2]
        assert target.id.isupper() and comment, line
        kind = re.search(r'type:"(\w+)"', comment)
        choices = re.match(r"\[.*?\]", comment)
        assert type(value) is (TYPES[kind[1]] if kind else str), line
        assert not choices or value in json.loads(choices[0]), line


@pytest.mark.parametrize("name", NAMES)
def test_it_uses_public_names_alone(name):
    used = set()
    for _, source in code_of(name):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("qlora_neft") for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "qlora_neft":
                assert node.module == "qlora_neft"
                used |= {alias.name for alias in node.names}
    assert used and used <= set(qlora_neft.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_it_installs_in_colab_alone_and_removes_torchao(name):
    text = "".join(code_of_line for cell, _ in code_of(name)[:1] for code_of_line in cell["source"])
    tree = ast.parse(code_of(name)[0][1])
    [guard] = [node for node in tree.body if isinstance(node, ast.If)]
    assert ast.unparse(guard.test) == "IN_COLAB" and 'IN_COLAB = "COLAB_RELEASE_TAG" in os.environ' in text
    assert f"git+https://github.com/{OWNER}" in text and "%pip uninstall -qy torchao" in text
    others = "".join("".join(cell["source"]) for cell, _ in code_of(name)[1:])
    assert not re.search(r"^ *[%!]", others, flags=re.M)


@pytest.mark.parametrize("name", NAMES)
def test_the_token_is_colabs_secret_and_in_no_form(name):
    text = "\n".join(source for _, source in code_of(name))
    assert "from huggingface_hub import get_token" in text and not re.search(r"hf_\w+", text)
    assert not re.search(r"^\w*TOKEN\w* = ", text, flags=re.M)


def test_what_colab_has_satisfies_the_package():
    lines = (ROOT / "constraints" / "colab.txt").read_text().splitlines()
    pins = {pin.name: pin for pin in map(Requirement, (line for line in lines if not line.startswith("#")))}
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    checked = [bound for bound in map(Requirement, needed) if bound.name in pins]
    for bound in checked:
        [version] = [specifier.version for specifier in pins[bound.name].specifier]
        assert bound.specifier.contains(version.removesuffix(".*")), (bound, version)
    assert {"torch", "transformers", "peft", "accelerate", "huggingface_hub"} <= {bound.name for bound in checked}
    assert not {"datasets", "pyarrow", "fsspec", "torchao"} & set(pins)
