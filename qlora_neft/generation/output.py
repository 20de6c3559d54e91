"""Answers on standard output or in a file: as text, as JSON lines, or as one JSON list; and a chat, saved."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

from rich.progress import track
from typing_extensions import TypedDict

from ..data.examples import Message
from ..display.safe_console import SafeConsole
from ..errors import RunFailed, RunInterrupted, UserInputError
from ..files import whole_file, write_text
from .begun import Begun
from .generate import Reply

Replies = dict[str, Reply]  # to one request, by who answers: ``adapter``, ``base``


class ChatRow(TypedDict):
    """A conversation as a row of training data."""

    messages: list[Message]


def entries(answers: Iterable[Replies], form: str, count: int, first: int = 0) -> Iterator[str]:
    """Yield each request's answers as text, to be followed by a line end.

    Args:
        answers: The answers, in order.
        form: ``text``, ``lines`` of JSON, or a JSON ``list``.
        count: Number of requests.
        first: Number of those before the first of these answers.
    """
    for number, found in enumerate(answers, first + 1):
        if form == "text":
            yield _text(found, alone=count == 1)
            continue
        entry = json.dumps(_to_dict(found), ensure_ascii=False)
        if form == "list":
            # The list is written as it grows, one answer a line, instead of all at the end.
            entry = "[\n" * (number == 1) + entry + ("," if number < count else "\n]")
        yield entry


def remarks(found: Replies) -> list[str]:
    """Return a line on each answer that is cut or missing."""
    said = []
    for name, reply in found.items():
        where = reply.request.place + (f", {name}" if len(found) > 1 else "")
        if reply.finish_reason == "no room":
            said.append(
                f"{where}: no answer, the {reply.prompt_tokens} tokens of the prompt fill the model's context. "
                "Shorten it."
            )
        if reply.finish_reason == "length":
            said.append(f"{where}: cut after {reply.tokens} tokens, at --max-new-tokens or the context's end.")
    return said


def with_progress(answers: Iterable[Replies], count: int) -> Iterator[Replies]:
    """Pass answers on and show a bar on standard error, if that is a terminal and there is more than one answer."""
    console = SafeConsole(stderr=True)
    # Answers on the same terminal would run through the bar.
    is_seen = console.is_terminal and count > 1 and not sys.stdout.isatty()
    return iter(track(answers, "answers", count, console=console, transient=True, disable=not is_seen))


def check_new(path: Path, key: str) -> None:
    """Refuse an existing file, or a missing folder, before any work is done for it.

    Raises:
        UserInputError: If the file exists or its folder does not.
    """
    if path.exists():
        raise UserInputError(f"{key}: {str(path)!r} exists. Name a new file.")
    if not path.absolute().parent.is_dir():
        raise UserInputError(f"{key}: no folder at {str(path.parent)!r}. Make it first.")


def write_as_they_come(path: Path, lines: Iterable[str], begun: Begun | None = None) -> int:
    """Write lines to a hidden file beside ``path`` as they come; it gets its name at the end.

    Args:
        path: The file.
        lines: What is written, one answer each.
        begun: What an interrupted command has written already, to which these are added.

    Returns:
        The number of lines.

    Raises:
        RunFailed: If they cannot be written.
        RunInterrupted: On a signal after the first; the lines so far stay in the hidden file.
    """
    count, draft = begun.count if begun else 0, None
    try:
        if begun is not None:
            begun.begin()
        with (
            whole_file(path, keep_draft=True) as draft,
            # A prompt from JSON may hold a lone surrogate, which UTF-8 cannot encode.
            draft.open("a" if count else "w", encoding="utf-8", errors="backslashreplace") as file,
            begun.list.open("a", encoding="utf-8") if begun else nullcontext() as ends,
        ):
            for line in lines:
                file.write(line + "\n")
                # Answers take seconds each: another program can follow them, and a crash keeps them.
                file.flush()
                count += 1
                if ends is not None:
                    ends.write(f"{file.tell()}\n")
                    ends.flush()
        if begun is not None:
            begun.end()
    except OSError as error:
        if not count:
            _forget(draft, begun)
        there = f" Begun: {str(draft)!r}." if draft and draft.exists() else ""
        raise RunFailed(f"--output: {str(path)!r} cannot be written ({error.strerror}).{there}") from error
    except KeyboardInterrupt as stop:
        if count:
            raise RunInterrupted.by(
                stop, f"stopped after {count} answers, kept in {str(draft)!r}. To go on, run the same command again."
            ) from None
        _forget(draft, begun)
        raise
    return count


def _forget(draft: Path | None, begun: Begun | None) -> None:
    """Remove what holds no answer."""
    with suppress(OSError):  # the error that is on its way is the one to report
        if draft:
            draft.unlink(missing_ok=True)
        if begun is not None:
            begun.end()


class SavedChat:
    """Saves a chat, which may be saved to the same file again.

    Files of its own are overwritten, since a chat only grows; any other file is refused.
    """

    def __init__(self) -> None:
        self._own: set[Path] = set()

    def write(self, name: str, rows: Mapping[str, list[ChatRow]], *, main: str) -> str:
        """Write conversations as JSON lines, which ``data.path`` takes, and return a line on what was done.

        Args:
            name: File name; in a comparison, the other side's file gets the side's name appended.
            rows: Rows of each side of the chat.
            main: The side whose file has the given name.

        Raises:
            UserInputError: If there is nothing to save, or a file exists already or cannot be written.
        """
        if not name:
            raise UserInputError("/save: needs a file, as in /save talk.jsonl.")
        # In a comparison one side may have said nothing; that is no reason to refuse the other.
        if not any(rows.values()):
            raise UserInputError("/save: nothing was said yet.")
        path = Path(name).expanduser()
        paths = {side: path if side == main else path.with_stem(f"{path.stem}-{side}") for side in rows}
        # All files first: nothing is written if one of them is somebody else's.
        for target in paths.values():
            if target.exists() and target.resolve() not in self._own:
                raise UserInputError(f"/save: {str(target)!r} exists. Name a new file.")
        for side, target in paths.items():
            try:
                write_text(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[side]))
            except OSError as error:
                raise UserInputError(f"/save: {str(target)!r} cannot be written ({error.strerror}).") from error
            # Resolved, since the same file may be named in two ways.
            self._own.add(target.resolve())
        return f"(saved: {', '.join(map(str, paths.values()))})"


def _to_dict(found: Replies) -> dict[str, object]:
    replies = list(found.values())
    more = {name: reply.to_dict() for name, reply in found.items()} if len(found) > 1 else replies[0].to_dict()
    return {**replies[0].request.to_dict(), "prompt_tokens": replies[0].prompt_tokens, **more}


def _text(found: Replies, *, alone: bool) -> str:
    prompt = [] if alone else _quoted(next(iter(found.values())))
    if len(found) == 1:
        answers: Sequence[str] = [reply.text for reply in found.values()]
    else:
        answers = [f"{name}:\n{reply.text}" for name, reply in found.items()]
    return "\n".join([*prompt, *answers]) + ("" if alone else "\n")


def _quoted(reply: Reply) -> list[str]:
    said = reply.request.to_dict()
    return [f"> {line}" for part in ("prompt", "input") for line in said.get(part, "").splitlines()]
