"""Names that a package gives out and imports when they are first used (PEP 562)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """What a package assigns to ``__getattr__``, so that its other modules serve without what these need.

    Args:
        package: Its ``__name__``.
        homes: The module inside it that has each name.

    Returns:
        A function from a name to what it stands for; AttributeError, as of any module, for a name that has no home.
    """

    def attribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return attribute
