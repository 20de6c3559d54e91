"""The content of ``results.json``, typed. The order of the keys is that of the file. No torch."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from .statistics import Interval


class PairedDifference(TypedDict):
    """An arm's measure minus that of the arm ``to``, by seeds that both have; see `statistics.Difference`.

    ``rows_interval`` is a bootstrap over held-out rows, there if the losses of single rows are known. ``measurable`` is
    null for a single seed.
    """

    rows_interval: NotRequired[Interval]
    to: str
    values: list[float]
    mean: float
    t_interval: Interval | None
    bootstrap_interval: Interval | None
    measurable: bool | None


class ArmMeasure(TypedDict):
    """A measure of one arm: ``values`` by seed, their mean and range, null without values."""

    arm: str
    values: dict[int, float]
    mean: float | None
    min: float | None
    max: float | None
    difference: NotRequired[PairedDifference]


class MeasureResults(TypedDict):
    """A measure of all arms, and a sentence on its differences, empty if there are none.

    ``made`` says how it was made, null if that was not recorded: `RunRecord.made`. A measure that was made in several
    ways is there once for each, and only its own runs are in it.
    """

    label: str
    unit: str
    better: Literal["lower", "higher"] | None
    made: dict[str, Any] | None
    arms: list[ArmMeasure]
    verdict: str


class ArmEntry(TypedDict):
    """An arm and the names of its runs."""

    label: str
    settings: dict[str, Any]
    runs: list[str]


class Shared(TypedDict):
    """Whether the runs of all pairs share their training rows, base weights and loss before training."""

    data: bool
    base: bool
    start: bool


class Pairing(Shared):
    """The keys shared by an arm and the arm it is compared with."""

    arm: str
    to: str


class Best(TypedDict):
    """The arm that leads by the measure ``by``: ``arm`` if it is the best by the rule, ``leading`` in any case."""

    by: str
    arm: str | None
    leading: str | None
    sentence: str


class Results(TypedDict):
    """The results of some arms."""

    method: str
    arms: list[ArmEntry]
    pairing: list[Pairing]
    measures: dict[str, MeasureResults]
    best: Best


class SweepResults(Results):
    """``results.json`` of a sweep of ``runs`` runs, ``finished`` of which are in it.

    ``picture`` tells whether one was drawn; it is not in the file.
    """

    recipe: str
    keys: list[str]
    seeds: list[int]
    runs: int
    finished: int
    picture: NotRequired[bool]


class DryRunEntry(TypedDict):
    """A run of a sweep that is only checked; ``state`` is ``finished``, ``begun`` or empty."""

    name: str
    state: str
    steps: int
    tokens: int


class DryRun(TypedDict):
    """The JSON of a sweep's dry run; ``tokens`` are those of the runs not finished, ``decides`` says what decides."""

    decides: list[str]
    runs: list[DryRunEntry]
    tokens: int


class RateTried(TypedDict):
    """A learning rate of a search.

    Attributes:
        rate: The rate.
        losses: Held-out loss by seed, in nats per token, null for a run that diverged.
        loss: Their mean, null if one is.
        difference: Mean paired difference to the lowest rate, null for itself and for one that diverged.
        interval: Of the difference, at the confidence that many comparisons ask for: over seeds, with one seed over
            held-out rows.
        verdict: What can be told.
    """

    rate: float
    losses: dict[int, float | None]
    loss: float | None
    difference: float | None
    interval: Interval | None
    verdict: Literal["lowest", "not measurably worse", "worse", "diverged"]


class TuneResults(TypedDict):
    """``tune.json``: a search for the learning rate.

    Attributes:
        recipe: As given.
        own_rate: The recipe's.
        rate: The one to train with, null if every rate diverged.
        how: ``parabola``, ``grid``, ``edge`` or ``kept``, see `rates.Choice`; null without a rate.
        interval: The nearest rates tried below and above the lowest that are measurably worse or diverged, between
            which the best lies; null on a side where none was. Null without a rate.
        steps, full_steps: Of each run, and of the recipe's own.
        seeds: Of the runs of each rate.
        untrained_loss: Held-out loss before the first step.
        rates: The curve, ascending.
        sentences: What it shows.
        picture: Whether ``curve.png`` was drawn.
        written: The copy of the recipe, null if none was written.
    """

    recipe: str
    own_rate: float
    rate: float | None
    how: Literal["parabola", "grid", "edge", "kept"] | None
    interval: tuple[float | None, float | None] | None
    steps: int
    full_steps: int
    seeds: list[int]
    untrained_loss: float | None
    rates: list[RateTried]
    sentences: list[str]
    picture: bool
    written: str | None
