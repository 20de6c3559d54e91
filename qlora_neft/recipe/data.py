"""What a recipe may say about its data: sources, format, template, length, and what may be wrong with it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from ..files.bundled import PREFIX
from ..files.suffixes import DATA_SUFFIXES
from .value_types import Positive, Section, Text, broken_rule, template_name

Format = Literal["auto", "alpaca", "prompt-completion", "messages", "sharegpt", "text"]
Template = Annotated[str, AfterValidator(template_name)]
Share = Annotated[float, Field(ge=0, le=1)]


class MixedSource(Section):
    """A further source of examples, mixed with the others."""

    path: Text
    split: Text = "train"
    revision: Text | None = None
    data_files: Text | None = None
    name: Text | None = None
    format: Format = "auto"
    prompt_template: Template = "auto"
    weight: Positive = 1.0


class Data(Section):
    """The examples. Local paths are relative to the current directory."""

    path: Text = Field(description="local .jsonl .json .csv .parquet, a glob of them, a Hub id, or bundled:NAME")
    revision: Text | None = Field(None, description="Hub branch, tag or commit of path")
    split: Text = Field("train", description="as in datasets, for instance train[:128]")
    data_files: Text | None = Field(None, description="which files of a Hub dataset, a name or a glob")
    name: Text | None = Field(None, description="which configuration of a Hub dataset")
    weight: Positive = Field(1.0, description="uses of each example per epoch; 0.5: every second one, picked by hash")
    mixture: list[MixedSource] = Field([], description="further sources: path, split, revision, format, weight")
    eval_path: Text | None = Field(None, description="held-out examples, like path")
    eval_split: Text | None = Field(None, description="split of eval_path (default train), else of path")
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="share of path to hold out, the same rows on every machine"
    )
    format: Format = Field("auto", description="names of the columns")
    prompt_template: Template = Field(
        "auto", description="alpaca, vicuna, chat (the tokenizer's own), a .jinja file, or auto: by format"
    )
    max_length: Annotated[int, Field(ge=8)] = Field(description="tokens per sequence")
    train_on_prompt: bool = Field(False, description="loss on the prompts as well")
    split_conversations: bool = Field(True, description="split those over max_length on turn boundaries")
    keep_end_token: bool = Field(True, description="a response cut at max_length keeps its end token")
    max_truncated_fraction: Share = Field(0.5, description="share of rows that may lose part of a response")
    max_dropped_fraction: Share = Field(0.01, description="share of rows that may be left out: empty, unfit, no room")
    max_duplicate_fraction: Share = Field(0.5, description="share of rows that may repeat an earlier one")

    @field_validator("revision", "data_files", "name")
    @classmethod
    def _only_on_the_hub(cls, value: str | None, info: ValidationInfo) -> str | None:
        path = info.data.get("path", "")
        if value is not None and (path.startswith((PREFIX, ".", "/", "~")) or path.endswith(DATA_SUFFIXES)):
            raise broken_rule(
                f"has an effect only on data from the Hub, and data.path is {path!r}. Remove it.",
                involves=("path",),
            )
        return value

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

    @property
    def has_eval_rows(self) -> bool:
        """Whether the recipe names held-out examples, in any of the three ways."""
        return (self.eval_path, self.eval_split, self.eval_fraction) != (None, None, None)
