"""The section ``data``: which rows are examples, and how a row becomes a sequence."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from ..paths import DATA_SUFFIXES, JINJA_SUFFIXES, kind_of
from .section import Positive, Section, Text, broken_rule
from .settings import prompt_loss_weight

# Alpaca's prompt with the three endings that published code gives it, see `data.templates.ALPACA_ENDINGS`.
ALPACA_TEMPLATES = ("alpaca", "alpaca-newline", "alpaca-space")
TEMPLATES = ("auto", *ALPACA_TEMPLATES, "vicuna", "chat")
# What chat templates are given in any case.
TAKEN_BY_TEMPLATES = frozenset({"messages", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize"})


def template_name(value: str) -> str:
    """Accept the name of a prompt template: one of ours, or a Jinja file, known by its suffix."""
    if value in TEMPLATES or value.endswith(JINJA_SUFFIXES):
        return value
    close = difflib.get_close_matches(value, TEMPLATES, n=1)
    meant = f" Did you mean {close[0]}?" if close else ""
    raise broken_rule(f"one of {', '.join(TEMPLATES)}, or a .jinja file, got the text {value!r}.{meant}")


def only_on_the_hub(value: str | None, info: ValidationInfo, key: str) -> str | None:
    """Accept a key of data from the Hub: local files have no revision, configuration or list of files.

    Args:
        value: The key's value, None if it is not given.
        info: Which key, and the values before it.
        key: What messages call ``path``.
    """
    path = info.data.get("path")
    if value is None or path is None or is_data_on_the_hub(path):
        return value
    # A folder cloned from the Hub has the configurations that its README declares.
    if info.field_name == "name" and os.path.isfile(os.path.join(os.path.expanduser(path), "README.md")):
        return value
    raise broken_rule(f"has an effect only on data from the Hub, and {key} is {path!r}. Remove it.", involves=("path",))


def is_data_on_the_hub(path: str) -> bool:
    """Tell whether a path of data names a dataset on the Hub."""
    return kind_of(path, suffixes=DATA_SUFFIXES) == "hub"


# What a column can be, and who can speak: the names that data.columns and data.roles map the user's to.
COLUMNS = (
    *("instruction", "input", "output", "system", "history", "reasoning"),
    *("prompt", "completion", "messages", "conversations", "tools", "text"),
)
ROLES = ("system", "developer", "user", "assistant", "tool", "function_call")


def known_columns(value: dict[str, str | None]) -> dict[str, str | None]:
    """Accept names of the user's columns, each with what it is; null for a column that is not to be read."""
    _known(value, COLUMNS, "a column is")
    stated = [ours for ours in value.values() if ours is not None]
    twice = next((ours for ours in stated if stated.count(ours) > 1), None)
    if twice is not None:
        raise broken_rule(f"two columns are {twice}. Name one.")
    return value


def known_roles(value: dict[str, str]) -> dict[str, str]:
    """Accept names of the user's speakers, each with who it is."""
    _known(value, ROLES, "a speaker is")
    return value


def _known(value: Mapping[str, str | None], names: tuple[str, ...], what: str) -> None:
    for theirs, ours in value.items():
        if ours is None or ours in names:
            continue
        # Written the other way round: ours first, as other trainers have it.
        meant = f" Did you mean {ours}: {theirs}?" if theirs in names else ""
        close = difflib.get_close_matches(ours, names, n=1)
        meant = meant or (f" Did you mean {close[0]}?" if close else "")
        raise broken_rule(f"{what} one of {', '.join(names)}, got {theirs}: {ours}.{meant}")


Columns = Annotated[dict[Text, Text | None], AfterValidator(known_columns)]
Roles = Annotated[dict[Text, Text], AfterValidator(known_roles)]
Format = Literal["auto", "alpaca", "prompt-completion", "messages", "sharegpt", "text"]
Template = Annotated[str, AfterValidator(template_name)]
Share = Annotated[float, Field(ge=0, le=1)]


