"""What ``adapter_config.json`` may hold. Somebody else may have written it, and PEFT acts on it as it loads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
)

from ..errors import UserInputError

MAX_RANK = 65_536
MAX_PATTERN = 2_000  # characters of a regular expression
# Of a regular expression that ends in a moment on any module's name; Unsloth writes some with five.
MAX_REPEATS = 6
MAX_LAYERS = 1_000  # that layer_replication may make
_REPEAT = re.compile(r"[*+]|\{\d*,\d*\}|\{\d+\}")


def _pattern(text: str) -> str:
    if len(text) > MAX_PATTERN:
        raise ValueError(f"is a regular expression of {len(text):,} characters, at most {MAX_PATTERN:,} are read")
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"is not a regular expression ({error})") from error
    if not _ends_soon(text):
        raise ValueError("is a regular expression that may not end: it repeats what repeats, or too often")
    return text


def _ends_soon(text: str) -> bool:
    """Return whether a regular expression repeats little, and nothing that itself repeats or has alternatives."""
    plain = re.sub(r"\\.", "x", text)  # escaped characters are letters here
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "x", plain)  # and so are classes of characters
    plain = re.sub(r"\(\?(?:[:=!>]|<[=!]|P<\w+>|P=\w+|[aiLmsux-]+:?)", "(", plain)
    repeats, groups, closed = 0, [False], False  # whether each open group repeats or has alternatives
    place = 0
    while place < len(plain):
        repeat, character = _REPEAT.match(plain, place), plain[place]
        if repeat is not None:
            repeats += 1
            if closed:  # the group that ended just before is repeated
                return False
            groups[-1] = True
            place = repeat.end()
        elif character == "(":
            groups.append(False)
            place += 1
        elif character == ")":
            has = groups.pop() if len(groups) > 1 else False
            groups[-1] = groups[-1] or has
            closed, place = has, place + 1
            continue
        else:
            groups[-1] = groups[-1] or character == "|"
            place += 1
        closed = False
    return repeats <= MAX_REPEATS


def _replication(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    if any(begin < 0 or end <= begin for begin, end in pairs) or sum(e - b for b, e in pairs) > MAX_LAYERS:
        raise ValueError(f"makes more than {MAX_LAYERS:,} layers, or none")
    return pairs


Pattern = Annotated[StrictStr, AfterValidator(_pattern)]
Name = Annotated[StrictStr, Field(max_length=1_000)]
Names = Annotated[list[Name], Field(max_length=100_000)]
Rank = Annotated[StrictInt, Field(ge=1, le=MAX_RANK)]
Scale = Annotated[StrictInt | StrictFloat, Field(gt=0, le=1e9, allow_inf_nan=False)]


class AdapterConfig(BaseModel):
    """The keys that this package or PEFT acts on; others are left to PEFT."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    peft_type: StrictStr
    task_type: StrictStr | None = None
    base_model_name_or_path: Annotated[StrictStr, Field(max_length=4_096)] | None = None
    revision: Annotated[StrictStr, Field(max_length=1_000)] | None = None
    r: Rank = 8
    lora_alpha: Scale = 8
    lora_dropout: Annotated[StrictInt | StrictFloat, Field(ge=0, le=1)] = 0.0
    target_modules: Pattern | Names | None = None
    exclude_modules: Pattern | Names | None = None
    modules_to_save: Names | None = None
    target_parameters: Names | None = None
    rank_pattern: dict[Pattern, Rank] | None = None
    alpha_pattern: dict[Pattern, Scale] | None = None
    layers_to_transform: StrictInt | list[StrictInt] | None = None
    layers_pattern: Pattern | list[Pattern] | None = None
    layer_replication: Annotated[list[tuple[StrictInt, StrictInt]], AfterValidator(_replication)] | None = None
    bias: StrictStr = "none"
    fan_in_fan_out: StrictBool = False
    use_rslora: StrictBool | None = False
    use_dora: StrictBool | None = False
    lora_bias: StrictBool | None = False
    init_lora_weights: StrictBool | StrictStr | None = True
    trainable_token_indices: list[StrictInt] | dict[str, list[StrictInt]] | None = None


def check_adapter_config(config: Mapping[str, Any], source: str) -> None:
    """Refuse an adapter's configuration that PEFT could not use, or would hang on.

    Args:
        config: Content of ``adapter_config.json``.
        source: What messages call the adapter.

    Raises:
        UserInputError: With every key that is wrong.
    """
    try:
        AdapterConfig.model_validate(config)
    except ValidationError as error:
        # A value of several possible types has an error for each; our own rules say the most, so they come last.
        found = sorted(error.errors(), key=lambda one: one["type"] == "value_error")
        names = dict.fromkeys(str(one["loc"][0]) for one in error.errors() if one["loc"])
        wrong = names | {str(one["loc"][0]): _rule(one["msg"]) for one in found if one["loc"]}
        listed = "; ".join(f"{key} {rule}, got {_cut(config.get(key))}" for key, rule in wrong.items())
        raise UserInputError(
            f"{source}: adapter_config.json is not one that can be used: {listed}. Copy or download the adapter again, "
            "from somebody you trust."
        ) from error


def _rule(message: str) -> str:
    return message.removeprefix("Value error, ").replace("Input should", "should", 1)


def _cut(value: Any) -> str:
    text = repr(value)[:60]
    return text if len(text) < 60 else f"{text}..."
