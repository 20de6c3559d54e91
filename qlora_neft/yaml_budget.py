"""How large YAML of others may be: its text, its depth, and what its aliases expand to. Checked before it is built.

A few lines of aliases of aliases stand for billions of values ("billion laughs"), and deep nesting ends PyYAML with a
RecursionError. Neither is in any recipe.
"""

from __future__ import annotations

import yaml

MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 50
MAX_ALIASES = 1_000
MAX_NODES = 20_000  # counted as often as aliases repeat them

_OPENING = (yaml.MappingStartEvent, yaml.SequenceStartEvent)
_CLOSING = (yaml.MappingEndEvent, yaml.SequenceEndEvent)


def check_budget(text: str, nodes: int = MAX_NODES) -> None:
    """Refuse YAML that is larger, deeper or expands to more than any recipe.

    Args:
        text: YAML.
        nodes: Values it may stand for.

    Raises:
        yaml.YAMLError: If it is, or is no YAML.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"it has {len(text):,} characters, at most {MAX_CHARACTERS:,} are read")
    # Sizes of what is open, innermost last, and of what has a name: an alias counts as all it stands for.
    sizes, anchors, named = [0], list[str | None](), dict[str, int]()
    aliases = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, _OPENING):
            sizes.append(1)
            anchors.append(event.anchor)
            if len(anchors) > MAX_DEPTH:
                raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} deep")
        elif isinstance(event, _CLOSING):
            size, anchor = sizes.pop(), anchors.pop()
            sizes[-1] += size
            if anchor is not None:
                named[anchor] = size
        elif isinstance(event, yaml.AliasEvent):
            aliases += 1
            if event.anchor in anchors:
                raise yaml.YAMLError(f"{event.anchor!r} contains itself")
            sizes[-1] += named.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            sizes[-1] += 1
            if event.anchor is not None:
                named[event.anchor] = 1
        if aliases > MAX_ALIASES or sizes[-1] > nodes:
            what = f"{MAX_ALIASES:,} aliases" if aliases > MAX_ALIASES else f"{nodes:,} values"
            raise yaml.YAMLError(f"it stands for more than {what}")
