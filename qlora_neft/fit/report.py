"""The planner's answer: whether a run fits, what it needs, how it would run, how fast, and what to change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from ..base.flattening import flattening_is_wanted, flattens
from ..display.plots import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, YELLOW, new_picture, save_picture
from ..paths import resolve_bundled
from ..recipe import Recipe
from ..recipe.schema import Lora, Quantization, Section
from .cards import CARDS, GIB, Card, card_of, this_machine
from .choose import USABLE, Choice, choose, passes
from .config import read_config, stored_parameters
from .estimate import local_bytes, seconds, tokens_in, tokens_per_second
from .geometry import FAMILIES, Geometry, geometry_of
from .stored import as_stored, stored_tensors_of

CONFIDENCE = {  # by Card.is_gpu
    True: "weights are counted to the byte; the other terms are a model, not measured on this card",
    False: "weights are counted to the byte; the other terms are a model, checked on a CPU",
}


class CardRecord(TypedDict):
    """A card, by its name and its memory in bytes."""

    name: str
    memory: int


class FitReport(TypedDict):
    """The planner's answer, ready for JSON. Sizes are in bytes, ranges are lists of two.

    Attributes:
        fits: Whether the run fits on the card.
        peak_bytes: All terms, less what is paged out.
        usable_bytes: Share of the card's memory that a run may take.
        margin_bytes: Usable bytes that are left, negative if it does not fit.
        paged_out_bytes: Optimizer states on the host.
        terms: Bytes by name.
        parameters: Number of the base's weights.
        quantized_parameters: Those of them in NF4, 0 for a base that is not quantized.
        nf4_bytes: Their size.
        lora_parameters: Number of LoRA's weights, 0 if every weight is trained.
        plan: The recipe's machine section, with every ``auto`` resolved.
        card: The device.
        tokens_per_second: Low and high; None if the card's speed is not known.
        confidence: How far the numbers can be trusted.
        remedies: Changes that help, if it does not fit.
        notes: Anything else to know.
        seconds: Shortest and longest duration of the run; None if data or speed are not known here.
    """

    fits: bool
    peak_bytes: int
    usable_bytes: int
    margin_bytes: int
    paged_out_bytes: int
    terms: dict[str, int]
    parameters: int
    quantized_parameters: int
    nf4_bytes: int
    lora_parameters: int
    plan: dict[str, Any]
    card: CardRecord
    tokens_per_second: list[int] | None
    confidence: str
    remedies: list[str]
    notes: list[str]
    seconds: list[int] | None


def plan_recipe(recipe: Recipe, vram: str | None = None) -> FitReport:
    """Look up a recipe's base and a card, and report whether the base trains on the card; see `fit_report`.

    Args:
        recipe: The recipe.
        vram: A card, or an amount of memory, as in `card_of`; None for this machine.

    Raises:
        UserInputError: If there is no such card, or the base is not found or cannot be counted.
    """
    path = resolve_bundled(recipe.model.name_or_path)
    card = this_machine() if vram is None else card_of(vram)
    config, origin = read_config(path, recipe.model.revision)
    stored = stored_parameters(path, recipe.model.revision, origin)
    tensors = stored_tensors_of(path, recipe.model.revision, origin)
    geometry, differences = as_stored(geometry_of(config), path, tensors)
    report = fit_report(recipe, geometry, card, stored)
    report["notes"] = [*differences, *report["notes"]]
    return report


def fit_report(recipe: Recipe, geometry: Geometry, card: Card, stored: int | None = None) -> FitReport:
    """Report everything the planner knows.

    Args:
        recipe: What is trained.
        geometry: Its base.
        card: The device to train on.
        stored: Number of weights the checkpoint really holds, None if unknown.
    """
    choice, fits = choose(recipe, geometry, card)
    usable = int(USABLE * card.memory)
    quantization, lora = recipe.quantization, None if recipe.trains_all else recipe.adapter
    in_nf4 = quantization is not None
    estimate = tokens_per_second(card, choice.operations, choice.step.tokens, in_nf4=in_nf4)
    speed = None if estimate is None else [round(value) for value in estimate]
    return {
        "fits": fits,
        "peak_bytes": choice.peak_bytes,
        "usable_bytes": usable,
        "margin_bytes": usable - choice.peak_bytes,
        "paged_out_bytes": choice.paged_out,
        "terms": choice.terms,
        "parameters": geometry.parameters(),
        "quantized_parameters": geometry.quantized_parameters() if in_nf4 else 0,
        "nf4_bytes": geometry.nf4_bytes(quantization.bnb_4bit_use_double_quant) if quantization is not None else 0,
        "lora_parameters": 0 if lora is None else geometry.lora_parameters(lora.r, lora.target_modules),
        "plan": _resolved_machine(recipe, geometry, choice, card),
        "card": {"name": card.name, "memory": card.memory},
        "tokens_per_second": speed,
        "confidence": CONFIDENCE[card.is_gpu],
        "remedies": [] if fits else remedies(recipe, geometry, card),
        "notes": _notes(recipe, geometry, card, choice, stored),
        "seconds": _duration(recipe, speed),
    }


def _resolved_machine(recipe: Recipe, geometry: Geometry, choice: Choice, card: Card) -> dict[str, Any]:
    """Return the recipe's machine section with the planner's choices in place of ``auto``."""
    machine = recipe.machine
    asked = None if machine.padding_free == "auto" else machine.padding_free
    flat = flattens(
        asked, machine.attn_implementation, on_cuda=card.is_gpu, family=geometry.model_type, why=geometry.padded
    )
    # Only where the recipe says "auto"; what it states is kept, even if it does not fit.
    chosen = {
        "device": "cuda" if card.is_gpu else "cpu",
        "precision": ("bf16" if card.has_bf16 else "fp16") if card.is_gpu else "fp32",
        "max_tokens_per_micro_batch": choice.tokens or "auto",
        "per_device_train_batch_size": choice.rows or "auto",
        "per_device_eval_batch_size": choice.eval_rows or "auto",
        "activation_checkpointing": choice.checkpointing,
        "activation_offloading": choice.step.offloading,
        "padding_free": flat,
    }
    stated = machine.model_dump() | ({} if flat else {"padding_free": False})  # asked for, and not exact
    return {key: chosen.get(key, value) if value == "auto" else value for key, value in stated.items()}


def _duration(recipe: Recipe, speed: list[int] | None) -> list[int] | None:
    """Return the shortest and the longest time of the run in seconds; None if data or speed are not known here."""
    num_bytes = local_bytes(resolve_bundled(recipe.data.path))
    if num_bytes is None:
        return None
    low, high = (tokens * recipe.train.num_train_epochs for tokens in tokens_in(num_bytes))
    if recipe.train.max_steps is not None:
        # No more tokens than every row of every step at its longest; that may lie below the file's own lower estimate.
        high = min(high, recipe.train.max_steps * recipe.train.effective_batch_size * recipe.data.max_length)
        low = min(low, high)
    return seconds((low, high), speed)


# ---- What to change ----


def remedies(recipe: Recipe, geometry: Geometry, card: Card) -> list[str]:
    """List overrides that make the recipe fit, the mildest first; then the smallest card it fits on as it is."""
    found: list[str] = []
    # Each change is tried alone and on top of all before it, which stand first because they cost less quality.
    together: dict[str, Any] = {}
    changes = _changes(recipe)
    for change in changes:
        together |= change
        alone, fits_alone = choose(_changed(recipe, change), geometry, card)
        if fits_alone:
            found.append(f"{_overrides(change)} makes it fit ({alone.peak_bytes / GIB:.2f} GiB)")
            continue
        found.append(f"{_overrides(change)} brings it to {alone.peak_bytes / GIB:.2f} GiB")
        both, fits_together = choose(_changed(recipe, together), geometry, card)
        # For the first, "together" would repeat what has just been said.
        if change is not changes[0] and fits_together:
            found.append(f"{_overrides(together)} together make it fit ({both.peak_bytes / GIB:.2f} GiB)")
            break
    # With the recipe as it is: a larger card changes nothing that is learned, while the remedies may.
    enough = [other for other in CARDS.values() if choose(recipe, geometry, other)[1]]
    if enough:
        smallest = min(enough, key=lambda other: other.memory)
        found.append(f"as it is, it fits on {smallest.name} ({smallest.memory / GIB:.3g} GiB) and larger cards")
    if not found:
        found.append("no single card of the list holds it; choose a smaller base")
    return found


def _changes(recipe: Recipe) -> list[dict[str, Any]]:
    """List the changes of keys that take less memory, the mildest first; without those the recipe has already made."""
    micro_batches = ("machine.max_tokens_per_micro_batch", "machine.per_device_train_batch_size")
    wanted = [
        # "auto" gives the choice back to the planner. These two change no result; the others change what is learned.
        {"machine.activation_checkpointing": "auto"},
        dict.fromkeys(micro_batches, "auto"),
        {"train.optim": "paged_adamw_8bit"},
        *_smaller_training(recipe),
        {"data.max_length": min(256, recipe.data.max_length)},
    ]
    # A change that the recipe has already made would be no advice.
    new = [{key: value for key, value in change.items() if _value(recipe, key) != value} for change in wanted]
    return [change for change in new if change]


def _smaller_training(recipe: Recipe) -> list[dict[str, Any]]:
    """List what takes less than what is trained now, of the base too: other weights in NF4, LoRA, a lower rank."""
    if recipe.trains_all:  # the adapter as QLoRA's paper has it
        lora = Lora(r=64, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear")
        return [{"quantization": Quantization(), "lora": lora}]
    rank = {"lora.r": min(16, recipe.adapter.r)}
    return [{"quantization": Quantization()}, rank] if recipe.quantization is None else [rank]


def _value(recipe: Recipe, name: str) -> Any:
    section, _, key = name.partition(".")
    return getattr(getattr(recipe, section), key) if key else getattr(recipe, section)


def _changed(recipe: Recipe, change: Mapping[str, Any]) -> Recipe:
    """Return the recipe with other values; they are the planner's own, so the recipe is not checked again."""
    for name, value in change.items():
        section, _, key = name.partition(".")
        # Recipes are frozen, so both section and recipe are copied.
        new = getattr(recipe, section).model_copy(update={key: value}) if key else value
        recipe = recipe.model_copy(update={section: new})
    return recipe


