"""The verbs that hand an adapter over: merge, check, gguf, export."""

from __future__ import annotations

import re
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..display.terminal import echo, echo_result
from ..errors import UserInputError
from ..imports import imports_that_stay
from .options import AdapterArgument, BaseOption, JsonOption, RevisionOption, console, print_json, say

if TYPE_CHECKING:
    from ..adapter.folder import AdapterFolder
    from ..export.consumers import Facts, Verdict
    from ..export.hub.base import BaseFacts

# ---- merge ----

# Size suffixes of --max-shard-size, in bytes.
UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def merge(
    dir: AdapterArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the merged model.")],
    strategy: Annotated[
        str,
        typer.Option(
            metavar="dequantized|original|nf4",
            help="Merge into the dequantized base (which was trained on), the original one, or quantize again.",
        ),
    ] = "dequantized",
    dtype: Annotated[
        str,
        typer.Option(
            metavar="auto|bfloat16|float16|float32",
            help="Dtype of the weights; auto: bfloat16 for a bfloat16 base, else float16.",
        ),
    ] = "auto",
    base: BaseOption = None,
    revision: RevisionOption = None,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Maximum size of a weights file, such as 500MB.")
    ] = "1GB",
    proof_data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Rows for the proof; default: the run's held-out rows.")
    ] = None,
    proof_rows: Annotated[int, typer.Option(min=1, help="Maximum number of rows for the proof.")] = 64,
    no_proof: Annotated[bool, typer.Option("--no-proof", help="Merge without measuring the result.")] = False,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Device to compute the proof on.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Merge an adapter into a plain model, and prove it.

    Exit code 1 if the default merge is not the model that was trained.
    """
    # Options first: they are checked without importing torch.
    max_shard_bytes = _bytes_of(max_shard_size)
    if no_proof and proof_data is not None:
        raise UserInputError("--no-proof: cannot be combined with --proof-data. Keep one.")
    with imports_that_stay():
        from ..adapter.folder import find_adapter
        from ..adapter.load import tokenizer_of_adapter
        from ..adapter.prompts import template_of
        from ..display.console import quiet_libraries
        from ..export.merge.merge import check_out, merge_adapter
        from ..export.merge.plan import plan_merge
        from ..export.merge.report import lines
        from ..runner.run_data import proof_rows as rows_of

    check_out(out.expanduser())  # before anything is fetched
    with quiet_libraries():
        folder = find_adapter(dir, revision=revision, base=base)
        plan = plan_merge(folder, strategy, dtype)
        tokenizer = tokenizer_of_adapter(folder)
        template = template_of(folder, tokenizer)
        # Rows and tokenizer before the merge: missing data for the proof ends it here, not after gigabytes were
        # written.
        rows = None if no_proof else rows_of(folder, tokenizer, template, proof_data, proof_rows)
        report = merge_adapter(plan, out, tokenizer, rows, max_shard_bytes=max_shard_bytes, device=device, say=say)
    if as_json:
        print_json(report)
    else:
        echo("\n".join(lines(report, out)))


def _bytes_of(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    size = float(match[1]) * UNITS.get(match[2], 0) if match else 0
    if size < 1:
        raise UserInputError(f"--max-shard-size: must be a size such as 2GB or 500MB, got {text!r}.")
    return int(size)


# ---- check ----

ALL = "vllm,llama.cpp,ollama,transformers,peft"


def check(
    source: AdapterArgument,
    consumers: Annotated[str, typer.Option("--for", metavar="TOOL,...", help="Tools to check.")] = ALL,
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tell which tools can use an adapter.

    Only its files are read; nothing is loaded. Exit code 1 if one of the tools cannot.
    """
    from ..adapter.folder import find_adapter
    from ..export.consumers import facts_of, named_consumers, verdict_for

    names = named_consumers(consumers)
    # Names are checked first, then the files are read once for all tools.
    folder = find_adapter(source, base=base)
    facts, counted = facts_of(folder), folder.census
    verdicts = [verdict_for(name, facts) for name in names]
    if as_json:
        count = counted and counted.model_dump(exclude_unset=True)
        listed = [verdict.as_dict() for verdict in verdicts]
        print_json({"source": source, "base": facts.base, "census": count, "verdicts": listed})
    else:
        _show_verdicts(facts, verdicts, counted.lines() if counted else [])
    if not all(verdict.is_usable for verdict in verdicts):
        raise typer.Exit(1)


