"""What each verb prints under ``--json``, as types: `qlora-neft schema --of VERB` and its page come from here."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from ..errors import UserInputError


class Listed(TypedDict):
    """A recipe that ships.

    Attributes:
        name: What `train`, `show` and the others take.
        group: ``demo``, ``papers`` or ``current``.
        model, data: The base and the rows: Hub ids, or ``bundled:``.
        model_license, data_license: Names of the licenses.
        model_gated, data_gated: Whether the Hub asks for consent first; null if that is not known.
        card_gib: GiB of the smallest card it fits on by the planner, null if none does.
        card_is_helped_by_host_memory: Whether it fits there only with optimizer states on the host.
        noise_alpha: 0 without noise.
        effective_batch_size: Sequences per optimizer step.
        learning_rate: The peak.
    """

    name: str
    group: str
    model: str
    model_license: str
    model_gated: bool | None
    data: str
    data_license: str
    data_gated: bool | None
    card_gib: int | None
    card_is_helped_by_host_memory: bool
    noise_alpha: float
    effective_batch_size: int
    learning_rate: float


class Validated(TypedDict):
    """A recipe that was checked.

    Attributes:
        recipe: As it was named.
        ok: Whether nothing is wrong with it.
        problems: One message each.
    """

    recipe: str
    ok: bool
    problems: list[str]


class Example(TypedDict):
    """A sequence in pieces of text, trained or not; ``weight`` where they count for less than 1."""

    title: str
    pieces: list[dict[str, Any]]


class Checked(TypedDict):
    """An adapter, and whether tools can use it.

    Attributes:
        source: As it was named.
        base: The model it was trained on.
        census: Counted when it was trained: what of the base is in NF4 and has LoRA.
        verdicts: For each tool: consumer, verdict, flag, reasons, remedy, command, notes.
    """

    source: str
    base: str | None
    census: dict[str, Any] | None
    verdicts: list[dict[str, Any]]


class Overfit(TypedDict):
    """How close answers to training prompts are to those trained on.

    Attributes:
        rows: Prompts asked.
        rouge_l, bleu, exact_match: Percent.
        characters, reference_characters: Mean lengths of answers and of what was trained.
        answers: Each prompt, answer and reference, with --answers.
    """

    rows: int
    rouge_l: float
    bleu: float
    exact_match: float
    characters: float
    reference_characters: float
    answers: NotRequired[list[dict[str, Any]]]


class LossSets(TypedDict):
    """Losses without noise.

    Attributes:
        sets: For each run and set of rows: where they are from, tokens, loss; with --samples that of each row.
    """

    sets: list[dict[str, Any]]


class Outputs(TypedDict):
    """Where answers are.

    Attributes:
        outputs: The file, as AlpacaEval reads it.
    """

    outputs: str


class Scored(TypedDict):
    """A win rate, under the names of AlpacaEval's leaderboards.

    Attributes:
        win_rate, standard_error: Percent; a tie counts half.
        n: Preferences counted.
        wins, losses, ties: Preferences above, below and at one half.
        excluded: Pairs without a usable preference, not in ``n``.
        wins_without_draws: Percent of those that are no ties.
        avg_length: Mean characters of the outputs.
        not_annotated: Outputs that no annotation is about.
        length_controlled: Percent, or why there is none.
        made: Who judged against whom, and how the answers were made.
        annotations: The file of the annotations.
    """

    win_rate: float
    standard_error: float | None
    n: int
    wins: int
    losses: int
    ties: int
    excluded: int
    wins_without_draws: float | None
    avg_length: int
    not_annotated: int
    length_controlled: float | str
    made: NotRequired[dict[str, Any]]
    annotations: NotRequired[str]


class Problem(TypedDict):
    """One problem: where, the name the caller wrote, the message, and the sentences after its rule."""

    place: str | None
    key: str | None
    message: str
    remedy: str | None


class Failure(TypedDict):
    """The exit code, the whole message, and each problem in it."""

    code: int
    message: str
    problems: list[Problem]


class Failed(TypedDict):
    """What any verb prints instead if it ends with an error.

    Attributes:
        error: Exit code, message, and a list of problems, each with place, key, message and remedy.
    """

    error: Failure


Kind = Literal["one", "list", "by name", "one or by name", "lines"]

# By the words of the verb: the type, where it is written, and whether the document is one of it, a list, or a mapping.
OUTPUTS: dict[str, tuple[str, Kind, str]] = {
    "ls": (".json_output:Listed", "list", "one entry a recipe"),
    "show": ("..recipe.schema:Recipe", "one", "the complete recipe; with --keys a list of keys"),
    "show --keys": ("..recipe.keys:Key", "list", "one entry a key"),
    "diff": ("", "by name", "by key: the value of A and that of B"),
    "validate": (".json_output:Validated", "list", "one entry a recipe"),
    "train": ("..run_folder.record:RunSummary", "one", "the content of summary.json"),
    "watch": ("..watch.run:Snapshot", "one", "the state of a run; of several, under runs"),
    "preview": ("..data.report:DataReport", "one", "the content of data_report.json, and examples"),
    "fit": ("..fit.report:FitReport", "one", "the planner's answer"),
    "noise": ("..runner.noise_report:NoiseReport", "one", "the noise of each sequence"),
    "generate": ("", "lines", "one object a line: the request, prompt_tokens, and the answer, or one a side"),
    "merge": ("..export.merge.report:MergeReport", "one", "the content of merge_report.json"),
    "check": (".json_output:Checked", "one", "a verdict for each tool"),
    "sweep": ("..compare.results_file:SweepResults", "one", "the content of results.json"),
    "sweep --dry-run": ("..compare.results_file:DryRun", "one", "what would be trained"),
    "tune": ("..compare.results_file:TuneResults", "one", "the content of tune.json"),
    "tune --dry-run": ("..compare.results_file:DryRun", "one", "what would be trained"),
    "doctor": (".doctor:Report", "one", "what this machine can do"),
    "eval text": ("..evaluation.texts:TextMeasures", "one or by name", "measures of texts; of several sources by name"),
    "eval overfit": (".json_output:Overfit", "by name", "by run"),
    "eval loss": (".json_output:LossSets", "one", "losses by run and set"),
    "eval flips": ("..evaluation.embeddings.report:EmbeddingNoiseReport", "one", "what the noise does to tokens"),
    "eval harness": ("..evaluation.harness:HarnessReport", "one", "scores of lm-eval's tasks"),
    "eval alpaca answer": (".json_output:Outputs", "one", "where the answers are"),
    "eval alpaca judge": (".json_output:Scored", "one", "the win rate"),
    "eval alpaca score": (".json_output:Scored", "one", "the win rate"),
    "an error": (".json_output:Failed", "one", "printed by any verb that fails"),
}


def output_schema(verb: str) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of what a verb prints under ``--json``.

    Objects may gain keys in a later version; those that are there keep their meaning.

    Args:
        verb: Its words, such as ``eval loss``: a key of `OUTPUTS`.

    Raises:
        UserInputError: If there is no such verb, or it prints no JSON.
    """
    if verb not in OUTPUTS:
        raise UserInputError(f"--of: must be one of {', '.join(OUTPUTS)}; got {verb!r}.")
    place, kind, about = OUTPUTS[verb]
    inner = _schema_of(place) if place else {"type": "array" if kind == "by name" else "object"}
    definitions = inner.pop("$defs", {})
    definitions |= {} if not place else {"Document": inner}
    item = {"$ref": "#/$defs/Document"} if place else inner
    shapes: dict[str, dict[str, Any]] = {
        "one": item,
        "lines": item,
        "list": {"type": "array", "items": item},
        "by name": {"type": "object", "additionalProperties": item},
        "one or by name": {"anyOf": [item, {"type": "object", "additionalProperties": item}]},
    }
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": verb, "description": about}
    return {**head, **shapes[kind], **({"$defs": definitions} if definitions else {})}


def _schema_of(place: str) -> dict[str, Any]:
    from pydantic import TypeAdapter

    module, _, name = place.partition(":")
    type_ = getattr(import_module(module, __package__), name)
    schema = TypeAdapter(type_).json_schema()
    properties = schema.get("properties", {})
    if name == "DataReport":
        properties["examples"] = {"type": "array", "items": TypeAdapter(Example).json_schema()}
    if name == "Snapshot":  # as `Snapshot.to_json` has it: the pace among the rest, and no curves
        pace = schema["$defs"].pop("Pace")["properties"]
        properties |= pace | {"steps_per_minute": {"type": ["number", "null"]}, "name": {"type": "string"}}
        del properties["pace"], properties["curves"]
        properties["runs"] = {"type": "array", "items": {"type": "object"}}
    return schema
