"""What the verbs really print under --json, held against the schemas that are published of it."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import jsonschema

from qlora_neft.cli.json_output import OUTPUTS, output_schema


def check_json(arguments: Sequence[str], code: int, stdout: str) -> None:
    """Fail unless what a verb printed under ``--json`` is what its schema says, without a key more.

    Args:
        arguments: Words behind ``qlora-neft``.
        code: The exit code.
        stdout: All that was printed there.
    """
    verb = verb_of(arguments)
    if "--json" not in arguments or verb is None or not stdout.strip():
        return
    documents = (
        [json.loads(stdout)] if OUTPUTS[verb][1] != "lines" else [json.loads(line) for line in stdout.splitlines()]
    )
    for document in documents:
        if isinstance(document, dict) and set(document) == {"error"}:
            assert code != 0
            fits(document, "an error")
        elif code == 0 or verb not in ("preview",):  # rows that cannot be read have no report
            fits(document, verb)


def fits(document: Any, verb: str) -> None:
    """Fail with a line for each place where a document is not as the schema says."""
    wrong = [f"{error.json_path}: {error.message[:200]}" for error in validator(verb).iter_errors(document)]
    assert not wrong, f"{verb} --json: {wrong}"


@functools.cache
def validator(verb: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(closed(verb))


def verb_of(arguments: Sequence[str]) -> str | None:
    """The key of `OUTPUTS` that a command line is of."""
    words = [word for word in arguments[:3] if not word.startswith("-")]
    names = [" ".join(words[:count]) for count in (3, 2, 1)]
    verb = next((name for name in names if name in OUTPUTS), None)
    for flag in ("--keys", "--dry-run"):
        verb = f"{verb} {flag}" if flag in arguments and f"{verb} {flag}" in OUTPUTS else verb
    return verb


def closed(verb: str) -> dict[str, Any]:
    """A verb's schema, under which a key that it does not name is wrong."""
    schema = output_schema(verb)

    def close(part: Any) -> None:
        if isinstance(part, dict):
            if "properties" in part:
                part.setdefault("additionalProperties", False)
            for inner in part.values():
                close(inner)
        elif isinstance(part, list):
            for inner in part:
                close(inner)

    close(schema)
    return schema
