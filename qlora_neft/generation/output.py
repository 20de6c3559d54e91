"""Answers on standard output or in a file: as text, as JSON lines, or as one JSON list."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from ..errors import RunFailed, UserInputError
from ..files import whole_file, write_text
from .generate import Reply

Replies = dict[str, Reply]  # of one request, by who answers: ``adapter``, ``base``


def entries(answers: Iterable[Replies], form: str, count: int) -> Iterator[str]:
    """Each request's answers as text that a line end follows.

    Args:
        answers: In order.
        form: ``text``, ``lines`` of JSON, or a JSON ``list``.
        count: How many there are.
    """
    for number, found in enumerate(answers, 1):
        if form == "text":
            yield _text(found, alone=count == 1)
            continue
        entry = json.dumps(_to_dict(found), ensure_ascii=False)
        if form == "list":
            entry = "[\n" * (number == 1) + entry + ("," if number < count else "\n]")
        yield entry


def with_progress(answers: Iterable[Replies], count: int) -> Iterator[Replies]:
    """A bar on the terminal of standard error, where there is one and more than one answer to wait for."""
    console = Console(stderr=True)
    is_seen = console.is_terminal and count > 1 and not sys.stdout.isatty()
    return iter(track(answers, "answers", count, console=console, transient=True, disable=not is_seen))


def remarks(found: Replies) -> list[str]:
    """What is to be said about answers that are not whole."""
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


class Saved:
    """Where a chat was saved; it may be saved there again."""

    def __init__(self) -> None:
        self._own: set[Path] = set()

    def write(self, name: str, rows: Mapping[str, list[dict[str, Any]]], *, main: str) -> str:
        """Write conversations as JSON, a row a line, which `data.path` takes; gives what was done.

        Args:
            name: Of the file; that of another side of a comparison gets the side's name behind it.
            rows: Of each side of the chat.
            main: The side that the file is named for.

        Raises:
            UserInputError: If there is nothing to save, or the file is there already or cannot be written.
        """
        if not name:
            raise UserInputError("/save: needs a file, as in /save talk.jsonl.")
        if not any(rows.values()):
            raise UserInputError("/save: nothing was said yet.")
        path = Path(name).expanduser()
        paths = {side: path if side == main else path.with_stem(f"{path.stem}-{side}") for side in rows}
        for target in paths.values():
            if target.exists() and target.resolve() not in self._own:
                raise UserInputError(f"/save: {str(target)!r} exists. Name a new file.")
        for side, target in paths.items():
            _write_whole(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[side]), "/save")
            self._own.add(target.resolve())
        return f"(saved: {', '.join(map(str, paths.values()))})"


def check_new(path: Path, key: str) -> None:
    """Refuse a file that is there, or whose folder is not, before any work is done for it.

    Raises:
        UserInputError: If so.
    """
    if path.exists():
        raise UserInputError(f"{key}: {str(path)!r} exists. Name a new file.")
    if not path.absolute().parent.is_dir():
        raise UserInputError(f"{key}: no folder at {str(path.parent)!r}. Make it first.")


def write_as_they_come(path: Path, lines: Iterable[str]) -> int:
    """Write lines to a hidden file beside ``path`` as they come, and give it its name at the end.

    Returns:
        How many.

    Raises:
        RunFailed: If they cannot be written; what there is so far stays in the hidden file.
    """
    count, draft = 0, None
    try:
        with (
            whole_file(path, keep_draft=True) as draft,
            draft.open("w", encoding="utf-8", errors="backslashreplace") as file,
        ):
            for line in lines:
                file.write(line + "\n")
                file.flush()
                count += 1
    except OSError as error:
        begun = f" Begun: {str(draft)!r}." if draft and draft.exists() else ""
        raise RunFailed(f"--output: {str(path)!r} cannot be written ({error.strerror}).{begun}") from error
    except KeyboardInterrupt:
        if count:
            raise RunFailed(f"interrupted after {count} prompts. Their answers: {str(draft)!r}.") from None
        if draft:
            draft.unlink(missing_ok=True)
        raise
    return count


def _write_whole(path: Path, text: str, key: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise UserInputError(f"{key}: {str(path)!r} cannot be written ({error.strerror}).") from error
