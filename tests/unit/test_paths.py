"""What a name stands for is decided in one place, for data, models and adapters alike."""

import pytest

from qlora_neft.paths import DATA_SUFFIXES, kind_of, resolve_bundled, shown_path


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("bundled:demo/base", "bundled"),
        ("bundled:none", "bundled"),
        ("gpt2", "hub"),
        ("owner/name", "hub"),
        ("owner/llama-2.7b", "hub"),
        ("_owner/name_1", "hub"),
        ("owner/rows.jsonl", "hub"),  # without suffixes: a model may be called so
        ("", "local"),
        (".", "local"),
        ("./owner/name", "local"),
        ("../name", "local"),
        (".hidden/name", "local"),
        ("/owner/name", "local"),
        ("~/name", "local"),
        ("~", "local"),
        ("owner/name/more", "local"),
        ("owner/", "local"),
        ("owner//name", "local"),
        ("rows/*", "local"),
        ("rows/[ab]", "local"),
        ("C:\\rows", "local"),
        ("C:/rows", "local"),
        ("rows\\x", "local"),
        ("ow ner/name", "local"),
        ("öwner/name", "local"),
        ("owner/name\n", "local"),
        ("there", "local"),
        ("there/file", "local"),
    ],
)
def test_kinds(tmp_path, monkeypatch, path, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    assert kind_of(path) == kind


@pytest.mark.parametrize("path", ["rows.jsonl", "owner/rows.JSON", "rows.csv", "owner/rows.parquet"])
def test_an_ending_of_local_files_makes_a_name_local(path):
    assert (kind_of(path), kind_of(path, suffixes=DATA_SUFFIXES)) == ("hub", "local")


def test_a_bundled_file_is_shown_by_its_name():
    path = resolve_bundled("bundled:demo/base")
    assert kind_of(path) == "local" and shown_path(path) == "bundled:demo/base"
    assert shown_path("some/model") == "some/model"
