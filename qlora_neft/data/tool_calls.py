"""Functions that an assistant may call, and its calls of them, in the spellings that data sets have for them.

Both become OpenAI's: ``{"type": "function", "function": {"name", "description", "parameters"}}`` and
``{"id", "type": "function", "function": {"name", "arguments"}}``, with arguments as an object.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .examples import BadRow
from .values import from_json, in_order, normal, shown

# The order in which keys are commonly written; others follow, sorted. See `values.normal` for why there is one order.
TOOL_KEYS = ("type", "function")
FUNCTION_KEYS = ("name", "description", "parameters")
SCHEMA_KEYS = ("type", "description", "enum", "items", "properties", "required")
CALL_KEYS = ("id", "type", "function")

Tool = Mapping[str, Any]


def read_tools(value: Any) -> tuple[Tool, ...] | None:
    """Read the descriptions of functions: a list, or JSON text of one; None for none.

    Raises:
        BadRow: If the value is anything else.
    """
    # A column of a table has one type, so data sets store tools of different shapes as JSON text.
    if isinstance(value, str) and value.strip():
        value = from_json(value, "tools")
    if not value or isinstance(value, str):
        return None
    is_one = isinstance(value, Mapping) and not {"name", "function"}.isdisjoint(value)
    described = [value] if is_one else value
    if not isinstance(described, list | tuple):
        raise BadRow(f"tools is {shown(value)}, not a list of function descriptions")
    return tuple(_tool(from_json(tool, "tools") if _is_object(tool) else tool, value) for tool in described)


def read_calls(value: Any, where: str, tools: Sequence[Tool] = ()) -> list[Mapping[str, Any]]:
    """Read an assistant's calls: a list, a single one, or JSON text of either.

    Args:
        value: The calls.
        where: What the message of an error begins with.
        tools: The functions described, which order the arguments.

    Raises:
        BadRow: If a call has no name, or its arguments are not a JSON object.
    """
    if isinstance(value, str):
        value = from_json(value, f"{where}: the call")
    calls = [value] if isinstance(value, Mapping) else value
    if not isinstance(calls, list | tuple):
        raise BadRow(f"{where}: tool_calls is {shown(value)}, not a list of calls")
    return [_call(call, where, tools) for call in calls]


def _tool(tool: Any, value: Any) -> Tool:
    if not isinstance(tool, Mapping):
        raise BadRow(f"tools is {shown(value)}, not a list of function descriptions")
    function = tool.get("function")
    # ShareGPT's data and OpenAI's older form have the function without its wrapping.
    if not isinstance(function, Mapping):
        if not isinstance(tool.get("name"), str):
            return normal(tool)  # a tool of another kind, which only its template understands
        function, tool = {key: tool[key] for key in tool if key != "type"}, {}
    parameters = function.get("parameters")
    if isinstance(parameters, str) and parameters.strip():
        parameters = from_json(parameters, f"the parameters of {function.get('name')}", "are")
    described = {**normal({**function, "parameters": None}), "parameters": _schema(parameters)}
    described = {key: described[key] for key in in_order(described, FUNCTION_KEYS) if described[key] is not None}
    rest = normal({**tool, "type": tool.get("type") or "function", "function": None})
    return {key: {**rest, "function": described}[key] for key in in_order([*rest, "function"], TOOL_KEYS)}


def _schema(value: Any) -> Any:
    """Order a JSON Schema's keys; those of ``properties`` as ``required`` lists them."""
    if not isinstance(value, Mapping):
        return normal(value)
    found = {}
    for key in in_order((key for key, inner in value.items() if inner is not None), SCHEMA_KEYS):
        inner = value[key]
        if key == "properties" and isinstance(inner, Mapping):
            # Parquet adds the properties of other rows' functions, as null.
            names = [name for name, described in inner.items() if described is not None]
            found[key] = {name: _schema(inner[name]) for name in in_order(names, _required(value))}
        else:
            found[key] = _schema(inner) if key == "items" else normal(inner)
    return found


def _call(call: Any, where: str, tools: Sequence[Tool]) -> Mapping[str, Any]:
    if isinstance(call, str):
        call = from_json(call, f"{where}: the call")
    if not isinstance(call, Mapping):
        raise BadRow(f"{where}: the call is {shown(call)}, not an object")
    function = call.get("function") if isinstance(call.get("function"), Mapping) else call
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise BadRow(f"{where}: the call has no name of a function")
    given = function.get("arguments", function.get("parameters"))
    arguments = _arguments(given, f"{where}: the arguments of {name}")
    rest = {} if function is call else normal({**call, "function": None})
    if function is call and call.get("id") is not None:
        rest["id"] = call["id"]
    schema = next((t["function"].get("parameters") for t in tools if _name_of(t) == name), None)
    made = {
        **rest,
        "type": rest.get("type") or "function",
        "function": {"name": name, "arguments": _ordered(arguments, schema)},
    }
    return {key: made[key] for key in in_order(made, CALL_KEYS)}


def _arguments(value: Any, name: str) -> Mapping[str, Any]:
    if isinstance(value, str):  # as OpenAI has them
        value = from_json(value, name, "are") if value.strip() else None
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise BadRow(f"{name} are {shown(value)}, not a JSON object")
    return value


def _ordered(arguments: Mapping[str, Any], schema: Any) -> dict[str, Any]:
    """Order arguments as the function's description lists those it requires, at every depth."""
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    inner = properties if isinstance(properties, Mapping) else {}
    found = {}
    for name, value in normal(arguments, _required(schema)).items():
        nested = isinstance(value, Mapping) and isinstance(inner.get(name), Mapping)
        found[name] = _ordered(value, inner[name]) if nested else value
    return found


def _required(schema: Any) -> list[str]:
    required = schema.get("required") if isinstance(schema, Mapping) else None
    return [name for name in required if isinstance(name, str)] if isinstance(required, list | tuple) else []


def _name_of(tool: Tool) -> str | None:
    function = tool.get("function")
    return function.get("name") if isinstance(function, Mapping) else None


def _is_object(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("{")
