"""The verbs for other programs: check, gguf. What is heavy is imported inside the verb that needs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .recipes import JsonOption

if TYPE_CHECKING:
    from ..consumers import Facts, Verdict

ALL = "vllm,llama.cpp,ollama,transformers,peft"
BaseOption = Annotated[str | None, typer.Option(metavar="BASE", help="Base model in place of the recorded one.")]


def check(
    source: Annotated[str, typer.Argument(metavar="DIR", help="An adapter: a run's folder, or a Hub id.")],
    consumers: Annotated[str, typer.Option("--for", metavar="TOOL,...", help="The tools to ask about.")] = ALL,
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say which tools can use an adapter.

    From its own files; nothing is loaded. Exit code 1 if one of the tools cannot.
    """
    from ..consumers import facts_of, named_consumers, verdict_for
    from ..trained import find_adapter

    names = named_consumers(consumers)
    facts = facts_of(find_adapter(source, base=base))
    verdicts = [verdict_for(name, facts) for name in names]
    if as_json:
        found = {"source": source, "base": facts.base, "verdicts": [verdict.as_dict() for verdict in verdicts]}
        typer.echo(json.dumps(found, indent=2))
    else:
        _show(facts, verdicts)
    if not all(verdict.is_usable for verdict in verdicts):
        raise typer.Exit(1)


def gguf(
    source: Annotated[
        str, typer.Argument(metavar="DIR", help="An adapter (folder or Hub id), or the folder of a model.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .gguf file to write, or a folder for it.")],
    dtype: Annotated[
        str | None, typer.Option(metavar="f16|bf16|f32", help="Of matrices. Default: f16 for models, f32 for adapters.")
    ] = None,
    modelfile: Annotated[bool, typer.Option("--modelfile", help="Also write a Modelfile for Ollama.")] = False,
    from_: Annotated[
        str, typer.Option("--from", metavar="BASE", help="What the Modelfile of an adapter names as base.")
    ] = "./base.gguf",
    prompt_template: Annotated[
        str | None, typer.Option(metavar="NAME", help="Prompt of a model's Modelfile: alpaca, vicuna, chat or none.")
    ] = None,
    base: BaseOption = None,
) -> None:
    """Write an adapter or a merged model as GGUF.

    For llama.cpp and Ollama.
    """
    from ..gguf_export import modelfile as ollama
    from ..gguf_export import write_lora_gguf, write_model_gguf
    from ..trained import find_adapter

    folder = Path(source).expanduser()
    is_model = (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()
    path = _out(out, "model.gguf" if is_model else "adapter.gguf")
    target = path.with_name("Modelfile")
    if modelfile:
        ollama.check_no_modelfile(target)
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
    typer.echo(f"written: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    if text is not None:
        ollama.write_modelfile(text, target)
        typer.echo(f"written: {target}")
    for note in [*notes, *(text.notes if text is not None else [])]:
        typer.echo(f"note: {note}")
    typer.echo("\n".join(["next:", *(f"  {line}" for line in _next_lines(path, is_model, text is not None))]))


def _out(out: Path, name: str) -> Path:
    """The file to write: OUT, in OUT if it is a folder, with ``.gguf`` behind it if that is missing."""
    if out.is_dir():
        return out / name
    return out if out.suffix == ".gguf" else out.with_name(out.name + ".gguf")


def _next_lines(path: Path, is_model: bool, has_modelfile: bool) -> list[str]:
    model = f"-m {path}" if is_model else f"-m BASE.gguf --lora {path}"
    greedy = "--temp 0 --repeat-penalty 1.2 --repeat-last-n -1"
    lines = [f"llama-server {model}", f"llama-completion {model} -no-cnv {greedy} -f prompt.txt"]
    if has_modelfile:
        lines.append(f"ollama create tuned -f {path.with_name('Modelfile')}")
    if not is_model:
        lines.append("BASE.gguf: the 16-bit base by `qlora-neft gguf`. The model as trained: `qlora-neft merge` first.")
    return lines


def _show(facts: Facts, verdicts: list[Verdict]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    ranks = sorted(set(facts.ranks.values()))
    console.print(
        f"{facts.source}: LoRA of rank {', '.join(map(str, ranks))} on {len(facts.ranks)} modules, "
        f"{'/'.join(facts.dtypes)}, base {facts.base}",
        markup=False,
        soft_wrap=True,
    )
    table = Table("for", "verdict", "why", "what helps")
    for verdict in verdicts:
        cells = (verdict.consumer, verdict.verdict, "; ".join(verdict.reasons), verdict.flag or verdict.remedy or "")
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    for verdict in verdicts:
        if verdict.command is not None:
            console.print(f"{verdict.consumer}: {verdict.command}", markup=False, soft_wrap=True)
    for line in _notes(verdicts):
        console.print(line, markup=False, soft_wrap=True)


def _notes(verdicts: list[Verdict]) -> list[str]:
    """Each note once, with the tools it is of."""
    found: dict[str, list[str]] = {}
    for verdict in verdicts:
        for note in verdict.notes:
            found.setdefault(note, []).append(verdict.consumer)
    return [f"note ({', '.join(names)}): {note}" for note, names in found.items()]
