"""The tokenizer beside a run, a merged model and an export is the base's own, byte for byte."""

import json

import pytest
from tiny import byte_tokenizer, tiny_trainer
from transformers import AutoTokenizer

from qlora_neft.adapter.folder import find_adapter
from qlora_neft.export.consumers import facts_of, verdict_for
from qlora_neft.run_folder.tokenizer_files import FILES, needs_transformers_5, save_tokenizer

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def as_before_version_5(folder, **config):
    """A tokenizer's files as transformers 4 wrote them, which version 5 would write otherwise."""
    folder.mkdir(exist_ok=True)
    byte_tokenizer().save_pretrained(folder)
    old = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**old, "pad_token": "<pad>", **config}, indent=4))
    special = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder


def bytes_of(folder):
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}


def test_files_are_copied_as_they_are(tmp_path):
    base, out = as_before_version_5(tmp_path / "base"), tmp_path / "out"
    out.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token  # as `load_tokenizer` does where there is none
    assert save_tokenizer(tokenizer, out) and bytes_of(out) == bytes_of(base)
    assert needs_transformers_5(out) is None
    tokenizer.save_pretrained(tmp_path / "theirs")  # the day this fails, copying is not needed any more
    assert needs_transformers_5(tmp_path / "theirs") is not None


@pytest.mark.parametrize("in_config", [False, True])
def test_a_chat_template_is_laid_over(tmp_path, in_config):
    own = {"chat_template": "{{ messages }}"} if in_config else {}
    base, out = as_before_version_5(tmp_path / "base", **own), tmp_path / "out"
    out.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    assert save_tokenizer(tokenizer, out)
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config.pop("chat_template", TEMPLATE) == TEMPLATE and config["tokenizer_class"] == "PreTrainedTokenizerFast"
    changed = {"chat_template.jinja", *(["tokenizer_config.json"] if in_config else [])}
    assert {n for n, content in bytes_of(out).items() if bytes_of(base).get(n) != content} == changed


def changes():
    yield "added token", lambda tokenizer: tokenizer.add_tokens(["<new>"]), "its vocabulary"
    yield "end token", lambda tokenizer: setattr(tokenizer, "eos_token", "<unk>"), "its eos_token"


@pytest.mark.parametrize(("change", "what"), [(c, w) for _, c, w in changes()], ids=[name for name, _, _ in changes()])
def test_what_was_changed_is_written_by_transformers_and_said(tmp_path, change, what):
    base, out, said = as_before_version_5(tmp_path / "base"), tmp_path / "out", []
    out.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(base)
    change(tokenizer)
    assert not save_tokenizer(tokenizer, out, say=said.append)
    assert len(said) == 1 and f"{what} was changed" in said[0]
    again = AutoTokenizer.from_pretrained(out)
    assert len(again) == len(tokenizer) and again.eos_token == tokenizer.eos_token


def test_one_made_in_memory_is_written_by_transformers(tmp_path):
    said = []
    assert not save_tokenizer(byte_tokenizer(), tmp_path, say=said.append) and "are not here" in said[0]
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "</s>"


def test_check_says_which_readers_cannot_load_it(tmp_path, llama):
    tiny_trainer(llama, tmp_path / "run", processing_class=AutoTokenizer.from_pretrained(llama)).save_model()
    facts = facts_of(find_adapter(tmp_path / "run"))
    # The tiny base itself was written by transformers 5.
    assert bytes_of(tmp_path / "run") == bytes_of(llama)
    assert any("transformers 4 cannot load it" in note for note in verdict_for("vllm", facts).notes)
    as_before_version_5(tmp_path / "run")
    facts = facts_of(find_adapter(tmp_path / "run"))
    assert not any("transformers 4" in note for note in verdict_for("vllm", facts).notes)