def _overrides(change: Mapping[str, Any]) -> str:
    return " ".join(_override(key, value) for key, value in change.items())


def _override(key: str, value: Any) -> str:
    if not isinstance(value, Section):
        return f"{key}={value}"
    stated = value.model_dump(exclude_defaults=True)
    return " ".join(f"{key}.{name}={one}" for name, one in stated.items()) or f"{key}={{}}"


def _notes(recipe: Recipe, geometry: Geometry, card: Card, choice: Choice, stored: int | None) -> list[str]:
    notes = []
    asked = None if recipe.machine.padding_free == "auto" else recipe.machine.padding_free
    wanted = flattening_is_wanted(asked, recipe.machine.attn_implementation, on_cuda=card.is_gpu)
    if wanted and geometry.padded:
        notes.append(f"rows are padded: {geometry.padded}")
    if recipe.trains_all:
        notes.append("every weight is trained, in float32; activations are counted at their most")
    if geometry.model_type not in FAMILIES:
        notes.append(
            f"models of type {geometry.model_type} are counted from transformers' own code; what a step needs is "
            "modelled on Llama"
        )
    if (count := passes(recipe)) > 1:
        method = "SymNoise" if recipe.neftune is not None and recipe.neftune.symmetric else "FreeLB"
        notes.append(
            f"{method} makes {count} passes a step, which costs {count} times as much time; any speed given here "
            "counts them"
        )
    if choice.paged_out:
        notes.append(
            f"{choice.paged_out / GIB:.2f} GiB of optimizer states are paged to the host while they are not needed, "
            "which takes time at each step"
        )
    if geometry.left_out:
        parts = ", ".join(name.removesuffix("_config") for name in geometry.left_out)
        notes.append(f"the text part is counted, which alone is loaded; left out: {parts}")
    elif stored is not None and stored != geometry.parameters():
        notes.append(
            f"the checkpoint holds {stored:,} weights, its configuration says {geometry.parameters():,}; the answer "
            "goes by the configuration"
        )
    return notes


