"""The page of the paper's tables and figures: all are there, and their commands are understood."""

import re
import shlex

import typer
from paper_claims import NUMBERS, ROOT

from qlora_neft import list_recipes, load_recipe
from qlora_neft.cli import app
from qlora_neft.cli.compare import PAPER_ALPHAS
from qlora_neft.compare.plan import plan_sweep

PAGE = (ROOT / "docs" / "tables_and_figures.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(command) for command in re.findall(r"`(qlora-neft [^`]+)`", PAGE)]


def section(title):
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def numbers_of(title):
    rows = re.findall(r"^\| (\d+(?:, \d+)*) \|", section(title), re.MULTILINE)
    return sorted(int(number) for row in rows for number in row.split(", "))


def test_every_table_and_figure_has_a_line():
    assert numbers_of("Tables") == list(range(1, 15))
    assert numbers_of("Figures") == list(range(1, 7))


def test_every_line_has_a_command_or_says_what_is_missing():
    lines = [line for title in ("Tables", "Figures") for line in re.findall(r"^\| \d.*$", section(title), re.MULTILINE)]
    assert all(re.search(r"`qlora-neft |\*\*missing\*\*|as Table \d|#the-alphas", line) for line in lines)


def test_commands_are_understood():
    assert len(COMMANDS) > 15
    for _, *words in COMMANDS:
        verb = typer.main.get_command(app)
        while hasattr(verb, "commands"):
            verb = verb.commands[words.pop(0)]
        given = verb.make_context(verb.name, words).params  # unknown options and wrong values raise
        name = given.get("name")
        if name not in list_recipes():
            continue
        words = given.get("overrides") or given.get("words") or ()
        if verb.name == "sweep":
            way = "list" if given["as_list"] else "grid"
            swept = [f"neftune.noise_alpha={PAPER_ALPHAS}"] if given["protocol"] else []
            plan = plan_sweep(name, [*words, *swept], seeds=given["seeds"] or 1, combine=way)
            assert len(plan.runs) > 1
        else:
            load_recipe(name, words)


def test_the_recipes_named_beside_a_command_exist():
    named = set(re.findall(r"`(llama[\w-]*)`", PAGE))
    assert named and named <= set(list_recipes())


def test_the_alphas_are_table_8s():
    names = {
        "facebook/opt-6.7b": "OPT 6.7B",
        "huggyllama/llama-7b": "LLaMA-1 7B",
        "meta-llama/Llama-2-7b-hf": "LLaMA-2 7B",
    }
    head, *rows = [line for line in section("The alphas of Table 8").splitlines() if line.startswith("| ")]
    sets = [cell.strip() for cell in head.split("|")[2:-1]]
    for row in rows:
        model, *cells = [cell.strip(" `") for cell in row.split("|")[1:-1]]
        for data, alpha in zip(sets, cells, strict=True):
            what = f"alpha of Figure 3, {names[model]}, {data}"
            assert [alpha] == [n["value"] for n in NUMBERS if n["what"] == what]
    assert len(rows) == 3
