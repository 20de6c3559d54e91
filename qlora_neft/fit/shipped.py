"""The shipped recipes at a glance: from a paper or for a current model, and its smallest card. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..paths import kind_of, resolve_bundled
from ..recipe import Recipe, list_recipes, load_recipe
from .cards import GIB, Card
from .choose import choose
from .config import read_config
from .geometry import geometry_of, shipped_config

CARDS = (8, 12, 16, 24, 48)  # GiB
Group = Literal["demo", "papers", "current"]
TITLES: dict[Group, str] = {
    "demo": "to try, without a GPU or the Hub",
    "papers": "from the papers",
    "current": "current models",
}
FROM_PAPERS = ("llama-", "llama2-")  # how their names begin: LLaMA-1 and Llama 2 are the papers' bases


@dataclass(frozen=True)
class Shipped:
    """A shipped recipe.

    Attributes:
        name: Its name.
        recipe: What it says.
        group: Which part of the list it stands in.
        card: Memory in GiB of the smallest of `CARDS` that it fits on, by the planner; None if it fits on none, or its
            base is not known offline.
        is_helped: Whether it fits there only with optimizer states or activations kept in host memory.
    """

    name: str
    recipe: Recipe
    group: Group
    card: int | None
    is_helped: bool

    @property
    def card_text(self) -> str:
        """Return the card for a table: ``8 GB``, or ``8 GB*`` if host memory must help."""
        return "-" if self.card is None else f"{self.card} GB" + "*" * self.is_helped


def shipped_recipes() -> list[Shipped]:
    """Return all shipped recipes, group by group, by name in each."""
    found = [_shipped(name) for name in list_recipes()]
    return sorted(found, key=lambda one: list(TITLES).index(one.group))


def _shipped(name: str) -> Shipped:
    recipe = load_recipe(name)
    group: Group = "demo" if name == "demo" else "papers" if name.startswith(FROM_PAPERS) else "current"
    return Shipped(name, recipe, group, *smallest_card(recipe))


def smallest_card(recipe: Recipe) -> tuple[int | None, bool]:
    """Return ``card`` and ``is_helped`` of a `Shipped`. The Hub is not asked."""
    base = recipe.model.name_or_path
    if kind_of(base) != "bundled" and shipped_config(base) is None:
        return None, False
    geometry = geometry_of(read_config(resolve_bundled(base))[0])
    for gib in CARDS:
        choice, fits = choose(recipe, geometry, Card(f"{gib} GB", gib * GIB))
        if fits:
            return gib, choice.paged_out > 0 or choice.step.offloading
    return None, False