# ---- The report for people ----

NAMES = {
    "weights": "weights",
    "weight_copies": "weights, copies of a pass",
    "weights_nf4": "base weights, NF4",
    "weights_not_quantized": "embeddings, output layer, norms",
    "lora": "LoRA weights",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations kept",
    "live_block": "one block, alive",
    "dequantization": "unpacked NF4 weights",
    "loss_tile": "output layer and loss",
    "optimizer_step": "optimizer's step, beyond that",
    "evaluation": "evaluation, beyond that",
    "allocator_slack": "allocator slack",
    "context": "CUDA context",
}
BAR = 44  # characters
COLORS = (BLUE, SKY, GREEN, "#8FD3B6", "#005C43", ORANGE, YELLOW, VERMILION, PURPLE, "#8C6D9E", "#BBBBBB", "#777777")


def lines(report: FitReport, name: str) -> list[str]:
    """Return the report as lines of at most 100 characters, names aside."""
    card, peak, usable = report["card"], report["peak_bytes"], report["usable_bytes"]
    verdict = "fits" if report["fits"] else "does not fit"
    margin = abs(report["margin_bytes"]) / GIB
    left = f"{margin:.2f} GiB to spare" if report["fits"] else f"{margin:.2f} GiB too much"
    parameters, quantized = report["parameters"], report["quantized_parameters"]
    in_nf4 = f"{quantized:,} of them in NF4" if quantized else "none quantized"
    trained = f"{report['lora_parameters']:,}" if report["lora_parameters"] else "all"
    out = [
        f"{name}: {verdict} on {card['name']}: {peak / GIB:.2f} of {usable / GIB:.2f} GiB usable, {left}",
        f"{parameters:,} weights, {in_nf4}; {trained} trained",
        "",
    ]
    # The longest bar is the largest term, not the card: small terms stay visible.
    largest = max(report["terms"].values())
    for term, size in report["terms"].items():
        bar = "█" * round(BAR * size / largest)
        out.append(f"  {NAMES.get(term, term):<32} {size / GIB:8.3f} GiB  {bar}".rstrip())
    out += ["", f"how it would run: {_plan(report['plan'])}", _speed(report["tokens_per_second"])]
    if report["seconds"]:
        shortest, longest = (value / 60 for value in report["seconds"])
        out.append(f"the whole run: {shortest:.0f} to {longest:.0f} minutes, by the size of the data file")
    out += [f"to make it fit: {remedy}" for remedy in report["remedies"]]
    out += [f"note: {note}" for note in report["notes"]]
    return [*out, f"confidence: {report['confidence']}"]


