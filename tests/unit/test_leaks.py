"""What leaves this machine is what its name says, and holds no credential and no path of the machine."""

import json

import pytest
import torch
from safetensors.torch import save_file

from qlora_neft.errors import UserInputError
from qlora_neft.export.inputs import check_picture, check_tokenizer_file, refuse_links
from qlora_neft.export.leaks import paths_in, secrets_in

KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEA\n-----END OPENSSH PRIVATE KEY-----\n"
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.txt", "the password is hunter2\nof nobody\n"),
        ("vocab.txt", KEY),
        ("vocab.json", '{"password": "hunter2"}'),
        ("merges.txt", "name,salary,secret\n"),
        ("added_tokens.json", "[1]"),
        ("special_tokens_map.json", "hunter2"),
        ("tokenizer.model", "password: hunter2\n"),
        ("spiece.model", "\npassword: hunter2\n"),
        ("sentencepiece.bpe.model", ""),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "[" * 100_000),
        ("chat_template.jinja", "hunter2"),
    ],
)
def test_a_file_that_is_not_what_its_name_says(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserInputError, match=f"{name}: has the name of a tokenizer's file") as error:
        check_tokenizer_file(tmp_path / name)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.txt", b"[PAD]\n[UNK]\n##ing\n\xe2\x96\x81a\n"),
        ("vocab.json", b'{"a": 0, "\\u0120b": 1}'),
        ("merges.txt", b"#version: 0.2\na b\n\xc4\xa0 c\n"),
        ("added_tokens.json", b"{}"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}'),
        ("tokenizer.model", b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n"),
        ("chat_template.jinja", TEMPLATE.encode()),
    ],
)
def test_a_file_that_is(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    check_tokenizer_file(tmp_path / name)


def test_a_picture_that_is_none(tmp_path):
    (tmp_path / "loss.png").write_text(KEY)
    with pytest.raises(UserInputError, match="is not a picture"):
        check_picture(tmp_path / "loss.png")


def test_links(tmp_path):
    folder, other = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "other"
    for place in (folder, folder / "inner", other, tmp_path / "models--a--b" / "blobs"):
        place.mkdir(parents=True)
        (place / "file").write_text("x")
    for name, target in {
        "within": "inner/file",
        "blob": "../../blobs/file",  # as the Hub's download cache keeps them
        "away": "../../../other/file",
        "absolute": other / "file",
        "dotted": "inner/../../../../other/./file",
        "twice": "away",
        "below": "into/file",
        "blobs": "../../blobs/../../other/file",
    }.items():
        (folder / name).symlink_to(target)
    (folder / "into").symlink_to(other)
    refuse_links("here", folder, ("file", "within", "blob", "missing"))
    with pytest.raises(UserInputError) as error:
        refuse_links("here", folder, ("file", "away", "absolute", "dotted", "twice", "below", "into/file", "blobs"))
    assert str(error.value).startswith("here: away, absolute, dotted, twice, below, into/file, blobs are links")
    (tmp_path / "linked").symlink_to(folder)  # the folder itself may be a link
    refuse_links("here", tmp_path / "linked", ("file", "within", "blob"))


@pytest.mark.parametrize(
    "secret",
    [
        KEY,
        "hf_" + "a1" * 17,
        "ghp_" + "a" * 36,
        "AKIA" + "A1" * 8,
        "sk-proj-" + "a1" * 20,
        "xoxb-12345678901",
        "pass-word-1",
    ],
    ids=["key", "hub", "github", "aws", "openai", "slack", "own"],
)
def test_credentials_of_any_kind_are_found(tmp_path, monkeypatch, secret):
    monkeypatch.setenv("HF_TOKEN", "pass-word-1")
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE + "{# " + secret + " #}")
    [leak] = secrets_in(tmp_path)
    assert (leak.file, leak.line, leak.text) == ("chat_template.jinja", 2, "")


@pytest.fixture
def wendy(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/srv/homes/wendy")
    monkeypatch.setenv("LOGNAME", "wendy")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "export"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json", "safetensors", "README.md"])
@pytest.mark.parametrize(
    "words",
    [
        "see /srv/homes/wendy/t",
        "/home/wendy/t.jinja",
        "C:\\Users\\wendy\\t",
        "by wendy.",
        "/Users/wendy",
        "/mnt/runs/7",
    ],
)
def test_paths_and_names_of_this_machine_are_found(wendy, place, words):
    text = TEMPLATE + "{# " + words + " #}"
    if place == "safetensors":
        save_file({"a": torch.zeros(1)}, wendy / "a.safetensors", metadata={"template": text})
    elif place == "tokenizer_config.json":
        (wendy / place).write_text(json.dumps({"chat_template": text}))
    else:
        (wendy / place).write_text(text)
    found = paths_in(wendy, ["/mnt/runs/7"])
    # Somebody's home and name are looked for in the comments of templates: elsewhere they may be what it is about.
    if place != "README.md" or words.startswith(("see /srv", "/mnt")):
        assert len(found) == 1 and ("wendy" in found[0].text or found[0].text == "/mnt/runs/7")
    else:
        assert found == []


def test_words_that_look_like_paths_stay(wendy, monkeypatch):
    monkeypatch.setenv("HOME", "/content")
    (wendy / "chat_template.jinja").write_text("<content>{{ m }}</content>{{ '/home/oai/share' }}{# an example #}")
    (wendy / "vocab.json").write_text(json.dumps({"/content/x": 0, "/content": 1}))
    (wendy / "README.md").write_text("https://huggingface.co/datasets/content/x and /contents/x")
    assert paths_in(wendy, ["/datasets"]) == []
    (wendy / "README.md").write_text("line\n/content/run")
    assert [str(leak) for leak in paths_in(wendy)] == ["README.md:2: '/content'"]
