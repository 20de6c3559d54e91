"""A recipe's JSON Schema, by which editors complete keys, show what they mean and underline what is wrong."""

from __future__ import annotations

from typing import Any

from .data import TEMPLATES
from .keys import key_table
from .schema import Recipe

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a recipe as plain values.

    It states types, bounds, defaults and descriptions. Rules between keys are not in it, except for what may be left
    to an adapter: `qlora-neft validate` checks them all.
    """
    schema = Recipe.model_json_schema()
    schema["description"] = "A recipe of qlora-neft: what is learned, and how it is run."
    for section in (schema, *schema["$defs"].values()):
        for key in section["properties"].values():
            key.pop("title", None)  # pydantic's repeats the name of the key
    _say_types_and_defaults(schema)
    # Any file may be named as well, so these are no enum.
    schema["$defs"]["Data"]["properties"]["prompt_template"]["examples"] = list(TEMPLATES)
    # With model.adapter, base and LoRA settings are those of the adapter (`Recipe._taken_from_the_adapter`).
    from_adapter = {"properties": {"model": {"required": ["adapter"], "properties": {"adapter": {"type": "string"}}}}}
    schema["$defs"]["Model"]["required"].remove("name_or_path")
    schema["required"].remove("lora")
    itself = {"required": ["lora"], "properties": {"model": {"required": ["name_or_path"]}}}
    return {"$schema": DRAFT, **schema, "anyOf": [itself, from_adapter]}


def _say_types_and_defaults(schema: dict[str, Any]) -> None:
    """Give each key what VS Code and others show when one points at it; a plain description leaves its default out."""
    for key in key_table():
        section, _, name = key.name.partition(".")
        part = schema["properties"][section]
        reference = next(found["$ref"] for found in (part, *part.get("anyOf", ())) if "$ref" in found)
        described = schema["$defs"][reference.rpartition("/")[2]]["properties"][name]
        default = key.default if key.default == "required" else f"default: {key.default}"
        described["markdownDescription"] = f"{key.about}\n\n{key.type}; {default}"
