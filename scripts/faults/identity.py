"""Something that decides what is learned changes between two sessions, or only moves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .bench import Bench, contents
from .fault import Fault, hold

TEMPLATE = "### {% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"


def changed_base(bench: Bench, change: Callable[[Path], None], named: str) -> int:
    """Change a copy of the base, and go on with it: refused by what has changed, and nothing is touched."""
    base, out = bench.copy(bench.base), bench.copy(bench.stopped)
    change(base)
    _refused(bench, out, named, f"model.name_or_path={base}")
    return 0


def changed_rows(bench: Bench) -> int:
    """Change a word of the data."""
    out, rows = bench.copy(bench.stopped), bench.new().with_suffix(".jsonl")
    rows.write_text((bench.work / "train.jsonl").read_text().replace("Repeat 3", "Repeat 4"))
    _refused(bench, out, "the rows are not those", f"data.path={rows}")
    return 0


def changed_template(bench: Bench) -> int:
    """Change the template's file under its name."""
    template = bench.new().with_suffix(".jinja")
    template.write_text(TEMPLATE)
    chosen = f"data.prompt_template={template}"
    out = bench.stop(bench.new(), chosen)
    template.write_text(TEMPLATE.replace("###", "##"))
    _refused(bench, out, "template", chosen)
    return 0


def moved(bench: Bench) -> int:
    """Move the run, its base and its data; the same bytes elsewhere go on."""
    base, out, rows = bench.copy(bench.base), bench.copy(bench.stopped), bench.new().with_suffix(".jsonl")
    shutil.copyfile(bench.work / "train.jsonl", rows)
    bench.goes_on(out, f"model.name_or_path={base}", f"data.path={rows}")
    return 0


def _refused(bench: Bench, out: Path, named: str, *overrides: str) -> None:
    before = contents(out)
    printed = bench.said("train", "mine.yaml", "--output-dir", str(out), *overrides, code=2)
    hold(named in printed, f"it said {printed.strip()[-300:]!r}")
    hold(contents(out) == before, "the refusal changed the run's folder")


def _edited(name: str, edit: Callable[[Any], object]) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        content = json.loads((base / name).read_text())
        edit(content)
        (base / name).write_text(json.dumps(content))

    return change


def _swap(content: Any) -> None:
    words = content["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]


def _one_bit(base: Path) -> None:
    file = base / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-4001] ^= 0x40
    file.write_bytes(content)


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "rope_theta": (_edited("config.json", lambda content: content.update(rope_theta=5e5)), "rope_theta"),
    "rms_norm_eps": (_edited("config.json", lambda content: content.update(rms_norm_eps=0.1)), "rms_norm_eps"),
    "hidden_act": (_edited("config.json", lambda content: content.update(hidden_act="gelu")), "hidden_act"),
    "two token ids swapped": (_edited("tokenizer.json", _swap), "vocabulary"),
    "another normalizer": (
        _edited("tokenizer.json", lambda content: content.update(normalizer={"type": "Lowercase"})),
        "normalizer",
    ),
    "another end token": (
        _edited("tokenizer_config.json", lambda content: content.update(eos_token="<s>")),
        "eos_token",
    ),
    "one bit of the weights": (_one_bit, "the weights are not those"),
}
KIND = "what a run learns from changes between two sessions"
FAULTS = [
    *(Fault(KIND, name, partial(changed_base, change=c, named=named)) for name, (c, named) in CHANGES.items()),
    Fault(KIND, "a row of the data", changed_rows),
    Fault(KIND, "the template's file", changed_template),
    Fault(KIND, "nothing: base, data and run only moved", moved),
]