class MixedSource(Section):
    """One more source of examples, mixed with the others."""

    path: Text
    split: Text = "train"
    revision: Text | None = None
    data_files: Text | None = None
    name: Text | None = None
    format: Format = "auto"
    columns: Columns = Field({})
    roles: Roles = Field({})
    system_prompt: Text | None = None
    prompt_template: Template = "auto"
    weight: Positive = 1.0

    @field_validator("revision", "data_files", "name")
    @classmethod
    def _only_on_the_hub(cls, value: str | None, info: ValidationInfo) -> str | None:
        return only_on_the_hub(value, info, "its path")


class Data(Section):
    """The examples. Local paths are relative to the current directory."""

    # Which rows.
    path: Text = Field(
        description="file of rows (.jsonl, .json, .csv, .parquet, .arrow), folder, glob, Hub id, or bundled:NAME"
    )
    revision: Text | None = Field(None, description="branch, tag or commit, for path on the Hub")
    split: Text = Field("train", description="split or slice in the syntax of datasets, such as train[:128]")
    data_files: Text | None = Field(None, description="files to use of a Hub dataset, a name or a glob")
    name: Text | None = Field(None, description="configuration of a Hub dataset, or of a folder cloned from it")
    weight: Positive = Field(
        1.0, description="how often each example is used per epoch; 0.5: half of them, chosen by hash"
    )
    mixture: list[MixedSource] = Field(
        [], description="more sources, each with keys such as path, split, format, weight"
    )
    # Which rows are held out.
    eval_path: Text | None = Field(None, description="held-out examples, named like path")
    eval_split: Text | None = Field(None, description="held-out split, of eval_path (default train) or of path")
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="share of the rows to hold out, the same ones on every machine"
    )
    # How a row becomes a sequence.
    format: Format = Field("auto", description="how columns are read; auto: by their names")
    columns: Columns = Field(
        {}, description="what your columns are, such as {question: instruction, reply.text: output}; null: not read"
    )
    roles: Roles = Field({}, description="who your speakers are, such as {customer: user, bot: assistant}")
    system_prompt: Text | None = Field(None, description="system message of the rows that have none of their own")
    prompt_template: Template = Field(
        "auto",
        description="alpaca (also -newline and -space), vicuna, chat (the tokenizer's own), or a .jinja file; "
        "auto: by format",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="values that a chat template reads, such as {enable_thinking: false}; in generation too"
    )
    max_length: Annotated[int, Field(ge=8)] = Field(description="maximum number of tokens per sequence")
    max_prompt_length: Annotated[int, Field(ge=1)] | None = Field(
        None, description="maximum number of tokens before the first response, cut at their end; null: max_length's"
    )
    max_response_length: Annotated[int, Field(ge=2)] | None = Field(
        None, description="maximum number of tokens of each response, its end token included; null: max_length's"
    )
    split_conversations: bool = Field(True, description="split conversations longer than max_length between turns")
    split_text: bool = Field(False, description="split plain text longer than max_length into chunks, none of it lost")
    keep_end_token: bool = Field(True, description="end a response that is cut at max_length with the end token")
    # Where the loss is taken, and how much it counts there.
    train_on: Literal["responses", "last-response", "all"] = Field(
        "responses", description="tokens that are trained: every response, the last one of each row, or prompts too"
    )
    prompt_loss_weight: Share | None = Field(
        None, description="weight of a token outside responses, where one of a response has 1; null: 0, or 1 for all"
    )
    train_on_prompt: bool | None = Field(
        None, description="older spelling of prompt_loss_weight: true is 1, false is 0"
    )
    # How many rows the gate lets through in spite of a fault.
    max_truncated_fraction: Share = Field(0.5, description="share of rows whose response may be cut")
    max_dropped_fraction: Share = Field(
        0.01, description="share of rows that may be dropped: empty, unusable, or too long"
    )
    max_duplicate_fraction: Share = Field(0.5, description="share of rows that may duplicate an earlier one")

    @field_validator("revision", "data_files", "name")
    @classmethod
    def _only_on_the_hub(cls, value: str | None, info: ValidationInfo) -> str | None:
        return only_on_the_hub(value, info, "data.path")

    @field_validator("eval_split")
    @classmethod
    def _held_out_is_not_trained_on(cls, value: str | None, info: ValidationInfo) -> str | None:
        path, eval_path, split = (info.data.get(key) for key in ("path", "eval_path", "split"))
        named = value is not None or eval_path is not None
        if path is not None and named and (eval_path or path, value or "train") == (path, split):
            raise broken_rule(
                f"the held-out rows would be the training rows ({path}, {split}). "
                "Give another split or eval_path, or eval_fraction to hold out a share.",
                involves=("eval_path", "path", "split"),
            )
        return value

    @field_validator("eval_fraction")
    @classmethod
    def _one_source_of_held_out_rows(cls, value: float | None, info: ValidationInfo) -> float | None:
        other = [key for key in ("eval_path", "eval_split") if info.data.get(key) is not None]
        if value is not None and other:
            raise broken_rule(
                f"cannot be combined with data.{' and data.'.join(other)}, got {value:g}. Keep one.",
                involves=tuple(other),
            )
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _only_what_a_template_may_be_given(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(TAKEN_BY_TEMPLATES & value.keys())
        if taken:
            raise broken_rule(
                f"{', '.join(taken)} is filled in from the rows or the tokenizer, got {value!r}. Remove it."
            )
        return value

    @field_validator("max_prompt_length", "max_response_length")
    @classmethod
    def _fits_into_the_sequence(cls, value: int | None, info: ValidationInfo) -> int | None:
        longest, prompt = info.data.get("max_length"), info.data.get("max_prompt_length") or 0
        if value is not None and longest is not None and value + prompt > longest:
            beside = f" beside data.max_prompt_length={prompt}" if prompt else ""
            raise broken_rule(
                f"must fit into data.max_length={longest}{beside}, got {value}. Lower it, or raise data.max_length.",
                involves=("max_length", "max_prompt_length"),
            )
        return value

    @field_validator("split_text")
    @classmethod
    def _text_is_split_or_cut(cls, value: bool, info: ValidationInfo) -> bool:
        limit = info.data.get("max_response_length")
        if value and limit is not None:
            raise broken_rule(
                f"cannot be combined with data.max_response_length={limit}, which cuts text, got true. Keep one.",
                involves=("max_response_length",),
            )
        return value

    @field_validator("prompt_loss_weight")
    @classmethod
    def _all_means_all(cls, value: float | None, info: ValidationInfo) -> float | None:
        if info.data.get("train_on") == "all" and value not in (None, 1):
            raise broken_rule(
                f"contradicts train_on: all, which trains prompts with weight 1, got {value:g}. Remove one of them.",
                involves=("train_on",),
            )
        return value

    @field_validator("train_on_prompt")
    @classmethod
    def _two_spellings_agree(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        names = ("train_on", "prompt_loss_weight")
        weight = prompt_loss_weight({key: info.data.get(key) for key in names})
        is_stated = info.data.get("prompt_loss_weight") is not None or info.data.get("train_on") == "all"
        if value is not None and is_stated and weight != value:
            stated = "train_on: all" if info.data.get("train_on") == "all" else f"prompt_loss_weight: {weight:g}"
            raise broken_rule(
                f"is an older spelling of prompt_loss_weight: {int(value)}, and contradicts {stated}, got "
                f"{str(value).lower()}. Remove it.",
                involves=names,
            )
        return value

    @property
    def prompt_weight(self) -> float:
        """Weight of a token outside responses in the loss, in [0, 1], however the recipe spells it."""
        names = ("train_on", "prompt_loss_weight", "train_on_prompt")
        return prompt_loss_weight({name: getattr(self, name) for name in names})

    @property
    def has_eval_rows(self) -> bool:
        """Whether the recipe names held-out examples, in any of the three ways."""
        return (self.eval_path, self.eval_split, self.eval_fraction) != (None, None, None)

    @property
    def paths(self) -> list[str]:
        """Every path that rows are read from, held-out ones included."""
        return [self.path, *(source.path for source in self.mixture), *([self.eval_path] if self.eval_path else [])]
