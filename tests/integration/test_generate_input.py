"""generate: wrong arguments and files that are not all prompts are refused by name and line."""

import io
import json
import sys

import pytest
from command_line import refused
from talker import save_talker


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return str(save_talker(tmp_path_factory.mktemp("talker")))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def talk(*turns):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def test_wrong_arguments_are_refused(out, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    assert refused("generate", out) == "PROMPT (standard input) is blank"
    assert "no such folder" in refused("generate", "./none", "Hi")
    assert refused("generate", out, "Hi", " ") == "PROMPT 2 is blank"
    assert (
        "must be alpaca, alpaca-newline, alpaca-space, none, vicuna, chat or a .jinja file, got 'alpacca'"
        in refused("generate", out, "Hi", "--prompt-template", "alpacca")
    )
    assert "--prompt-template" in refused("generate", out, "Hi", "--prompt-template", "none.jinja")
    assert "no effect without --sample" in refused("generate", out, "Hi", "--top-p", "0.5")
    assert refused("generate", out, "Hi", "--sample", "--temperature", "0").startswith("--temperature: must be above 0")
    assert "--repetition-penalty" in refused("generate", out, "Hi", "--repetition-penalty", "0")
    assert "--base-alone" in refused("generate", out, "Hi", "--compare", "--base-alone")
    assert "--file" in refused("generate", out, "Hi", "--file", "p.txt")
    assert "alpaca has no place for a system message" in refused("generate", out, "Hi", "--system", "Be brief.")
    assert "no folder" in refused("generate", out, "Hi", "--output", "none/a.json")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", "\n \n", "is empty"),
        ("p.txt", "caf\xe9\n", "--file: 'p.txt' cannot be read as UTF-8 text"),
        ("p.md", "Hi", "must be a .txt"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n{"prompt": "c"}\n', "line 2 is not JSON"),
        ("p.jsonl", '{"text": "a"}\n', "line 1: needs prompt, or instruction, or messages; its fields are text"),
        (
            "p.jsonl",
            '{"prompt": "a"}\n{"prompt": " "}\n{"prompt": 7}\n',
            "line 2 is blank\n  line 3: prompt is int '7'",
        ),
        ("p.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}\n', "line 1: messages hold no request"),
        ("p.jsonl", '{"messages": "a"}\n', "line 1: messages is str 'a', not a list of turns"),
        ("p.jsonl", json.dumps(talk("a", "b", "c")) + "\n", "line 1: the prompt template alpaca takes one request"),
        ("p.txt", None, "no file at 'p.txt'"),
    ],
)
def test_a_file_that_is_not_all_prompts_is_refused_by_its_lines(out, folder, name, text, said):
    if text is not None:
        (folder / name).write_text(text, encoding="latin-1")
    assert said in refused("generate", out, "--file", name)
