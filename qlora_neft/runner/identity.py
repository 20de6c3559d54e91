"""What a run trains on, as a resume compares it: base configuration, tokenizer, templates, date and tokens."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..base.config import stored_config
from ..data.identity import special_tokens, templates, tokenizer_parts, versions
from ..data.prepare import PreparedData
from ..data.sources import held_out_sources, training_sources
from ..files import read_json
from ..recipe import Recipe
from ..run_folder.record import RUN_FILE, SUMMARY_FILE, RunFile, RunIdentity
from .build import Run, data_of, model_path

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def base_identity(recipe: Recipe, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> RunIdentity:
    """Return what is known before rows are read. Templates that are not used may be among its own."""
    named = [source.prompt_template for source in training_sources(recipe.data) + held_out_sources(recipe.data)]
    # Whether auto is the tokenizer's own template is known when rows are read.
    own = ["chat"] if tokenizer.chat_template else []
    return RunIdentity(
        templates=templates(tokenizer, [*named, *own]),
        tokenizer=tokenizer_parts(tokenizer),
        special_tokens=special_tokens(tokenizer),
        versions=versions(),
        base_config=stored_config(model_path(recipe), config, revision=recipe.model.revision),
    )


def run_identity(base: RunIdentity, data: PreparedData, recipe: Recipe) -> RunIdentity:
    """Return the whole identity, from what is known of the base and the rows."""
    train, held_out = data.report["train"], data.report["eval"]
    found = {"tokens": train["tokens_sha256"], "rows": train["sha256"], "templates": data.templates, "now": data.now}
    if recipe.train.selects and held_out:  # otherwise they only measure, and may change
        found["held_out"] = held_out["tokens_sha256"]
    return base.model_copy(update=found)


def with_first_ranks_date(run: Run) -> Run:
    """Return a run whose templates write the date that the first rank's do: ranks may begin on two sides of midnight.

    Called by every rank, once there is a process group.
    """
    if run.data.now is None or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return run
    moments: list[Any] = [run.data.now]
    torch.distributed.broadcast_object_list(moments)
    if moments == [run.data.now]:
        return run
    # On one day it is found in the cache.
    data = data_of(run.recipe, run.tokenizer, now=datetime.fromisoformat(moments[0]))
    return replace(run, data=data, identity=run_identity(run.identity, data, run.recipe))


def moment_of(run: RunFile | None) -> datetime | None:
    """Return the moment whose date a run's templates write; None if none of them reads it, or it is not recorded."""
    if run is None or run.identity is None or run.identity.now is None:
        return None
    try:
        return datetime.fromisoformat(run.identity.now)
    except ValueError:
        return None


def moment_in(folder: Path) -> datetime | None:
    """Return the moment that `moment_of` gives for a run's folder, or for that of a checkpoint inside it."""
    for path in (folder / RUN_FILE, folder.parent / RUN_FILE, folder / SUMMARY_FILE):
        try:
            content = read_json(path)
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, dict) and (found := moment_of(RunFile.of(content))) is not None:
            return found
    return None
