"""The licenses of what the shipped recipes train from, as their cards on the Hub stated them in 2026; no advice on law.

Of `trl-lib/Capybara`, a copy in another format, it is that of the original, LDJnr/Capybara.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ..files import read_json


class License(NamedTuple):
    """How a base or data set may be had.

    Attributes:
        name: Short name of the license; None if it is not known here.
        gated: Whether the Hub hands it out only after its terms are accepted; None if that is not known.
    """

    name: str | None = None
    gated: bool | None = None

    def __str__(self) -> str:
        return "license not known here" if self.name is None else self.name + ", gated" * (self.gated is True)


def license_of_model(name_or_path: str) -> License:
    """Return the license of a base."""
    return License(*_table()["models"].get(name_or_path, ()))


def license_of_data(path: str) -> License:
    """Return the license of a data set."""
    return License(*_table()["data"].get(path, ()))


@cache
def _table() -> dict[str, dict[str, list[Any]]]:
    return read_json(Path(__file__).with_name("licenses.json"))
