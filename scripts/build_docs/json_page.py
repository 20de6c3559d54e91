"""``json_output.md``: what every verb prints under --json, from the types in `qlora_neft.cli.json_output`."""

from __future__ import annotations

import re
from typing import Any

from qlora_neft.cli.json_output import OUTPUTS, output_schema

HEAD = """# What verbs print as JSON

With `--json` stdout holds one document; `generate` prints one a line. `qlora-neft schema --of "eval loss"` prints the
JSON Schema of one, against which the tests hold what the verbs really print. A later version may add keys. How to drive
the program is in [from a script or an agent](scripting.md).
"""
SHAPES = {
    "one": "An object",
    "list": "A list of objects",
    "by name": "An object whose values are such",
    "one or by name": "An object, or several by name",
    "lines": "A line of JSON each",
}


def text() -> str:
    """The page: a section for each verb, with the keys at the top of its document."""
    return "\n".join([HEAD, *(_section(verb) for verb in OUTPUTS)])


def _section(verb: str) -> str:
    place, kind, about = OUTPUTS[verb]
    title = verb[0].upper() + verb[1:] if verb == "an error" else f"`{verb}`"
    head = f"## {title}\n\n{SHAPES[kind]}: {about}."
    if not place:
        return head + "\n"
    document = output_schema(verb)["$defs"]["Document"]
    described = _attributes(document.get("description", ""))
    required = set(document.get("required", ()))
    rows = [_row(key, part, described, required) for key, part in document["properties"].items()]
    said = re.sub(r"`+([^`]+)`+", r"`\1`", " ".join(document.get("description", "").partition("\n\n")[0].split()))
    return "\n".join([f"{head} {said}".rstrip(), "", "| key | type | meaning |", "|---|---|---|", *rows, ""])


def _row(key: str, part: dict[str, Any], described: dict[str, str], required: set[str]) -> str:
    sometimes = ", not always" if required and key not in required else ""
    return f"| `{key}` | {_type(part)}{sometimes} | {described.get(key) or part.get('description', '')} |"


def _type(part: dict[str, Any]) -> str:
    if "$ref" in part:
        return "object"
    if "const" in part or "enum" in part:
        return " or ".join(f"`{value}`" for value in part.get("enum", [part.get("const")]))
    if "anyOf" in part:
        return " or ".join(dict.fromkeys(_type(one) for one in part["anyOf"]))
    kind = part.get("type", "any")
    if kind == "array" and "items" in part:
        return f"list of {_type(part['items'])}"
    return " or ".join(kind) if isinstance(kind, list) else kind


def _attributes(docstring: str) -> dict[str, str]:
    """Meanings by key, from a docstring's section Attributes."""
    section = re.sub(r"\s*\n\s{8,}", " ", docstring.partition("Attributes:\n")[2])
    found = re.findall(r"(?m)^\s*((?:\w+, )*\w+): (.+)$", section)
    plain: dict[str, str] = {}
    for names, about in found:
        said = re.sub(r"`+([^`]+)`+", r"`\1`", about).replace("|", "\\|")
        plain |= dict.fromkeys(names.split(", "), said)
    return plain
