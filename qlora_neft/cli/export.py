"""The verb export: a trained adapter with its receipt, in a folder and on the Hub."""

from __future__ import annotations

import re
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserInputError

if TYPE_CHECKING:
    from ..hub.ask import BaseFacts
    from ..trained import AdapterFolder


LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


class Dtype(StrEnum):
    """Number formats an adapter is published in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def export(
    source: Annotated[
        str, typer.Argument(metavar="DIR", help="The --output-dir of a run, a checkpoint, any LoRA adapter, a Hub id.")
    ],
    repo_id: Annotated[str, typer.Option(metavar="OWNER/NAME", help="Where it goes on the Hub.")],
    public: Annotated[bool, typer.Option("--public", help="For everyone to see; else private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the folder and show the card; push nothing.")
    ] = False,
    base_id: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Hub id of the base, where it was a local folder.")
    ] = None,
    base_revision: Annotated[
        str | None, typer.Option(metavar="COMMIT", help="Commit of the base; default: that of the training.")
    ] = None,
    license: Annotated[str | None, typer.Option(metavar="ID", help="License; default: that of the base.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights; default: as trained.")] = None,
    revision: Annotated[str, typer.Option(metavar="BRANCH", help="Branch to push to.")] = "main",
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the folder is written; default: DIR/export.")
    ] = None,
) -> None:
    """Publish an adapter with its model card, recipe and measurements.

    Private unless --public. --dry-run first shows what would be published.
    """
    from ..trained import find_adapter

    _check_repo_id(repo_id)
    if license is not None and not LICENSE.fullmatch(license):
        raise UserInputError(f"--license: must be an id such as apache-2.0 (hf.co/docs: licenses), got {license!r}.")
    folder = find_adapter(source)
    place = output or _default_output(source, folder)
    facts = _build(folder, place, repo_id, base_id, base_revision, license, dtype)
    _say(*_unknown(facts, license), f"written: {place}/")
    if dry_run:
        _show(place / "README.md")
        _say(f"dry run: nothing was pushed. Without --dry-run it goes to {repo_id}, {_who(public)}.")
        return
    from ..hub.push import push_folder

    pushed = push_folder(
        place,
        repo_id,
        private=not public,
        revision=revision,
        message="Adapter and its receipt, by qlora-neft export",
        say=_say,
        resume_command=shlex.join(["qlora-neft", *sys.argv[1:]]),
    )
    _say("up to date; no new commit" if pushed.was_up_to_date else f"pushed: commit {pushed.commit}")
    typer.echo(pushed.url)


def _build(
    folder: AdapterFolder,
    place: Path,
    repo_id: str,
    base_id: str | None,
    base_revision: str | None,
    license: str | None,
    dtype: Dtype | None,
) -> BaseFacts:
    from ..display.quiet import quiet_libraries
    from ..hub.ask import ask_about_base
    from ..hub.base_id import public_base
    from ..hub.folder import Export, build_folder, license_of
    from ..recipe.yaml_text import dump_yaml

    with quiet_libraries():
        base = public_base(folder, base_id, base_revision)
        facts = ask_about_base(*base)
        if facts.is_missing:
            raise UserInputError(
                f"--base-id: the Hub shows no model {base[0]!r}, so nobody could load the adapter. Check the name; if "
                "it is private, log in with `hf auth login`."
            )
        stated = license_of(license, facts)
        wanted = None if dtype is None else dtype.value
        build_folder(folder, place, Export(repo_id, base, wanted, stated, license is None, dump_yaml))
    if base[1] is None:
        _say(f"the commit of {base[0]} is not known and not pinned; state it with --base-revision COMMIT")
    return facts


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    rule = f"--repo-id: must be owner/name, of letters, digits, '-', '_' and '.', got {repo_id!r}."
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserInputError(rule) from error
    if "/" not in repo_id:
        raise UserInputError(rule)


def _default_output(source: str, folder: AdapterFolder) -> Path:
    """Inside the run's folder; of a checkpoint beside it, for a checkpoint is sound as it was written."""
    if not Path(source).expanduser().is_dir():
        raise UserInputError(f"--output: required where DIR is a Hub id, got DIR {source!r}.")
    if folder.path.name.startswith("checkpoint-"):
        return folder.path.parent / f"export-{folder.path.name}"
    return folder.path / "export"


def _unknown(facts: BaseFacts, license: str | None) -> list[str]:
    if license is not None or facts.license:
        return []
    why = f" ({facts.why_not})" if facts.why_not else ": its card names none"
    return [f"license: not known{why}, so the card has none; state it with --license ID"]


def _show(card: Path) -> None:
    text = card.read_text(encoding="utf-8")
    if not sys.stdout.isatty():
        typer.echo(text, nl=False)
        return
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.syntax import Syntax

    _, front, body = text.split("---\n", 2)
    console = Console()
    console.print(Syntax(front, "yaml", background_color="default"), Markdown(body))


def _say(*lines: str) -> None:
    """On stderr: standard output is for the card, or the address."""
    for line in lines:
        typer.echo(line, err=True)


def _who(public: bool) -> str:
    return "for everyone to see" if public else "private"
