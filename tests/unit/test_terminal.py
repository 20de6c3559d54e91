"""What is not ours is shown on a terminal and obeyed by none: escape sequences of every kind, from every place."""

import io
import json
import sys

import pytest
import yaml
from command_line import invoke
from markdown_it import MarkdownIt
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from qlora_neft.display import markdown
from qlora_neft.display.console import say, show_answers
from qlora_neft.display.safe_console import SafeConsole
from qlora_neft.display.tables import Table
from qlora_neft.display.terminal import echo, echo_result, is_obeyed, printable, shown, shown_json
from qlora_neft.generation.screen import Screen

ATTACKS = {
    "color": "\x1b[31mred\x1b[0m",
    "clear": "\x1b[2J\x1b[H",
    "cursor up": "done\x1b[1A\x1b[2Kerror",
    "link": "\x1b]8;;http://evil.example\x07safe\x1b]8;;\x07",
    "clipboard": "\x1b]52;c;cm0gLXJmIH4=\x07",
    "title": "\x1b]0;root\x1b\\",
    "device": '\x1bP$q"p\x1b\\',
    "C1 color": "\x9b31mred",
    "C1 clipboard": "\x9d52;c;eA==\x9c",
    "overwrite": "rm -rf /\recho hi  ",
    "backspace": "evil\b\b\b\bgood",
    "bell": "\a" * 3,
    "reversed": "\u202etxt.exe",
    "isolate": "\u2066abc\u2069",
    "hidden": "a\u200bb\u2060\ufeffc\U000e0041",
    "lines": "one\u2028two\x85three\x0bfour\x0cfive",
    "deleted": "a\x7fb",
}


def is_harmless(text):
    return not [c for c in text if is_obeyed(c) and c not in "\n\t"]


@pytest.fixture(params=ATTACKS)
def attack(request):
    return ATTACKS[request.param]


@pytest.fixture
def out():
    return io.StringIO()


@pytest.fixture
def console(out):
    return SafeConsole(file=out, width=200, highlight=False, soft_wrap=True, _environ={})


def test_functions(attack):
    assert is_harmless(printable(attack)) and is_harmless(shown(f"{attack}\n\t{attack}"))
    line = json.dumps({"text": attack}, ensure_ascii=False)
    assert is_harmless(shown_json(line)) and json.loads(shown_json(line)) == {"text": attack}


def test_what_is_harmless_stays():
    text = "Ünïcode 漢字 👩‍👩‍👧 e\u0301 \u0646\u0645\u06cc\u200c\n\tline\n"
    assert shown(text) == shown_json(text) == text and shown("a\r\nb") == "a\nb"


def test_messages(attack, capsys):
    echo(f"a: {attack}")
    echo(f"b: {attack}", err=True)
    captured = capsys.readouterr()
    assert is_harmless(captured.out) and is_harmless(captured.err) and "a: " in captured.out and "b: " in captured.err


def test_results_go_into_a_pipe_as_they_are_and_to_a_terminal_escaped(attack, capsys, monkeypatch):
    echo_result(attack)
    assert capsys.readouterr().out == attack + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    echo_result(attack)
    echo_result(json.dumps([attack], ensure_ascii=False), is_json=True)
    text, line = capsys.readouterr().out.removesuffix("\n").rsplit("\n", 1)
    assert text == shown(attack) and is_harmless(line) and json.loads(line) == [attack]


def test_whatever_a_console_prints(attack, console, out):
    say(console, [attack, f"[bold]{attack}"])
    console.print(attack, markup=False)
    console.print(Text(attack), attack.join("ab"))
    show_answers(console, [(attack, attack, attack, attack)])
    console.print(Table((attack, "n"), [(attack, attack)], title=attack).rich())
    with console.status(Text(attack)), Progress(TextColumn("{task.description}"), BarColumn(), console=console) as bar:
        bar.add_task(Text(attack).plain)
    assert is_harmless(out.getvalue())
    screen = Screen(SafeConsole(file=out, width=200, force_terminal=True, color_system=None, _environ={}))
    screen.say(attack)
    screen.write(attack)
    assert is_harmless(out.getvalue())


def test_a_line_that_is_written_over_still_is(console, out):
    console.print("preparing data: 3 rows", end="\r")
    assert out.getvalue() == "preparing data: 3 rows\r"


def test_tables(attack):
    table = Table((attack, "n"), [(attack, "1"), ("b", attack)])
    assert is_harmless(table.plain()) and is_harmless(table.markdown())
    assert table.plain().count("\n") == 2


def test_errors_of_a_recipe(attack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = {"model": {"name_or_path": attack}, "data": {"path": f"{attack}.jsonl", attack: 1}, attack: {}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    for command in (
        ["validate", "r.yaml"],
        ["train", "r.yaml", "--output-dir", "o"],
        ["show", attack],
        ["diff", "r.yaml", "demo"],
    ):
        code, stdout, stderr = invoke(*command)
        assert code == 2 and is_harmless(stdout) and is_harmless(stderr)


def test_errors_about_a_name(attack):
    code, stdout, stderr = invoke("check", f"ann/{attack}")
    assert code == 2 and is_harmless(stdout) and is_harmless(stderr)


# ---- Markdown ----

EVIL = {
    "script": "<script>alert(1)</script>",
    "picture": "<img src=x onerror=alert(1)>",
    "picture of Markdown": "![x](http://evil.example/pixel.png)",
    "link": "[click](javascript:alert(1))",
    "link in brackets": "<javascript:alert(1)>",
    "reference": "[a]\n\n[a]: javascript:alert(1)",
    "end of a block": "</pre>\n<script>alert(1)</script>",
    "fence": "```\n<script>alert(1)</script>\n~~~\n[a](javascript:b)",
    "comment": "<!-- \n<b>\n-->",
    "indented": "x\n\n    <b>code</b>\n\n<b>y</b>",
    "bar": "a | b\n--- | ---\n<b>c</b> | d",
    "backticks": "`<b>` ``<i>``",
}


@pytest.mark.parametrize("evil", EVIL.values(), ids=EVIL)
def test_markdown_of_others_is_text(evil):
    """Rendered by a program that lets HTML through."""
    parts = (markdown.inline(evil), f"- {markdown.cell(evil)}", f"Data: {markdown.value(evil)}", markdown.block(evil))
    table = Table((evil, "n"), [(evil, evil)]).markdown()
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render("\n\n".join([*parts, table]))
    ours = ("p", "ul", "li", "pre", "table", "thead", "tbody", "tr", "th", "td", "code", "em")
    for name in ours:
        page = page.replace(f"<{name}>", "").replace(f"</{name}>", "").replace(f'<{name} style="text-align:right">', "")
    assert (
        "<" not in page
        and "<script>" not in "".join(parts) + table
        and "href" not in page.replace(evil, "")
        and page.count("\ufffd") == 0
    )
