"""One frame of the live view, for a terminal of any width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..run_folder.live import EVALUATING, FAILED, FINISHED, INTERRUPTED, MEASURING, PREPARING, TRAINING
from .curve import MARKS, plot
from .run import NOT_MOVING, WAITING, Loss, Snapshot

COLORS = {
    WAITING: "yellow",
    PREPARING: "yellow",
    TRAINING: "green",
    EVALUATING: "cyan",
    MEASURING: "cyan",
    FINISHED: "bold green",
    INTERRUPTED: "yellow",
    FAILED: "bold red",
    NOT_MOVING: "bold red",
}
NAMES = {"train": "train", "clean": "clean", "held_out": "held out"}
LEAST_PLOT, MOST_PLOT = 4, 14  # lines
GIB = 1024**3


@dataclass(frozen=True)
class Look:
    """What the terminal can show: its size in characters, and whether only ASCII."""

    width: int
    height: int
    ascii_only: bool

    def text(self, text: str, style: str = "") -> Text:
        """Return text that the terminal can show."""
        if self.ascii_only:
            text = text.replace(" · ", ", ").encode("ascii", "backslashreplace").decode()
        return Text(text, style)


def frame(snapshot: Snapshot, look: Look) -> RenderableType:
    """Return the frame of one run."""
    rows = list(_rows(snapshot, look))
    head = [look.text(snapshot.folder, "bold")]
    if snapshot.title:
        head.append(look.text(snapshot.title, "bright_black"))
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bright_black")
    table.add_column(ratio=1, overflow="fold")
    for label, value in rows:
        table.add_row(label, value)
    # What is left of the screen's height; values that wrap take more than a line on a narrow one.
    height = look.height - len(head) - len(rows) * (1 if look.width >= 72 else 2) - 4
    lines = plot(snapshot.curves, look.width, min(height, MOST_PLOT), ascii_only=look.ascii_only)
    drawn = lines if height >= LEAST_PLOT else []
    return Group(*head, table, *([Text(), *drawn, _legend(snapshot, look)] if drawn else []))


def state_text(snapshot: Snapshot, look: Look) -> Text:
    """Return a run's state, in color, with what there is to say of it."""
    text = look.text(snapshot.state, COLORS.get(snapshot.state, ""))
    if snapshot.state == NOT_MOVING and snapshot.quiet_seconds is not None:
        text.append(f" for {duration(snapshot.quiet_seconds)}")
    if snapshot.note:
        text.append_text(look.text(f": {snapshot.note}"))
    return text


def _rows(snapshot: Snapshot, look: Look) -> list[tuple[str, RenderableType]]:
    found: list[tuple[str, RenderableType]] = [("state", state_text(snapshot, look))]
    if snapshot.is_mirror:
        age = "" if snapshot.quiet_seconds is None else f", of {duration(snapshot.quiet_seconds)} ago"
        found.append(("mirror", look.text(f"as of its last copy{age}")))
    if snapshot.steps or snapshot.step:
        found.append(("step", _progress(snapshot, look)))
    if snapshot.losses:
        found.append(("loss", look.text(_losses(snapshot))))
    joined = " · ".join
    speed, pace = [], snapshot.pace
    if pace.steps_per_minute is not None:
        speed.append(f"{pace.steps_per_minute:,.3g} steps/min")
    if pace.tokens_per_second is not None:
        speed.append(f"{pace.tokens_per_second:,.0f} tokens/s")
    if snapshot.learning_rate is not None:
        speed.append(f"learning rate {snapshot.learning_rate:.3g}")
    if speed:
        found.append(("speed", look.text(joined(speed))))
    if snapshot.memory:
        found.append(("memory", look.text("peak: " + joined(_memory(snapshot.memory)))))
    kept = [_checkpoint(snapshot)] if snapshot.checkpoint_step is not None else []
    if snapshot.kept_step is not None:
        kept.append(f"kept: the weights of step {snapshot.kept_step}")
    if snapshot.bad_steps is not None:
        kept.append(f"{snapshot.bad_steps} steps skipped")
    if kept:
        found.append(("saved", look.text(joined(kept))))
    found += [("note", look.text(problem, "yellow")) for problem in snapshot.problems]
    return found