def _show_verdicts(facts: Facts, verdicts: list[Verdict], counted: list[str]) -> None:
    from ..display.tables import Table

    screen = console()
    ranks = sorted(set(facts.ranks.values()))
    screen.print(
        f"{facts.source}: LoRA of rank {', '.join(map(str, ranks))} on {len(facts.ranks)} modules, "
        f"{'/'.join(facts.dtypes)}, base {facts.base}",
        markup=False,
        soft_wrap=True,
    )
    if counted:
        screen.print(f"counted in training: {'; '.join(counted)}", markup=False, soft_wrap=True)
    rows = [(v.consumer, v.verdict, "; ".join(v.reasons), v.flag or v.remedy or "") for v in verdicts]
    screen.print(Table(("for", "verdict", "why", "what helps"), rows, align="l").rich())
    for verdict in verdicts:
        if verdict.command is not None:
            screen.print(f"{verdict.consumer}: {verdict.command}", markup=False, soft_wrap=True)
    for line in _notes(verdicts):
        screen.print(line, markup=False, soft_wrap=True)


def _notes(verdicts: list[Verdict]) -> list[str]:
    """Return each note once, with the tools it is about."""
    found: dict[str, list[str]] = {}
    for verdict in verdicts:
        for note in verdict.notes:
            found.setdefault(note, []).append(verdict.consumer)
    return [f"note ({', '.join(names)}): {note}" for note, names in found.items()]


# ---- gguf ----


