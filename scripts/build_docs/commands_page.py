"""The reference of the command line, from the parser itself; and the table of recipe keys, from the schema."""

from __future__ import annotations

import html
from typing import Any

import typer

from qlora_neft.cli import app
from qlora_neft.recipe.keys import key_table

INTRO = """# Commands and keys

Made from the command line's own parser and the recipe's own schema (`python -m scripts.build_docs`).

```
qlora-neft --help
qlora-neft train --help
qlora-neft show --keys
```

Exit codes: 0 done, 1 the run failed, 2 the input is wrong, 128 + signal interrupted. `--json` prints for programs.
`qlora-neft --install-completion` completes recipes and keys in your shell.
"""


def text() -> str:
    """Return the page."""
    root: Any = typer.main.get_command(app)
    verbs = "".join(_verb(f"qlora-neft {name}", verb) for name, verb in _leaves(root))
    keys = "".join(
        f"| `{key.name}` | {_cell(key.type)} | `{key.default}` | {_cell(key.about)} |\n" for key in key_table()
    )
    return f"{INTRO}\n## Verbs\n{verbs}\n## Recipe keys\n\n| key | may be | default | |\n|---|---|---|---|\n{keys}"


def _leaves(group: Any, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, verb in group.commands.items():
        if verb.hidden:  # an old name
            continue
        nested = hasattr(verb, "commands")
        found += _leaves(verb, f"{prefix}{name} ") if nested else [(prefix + name, verb)]
    return found


def _verb(name: str, verb: Any) -> str:
    with_arguments = [param for param in verb.params if param.param_type_name == "argument"]
    usage = " ".join([name, *(_usage(param) for param in with_arguments), "[OPTIONS]"])
    rows = "".join(_row(param) for param in verb.params if getattr(param, "help", None) and not _hidden(param))
    about = " ".join((verb.help or "").split())
    table = f"\n| | |\n|---|---|\n{rows}" if rows else ""
    return f"\n### {name}\n\n    {usage}\n\n{about}\n{table}"


def _usage(param: Any) -> str:
    many = "..." if param.nargs == -1 else ""
    return f"{_name(param)}{many}" if param.required else f"[{_name(param)}{many}]"


def _row(param: Any) -> str:
    spelled = _name(param)
    if param.param_type_name == "option":
        value = "" if param.is_flag else f" {param.metavar or param.name.rpartition('_')[2].upper()}"
        spelled = ", ".join(param.opts) + value
    default = param.default
    shown = "" if default in (None, False, (), []) or callable(default) or param.required else f" Default: `{default}`."
    return f"| {_code(spelled)} | {_cell(param.help)}{shown} |\n"


def _name(param: Any) -> str:
    return param.metavar or param.name.upper()


def _hidden(param: Any) -> bool:
    return bool(getattr(param, "hidden", False)) or param.name == "help"


def _code(words: str) -> str:
    """Return words as code in a cell. In HTML: between backquotes Python-Markdown shows the backslash of a `\\|`."""
    if "|" not in words:
        return f"`{words}`"
    return f"<code>{html.escape(words, quote=False).replace('|', '&#124;')}</code>"


def _cell(words: str) -> str:
    return words.replace("|", "\\|")
