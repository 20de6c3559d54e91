"""The verb merge. Heavy imports inside it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserInputError
from .recipes import JsonOption

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def merge(
    dir: Annotated[str, typer.Argument(metavar="DIR", help="--output-dir of a run, an adapter's folder, or a Hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the merged model.")],
    strategy: Annotated[
        str,
        typer.Option(
            metavar="dequantized|original|nf4",
            help="On the dequantized base (the model that was trained), the original one, or quantized again.",
        ),
    ] = "dequantized",
    dtype: Annotated[
        str,
        typer.Option(
            metavar="auto|bfloat16|float16|float32",
            help="Of the weights; auto: bfloat16 for a bfloat16 base, else float16.",
        ),
    ] = "auto",
    base: Annotated[str | None, typer.Option(help="Base model in place of the recorded one.")] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision of DIR.")] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Of a file, such as 500MB.")] = "1GB",
    proof_data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Rows to prove it on; default: the run's held-out rows.")
    ] = None,
    proof_rows: Annotated[int, typer.Option(min=1, help="How many rows at most.")] = 64,
    no_proof: Annotated[bool, typer.Option("--no-proof", help="Merge without measuring what came of it.")] = False,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where the proof computes.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Merge an adapter into a plain model, and prove it.

    Exit code 1 if the default merge is not the model that was trained.
    """
    max_shard_bytes = _bytes_of(max_shard_size)
    if no_proof and proof_data is not None:
        raise UserInputError("--no-proof: cannot be combined with --proof-data. Keep one.")
    from ..display.quiet import quiet_libraries
    from ..merging import merge_adapter, plan_merge
    from ..merging import proof_rows as rows_of
    from ..merging.output import check_out
    from ..merging.table import lines
    from ..trained import find_adapter
    from ..trained.prompts import template_of
    from ..trained.tokenizer import tokenizer_of_adapter

    check_out(out.expanduser())  # before anything is fetched
    with quiet_libraries():
        folder = find_adapter(dir, revision=revision, base=base)
        plan = plan_merge(folder, strategy, dtype)
        tokenizer = tokenizer_of_adapter(folder)
        template = template_of(folder.recipe, folder.summary, tokenizer)
        rows = None if no_proof else rows_of(folder, tokenizer, template, proof_data, proof_rows)
        report = merge_adapter(plan, out, tokenizer, rows, max_shard_bytes=max_shard_bytes, device=device, say=_tell)
    typer.echo(json.dumps(report, indent=2) if as_json else "\n".join(lines(report, out)))


def _tell(line: str) -> None:
    """Progress goes to stderr: stdout has the result."""
    print(line, file=sys.stderr, flush=True)


def _bytes_of(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    found: Any = match and UNITS.get(match[2])
    if match is None or found is None or float(match[1]) * found < 1:
        raise UserInputError(f"--max-shard-size: must be a size such as 2GB or 500MB, got {text!r}.")
    return int(float(match[1]) * found)