def gguf(
    source: Annotated[str, typer.Argument(metavar="DIR", help="An adapter (folder or Hub id), or a model's folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .gguf file to write, or a folder to put it in.")],
    dtype: Annotated[
        str | None,
        typer.Option(metavar="f16|bf16|f32", help="Dtype of matrices; default: f16 for models, f32 for adapters."),
    ] = None,
    modelfile: Annotated[bool, typer.Option("--modelfile", help="Also write a Modelfile for Ollama.")] = False,
    from_: Annotated[
        str, typer.Option("--from", metavar="BASE", help="Base that an adapter's Modelfile names.")
    ] = "./base.gguf",
    prompt_template: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Prompt template of a model's Modelfile: alpaca, vicuna, chat or none."),
    ] = None,
    base: BaseOption = None,
) -> None:
    """Write an adapter or a merged model as GGUF, for llama.cpp and Ollama."""
    from ..adapter.folder import find_adapter
    from ..export.gguf import modelfile as ollama
    from ..export.gguf.lora import write_lora_gguf
    from ..export.gguf.model import write_model_gguf

    folder = Path(source).expanduser()
    # A folder with both is an adapter's: its own configuration decides.
    is_model = (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()
    path = _out(out, "model.gguf" if is_model else "adapter.gguf")
    target = path.with_name("Modelfile")
    if modelfile:
        ollama.check_no_modelfile(target)
    # The Modelfile's text first: a prompt that nobody knows is reported before gigabytes are written.
    text = None
    if is_model:
        if modelfile:
            text = ollama.modelfile_of_model(folder, path, prompt_template)
        notes = write_model_gguf(folder, path, dtype or "f16")
    else:
        adapter = find_adapter(source, base=base)
        if modelfile:
            text = ollama.modelfile_of_adapter(adapter, path, from_)
        notes = write_lora_gguf(adapter, path, dtype or "f32")
    echo(f"written: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    # Put down last, so that it never names a GGUF that is not there.
    if text is not None:
        ollama.write_modelfile(text, target)
        echo(f"written: {target}")
    for note in [*notes, *(text.notes if text is not None else [])]:
        echo(f"note: {note}")
    echo("\n".join(["next:", *(f"  {line}" for line in _next_lines(path, is_model, text is not None))]))


def _out(out: Path, name: str) -> Path:
    """Return the file to write: OUT, inside OUT if it is a folder, with ``.gguf`` appended if it is missing."""
    if out.is_dir():
        return out / name
    return out if out.suffix == ".gguf" else out.with_name(out.name + ".gguf")


def _next_lines(path: Path, is_model: bool, has_modelfile: bool) -> list[str]:
    model = f"-m {path}" if is_model else f"-m BASE.gguf --lora {path}"
    # The decoding of NEFTune's authors; -1: the penalty counts the whole context, as transformers' does.
    greedy = "--temp 0 --repeat-penalty 1.2 --repeat-last-n -1"
    lines = [f"llama-server {model}", f"llama-completion {model} -no-cnv {greedy} -f prompt.txt"]
    if has_modelfile:
        lines.append(f"ollama create tuned -f {path.with_name('Modelfile')}")
    if not is_model:
        lines.append("BASE.gguf: the 16-bit base by `qlora-neft gguf`. The model as trained: `qlora-neft merge` first.")
    return lines


# ---- export ----

# The form alone: the Hub knows which ids exist, and its list grows.
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


class Dtype(StrEnum):
    """Number formats an adapter is published in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def export(
    source: AdapterArgument,
    repo_id: Annotated[str, typer.Option(metavar="OWNER/NAME", help="Repository on the Hub to publish to.")],
    public: Annotated[bool, typer.Option("--public", help="Make the repository public; default: private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the folder and print the card, but push nothing.")
    ] = False,
    base_id: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Hub id of the base, if it was a local folder.")
    ] = None,
    base_revision: Annotated[
        str | None, typer.Option(metavar="COMMIT", help="Commit of the base; default: the one trained on.")
    ] = None,
    license: Annotated[str | None, typer.Option(metavar="ID", help="License; default: the base's.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype of the weights; default: as trained.")] = None,
    revision: Annotated[str, typer.Option(metavar="BRANCH", help="Branch to push to.")] = "main",
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder to write what is published; default: DIR/export.")
    ] = None,
) -> None:
    """Publish an adapter with its model card, recipe and measurements.

    Private unless --public. Use --dry-run first to see what would be published.
    """
    from ..adapter.folder import find_adapter

    _check_repo_id(repo_id)
    if license is not None and not LICENSE.fullmatch(license):
        raise UserInputError(f"--license: must be an id such as apache-2.0 (hf.co/docs: licenses), got {license!r}.")
    # The name and the license are checked first, before a Hub id is downloaded.
    folder = find_adapter(source)
    place = output or _default_output(source, folder)
    facts = _build(folder, place, repo_id, base_id, base_revision, license, dtype)
    say(*_license_notes(facts, license), f"written: {place}/")
    if dry_run:
        _show_card(place / "README.md")
        say(f"dry run: nothing was pushed. Without --dry-run it goes to {repo_id}, {_who(public)}.")
        return
    from ..export.hub.push import push_folder

    pushed = push_folder(
        place,
        repo_id,
        private=not public,
        revision=revision,
        message="Adapter and its receipt, by qlora-neft export",
        say=say,
        # sys.argv is this command in a notebook too: an export that pushes runs in a process of its own there.
        resume_command=shlex.join(["qlora-neft", *sys.argv[1:]]),
    )
    say("up to date; no new commit" if pushed.was_up_to_date else f"pushed: commit {pushed.commit}")
    echo(pushed.url)


def _build(
    folder: AdapterFolder,
    place: Path,
    repo_id: str,
    base_id: str | None,
    base_revision: str | None,
    license: str | None,
    dtype: Dtype | None,
) -> BaseFacts:
    from ..display.console import quiet_libraries
    from ..export.hub.base import ask_about_base, public_base
    from ..export.hub.folder import Export, build_folder, license_of

    with quiet_libraries():
        base = public_base(folder, base_id, base_revision)
        facts = ask_about_base(*base)
        if facts.is_missing:
            raise UserInputError(
                f"--base-id: the Hub shows no model {base.id!r}, so nobody could load the adapter. Check the name; if "
                "it is private, log in with `hf auth login`."
            )
        stated = license_of(license, facts)
        wanted = None if dtype is None else dtype.value
        build_folder(folder, place, Export(repo_id, base, wanted, stated, license is None))
    if base.commit is None:
        say(f"the commit of {base.id} is not known and not pinned; state it with --base-revision COMMIT")
    return facts


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    # The client's own check allows a name without an owner, and its message does not name the option.
    rule = f"--repo-id: must be owner/name, of letters, digits, '-', '_' and '.', got {repo_id!r}."
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserInputError(rule) from error
    if "/" not in repo_id:
        raise UserInputError(rule)


def _default_output(source: str, folder: AdapterFolder) -> Path:
    """Return a folder inside the run's; for a checkpoint, beside it: inside, it would no longer match its manifest."""
    if not Path(source).expanduser().is_dir():
        raise UserInputError(f"--output: required if DIR is a Hub id, got DIR {source!r}.")
    if folder.path.name.startswith("checkpoint-"):
        return folder.path.parent / f"export-{folder.path.name}"
    return folder.path / "export"


def _license_notes(facts: BaseFacts, license: str | None) -> list[str]:
    if license is not None or facts.license:
        return []
    why = f" ({facts.why_not})" if facts.why_not else ": its card names none"
    return [f"license: not known{why}, so the card has none; state it with --license ID"]


def _show_card(card: Path) -> None:
    text = card.read_text(encoding="utf-8")
    if not sys.stdout.isatty():
        echo_result(text, nl=False)
        return
    from rich.markdown import Markdown
    from rich.syntax import Syntax

    # A card starts with its front matter between two lines of dashes.
    _, front, body = text.split("---\n", 2)
    console(highlight=True).print(Syntax(front, "yaml", background_color="default"), Markdown(body, hyperlinks=False))


def _who(public: bool) -> str:
    return "for everyone to see" if public else "private"
