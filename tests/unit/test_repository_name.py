"""All links to this repository agree with pyproject.toml, and one command moves them."""

import re
import shutil

import pytest

from scripts.set_repository import HOSTS, ROOT, repository_of, set_repository, texts

# What is installed from GitHub, opened in Colab or cited is this repository, whatever it is called.
OURS = re.compile(
    r"(?:git\+https://github\.com/|colab\.research\.google\.com/github/|repository-code: \S+\.com/)([\w.-]+/[\w.-]+)"
)


def names_in(root):
    return {
        path.relative_to(root).as_posix(): set(OURS.findall(path.read_text(encoding="utf-8"))) for path in texts(root)
    }


def test_all_agree_and_all_are_found():
    named = {place: names for place, names in names_in(ROOT).items() if names}
    assert {place: names for place, names in named.items() if names != {repository_of(ROOT)}} == {}
    notebooks = {path.relative_to(ROOT).as_posix() for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert notebooks | {"CITATION.cff", "docs/quick_start.md", "jobs/skypilot.yaml"} <= set(named)


def test_one_command_moves_them_all(tmp_path):
    for path in texts(ROOT):
        (copy := tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    old, before = repository_of(tmp_path), names_in(tmp_path)
    set_repository(tmp_path, "me/my.fork")
    assert repository_of(tmp_path) == "me/my.fork"
    assert names_in(tmp_path) == {place: {"me/my.fork"} if names else set() for place, names in before.items()}
    assert not [path for path in texts(tmp_path) for host in HOSTS if host + old in path.read_text(encoding="utf-8")]
    (tmp_path / "other.md").write_text(f"{HOSTS[0]}me/my.fork-two", encoding="utf-8")
    set_repository(tmp_path, old)  # and back, but not what only begins like it
    assert (tmp_path / "other.md").read_text(encoding="utf-8").endswith("me/my.fork-two")
    (tmp_path / "other.md").unlink()
    assert names_in(tmp_path) == before


@pytest.mark.parametrize("name", ["fork", "https://github.com/me/fork", ""])
def test_what_is_no_owner_and_name_is_refused(tmp_path, name):
    with pytest.raises(SystemExit, match="OWNER/NAME"):
        set_repository(tmp_path, name)