def _progress(snapshot: Snapshot, look: Look) -> Text:
    steps = snapshot.steps
    said = [f"{snapshot.step}" + (f" of {steps}" if steps else "")]
    if steps:
        said[0] += f" ({snapshot.step / steps:.0%})"
    if snapshot.epoch is not None:
        said.append(f"epoch {snapshot.epoch:.2f}" + (f" of {snapshot.epochs:g}" if snapshot.epochs else ""))
    if snapshot.pace.seconds_left is not None:
        said.append(f"about {duration(snapshot.pace.seconds_left)} left")
    elif snapshot.train_seconds is not None:
        said.append(f"trained in {duration(snapshot.train_seconds)}")
    text = look.text(" · ".join(said))
    if steps and look.width >= 72:
        width = 20
        done = round(width * min(snapshot.step / steps, 1))
        full, empty = ("#", ".") if look.ascii_only else ("█", "░")
        return Text.assemble((full * done, "green"), (empty * (width - done), "bright_black"), "  ", text)
    return text


def _losses(snapshot: Snapshot) -> str:
    said = []
    for name, label in NAMES.items():
        if (loss := snapshot.losses.get(name)) is not None:
            at = "" if loss.step == snapshot.step else f" (step {loss.step})"
            said.append(f"{label} {loss.value:.4f}{at}")
    lowest = snapshot.lowest_held_out
    if lowest is not None and lowest != snapshot.losses.get("held_out"):
        said.append(f"lowest held out {lowest.value:.4f} (step {lowest.step})")
    return " · ".join(said)


def _memory(memory: dict[str, int]) -> list[str]:
    names = {"cuda_reserved_bytes": "GPU", "cuda_allocated_bytes": "of it tensors", "host_bytes": "host"}
    return [f"{name} {memory[kind] / GIB:.1f} GiB" for kind, name in names.items() if kind in memory]


def _checkpoint(snapshot: Snapshot) -> str:
    age = snapshot.checkpoint_seconds
    return f"checkpoint of step {snapshot.checkpoint_step}" + ("" if age is None else f", {duration(age)} ago")


def _legend(snapshot: Snapshot, look: Look) -> Text:
    said = [look.text("." if look.ascii_only else "⠒", "bright_black").append(" train (with noise)")]
    said += [Text.assemble((mark, style), f" {NAMES[name]}") for name, (mark, style) in MARKS.items()]
    names = ("train", *MARKS)
    return Text("   ").join(text for name, text in zip(names, said, strict=True) if snapshot.curves.get(name))


# ---- Several runs ----


def arms(snapshots: Sequence[tuple[str, Snapshot]], look: Look, title: str) -> RenderableType:
    """Return the frame of several runs: a table, a line for each."""
    done = sum(snapshot.state == FINISHED for _, snapshot in snapshots)
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bright_black")
    for column in ("run", "state", "step", "train", "held out", "left"):
        is_wide = look.width >= 72 or column in ("run", "state", "held out")
        if is_wide:
            is_text = column in ("run", "state")
            table.add_column(column, overflow="fold", justify="left" if is_text else "right", no_wrap=not is_text)
    for name, snapshot in snapshots:
        left = snapshot.pace.seconds_left
        cells = [
            look.text(name),
            state_text(snapshot, look)
            if look.width >= 100
            else look.text(snapshot.state, COLORS.get(snapshot.state, "")),
            look.text(f"{snapshot.step}/{snapshot.steps}" if snapshot.steps else ""),
            look.text(_value(snapshot.losses.get("train"))),
            look.text(_value(snapshot.losses.get("held_out"))),
            look.text("" if left is None else duration(left)),
        ]
        table.add_row(*(cells if look.width >= 72 else [cells[0], cells[1], cells[4]]))
    return Group(
        look.text(title, "bold"), look.text(f"{done} of {len(snapshots)} runs finished", "bright_black"), table
    )


def _value(loss: Loss | None) -> str:
    return "" if loss is None else f"{loss.value:.4f}"


def duration(seconds: float) -> str:
    """Return a time in words that a glance takes in."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