def picture(report: FitReport, path: Path, title: str) -> bool:
    """Draw a stacked bar against the card's memory as a PNG; return False without matplotlib."""
    made = new_picture(title, size=(9, 3.6))
    if made is None:
        return False
    figure, axes = made
    left, paged = 0.0, bool(report["paged_out_bytes"])
    parts = list(zip(report["terms"].items(), COLORS, strict=False))
    # What is paged out comes last, where it may cross the line of the card's memory.
    for (term, size), color in sorted(parts, key=lambda part: paged and part[0][0] == "optimizer"):
        width, out = size / GIB, paged and term == "optimizer"
        label = f"{NAMES.get(term, term)} {width:.2f}" + " (paged to the host)" * out
        axes.barh(0, width, left=left, color=color, edgecolor="white", hatch="//" if out else None, label=label)
        left += width
    card = report["card"]
    axes.axvline(card["memory"] / GIB, color="black", linewidth=2)
    axes.axvline(report["usable_bytes"] / GIB, color="black", linewidth=1, linestyle="--")
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.text(card["memory"] / GIB, 0.47, card["name"], va="bottom", ha="right", bbox=box)
    axes.set(yticks=[], xlabel="GiB", ylim=(-0.5, 0.6), xlim=(0, 1.08 * max(left, card["memory"] / GIB)))
    axes.spines["left"].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return save_picture(figure, path)


def _plan(plan: Mapping[str, Any]) -> str:
    tokens, rows = plan["max_tokens_per_micro_batch"], plan["per_device_train_batch_size"]
    limits = [f"{tokens} tokens"] * (tokens != "auto") + [f"{rows} rows"] * (rows != "auto")
    blocks = plan["activation_checkpointing"]
    checkpointing = ("on" if blocks else "off") if isinstance(blocks, bool) else f"in {blocks} blocks"
    checkpointing += ", activations kept in host memory" * (plan["activation_offloading"] is True)
    eval_rows = plan["per_device_eval_batch_size"]
    evaluation = "" if eval_rows == "auto" else f", evaluation {eval_rows} rows at a time"
    joined = "padding-free " if plan["padding_free"] else ""
    return (
        f"{plan['precision']}, {joined}micro-batches of at most {' and '.join(limits)}, activation checkpointing "
        f"{checkpointing}{evaluation}"
    )


def _speed(speed: list[int] | None) -> str:
    if speed is None:
        return "speed: not known for this card"
    low, high = speed
    return (
        f"speed: {low:,} to {high:,} tokens a second by the datasheet, a million tokens in {1e6 / high / 60:.0f} to "
        f"{1e6 / low / 60:.0f} minutes; not measured"
    )
