"""What a tracker is told of a run: the recipe as it would be published, how it is carried out, numbers.

transformers' callbacks send every training argument and the model's configuration, which hold paths of this machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from ...export.hub.public import AUTHORS_KEYS, PublicBase, public_path, public_recipe
from ...export.leaks import is_private
from ...files import finite
from ...recipe.settings import flat
from ...run_folder.metrics import versions
from ..build import Run

WITHHELD = "(withheld)"
# Of the plan, what the recipe does not say; notes are sentences, and the estimate describes this machine.
NOT_OF_PLAN = ("notes", "memory_estimate")


def config_of(run: Run) -> dict[str, Any]:
    """Return what a tracker shows as the settings of a run, by dotted name.

    It is the recipe as `export` would publish it, local paths reduced to their last part; the plan; versions of the
    packages. Nothing is read from the environment. A text that holds a credential or a path of this machine even so is
    withheld.
    """
    recipe = run.recipe
    base = PublicBase(public_path(recipe.model.name_or_path), getattr(run.config, "_commit_hash", None))
    public = public_recipe(recipe, base).to_dict()
    for key in AUTHORS_KEYS:
        public["machine"].pop(key, None)
    plan = {key: value for key, value in asdict(run.plan).items() if key not in NOT_OF_PLAN}
    found = flat(public) | flat({"plan": plan, "versions": versions()})
    return {key: WITHHELD if is_private(json.dumps(value)) else value for key, value in found.items()}


def numbers_of(logs: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a log entry, all that a tracker draws; one that is not finite is none."""
    return {key: value for key, value in finite(logs).items() if isinstance(value, int | float)}


@dataclass
class ToldArguments:
    """Stands in for the training arguments where a callback of transformers would send them all.

    Attributes:
        run_name: The run's name.
        config: What is sent instead, see `config_of`.
        output_dir: A name, compared with the run's by transformers and not sent.
    """

    run_name: str
    config: dict[str, Any] = field(default_factory=dict)
    output_dir: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return what is sent as the training arguments."""
        return dict(self.config)

    def to_json_string(self) -> str:
        """Return it as JSON text, which TensorBoard shows as Markdown: a line of a code block each."""
        return "\n".join(f"    {key}: {json.dumps(value)}" for key, value in self.config.items())


class OnlyWeights(nn.Module):
    """A model without its configuration, which callbacks of transformers send; it holds the base's path.

    Args:
        model: The one that is trained, for ``WANDB_WATCH``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
