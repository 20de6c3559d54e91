"""Files that someone else made: one message in seconds, and neither secrets published nor a terminal obeying."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .bench import Bench
from .fault import Fault, hold

SECONDS = 60  # generous: the machine may be busy, and what hangs does so for ever
SECRET = "the text of a private key"
ESCAPE = "\x1b]0;owned\x07\x1b[2Jred"


def recipe(bench: Bench, text: str) -> int:
    """Check a stranger's recipe."""
    file = bench.new().with_suffix(".yaml")
    file.write_text(text)
    printed = bench.said("validate", str(file), code=2, seconds=SECONDS)
    hold(len(printed) < 3000, f"it said {len(printed)} characters")
    return 0


def template(bench: Bench, text: str) -> int:
    """Preview, then train, with a stranger's template."""
    file = bench.new().with_suffix(".jinja")
    file.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}" + text)
    for words in (("preview", "mine.yaml"), ("train", "mine.yaml", "--output-dir", str(bench.new()))):
        printed = bench.said(*words, f"data.prompt_template={file}", code=2, seconds=SECONDS)
        hold(len(printed) < 3000, f"it said {len(printed)} characters")
    return 0


def adapter(bench: Bench, **changes: object) -> int:
    """Use an adapter whose configuration was edited."""
    out = bench.copy(bench.finished)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | changes))
    (out / "recipe.yaml").unlink()  # which names the base as well
    bench.said("generate", str(out), "Hi", code=2, seconds=SECONDS)
    bench.said("merge", str(out), str(bench.new()), code=2, seconds=SECONDS)
    return 0


def link(bench: Bench) -> int:
    """Export an adapter whose tokenizer file is a link to a secret."""
    out, key, exported = bench.copy(bench.finished), bench.new(), bench.new()
    key.write_text(SECRET)
    (out / "vocab.txt").symlink_to(key)
    process = bench.start("-P", "-m", "qlora_neft", "export", str(out), "--output-dir", str(exported))
    process.wait(SECONDS)
    published = [path.read_bytes() for path in exported.rglob("*") if path.is_file()] if exported.exists() else []
    hold(not any(SECRET.encode() in content for content in published), "the secret was published")
    return 0


def escapes(bench: Bench, write: Callable[[Bench], tuple[str, ...]]) -> int:
    """Print what holds sequences for the terminal."""
    words = write(bench)
    process = bench.start("-P", "-m", "qlora_neft", *words, stdout=-1, stderr=-2)
    printed, _ = process.communicate(timeout=SECONDS)
    hold("owned" in printed, f"it said nothing of it: {printed[-300:]!r}")
    hold("\x1b]" not in printed and "\x1b[2J" not in printed and "\x07" not in printed, "the terminal was spoken to")
    return 0


def _in_rows(bench: Bench) -> tuple[str, ...]:
    file = bench.new().with_suffix(".jsonl")
    rows = [{"instruction": f"{n} {ESCAPE}", "output": ESCAPE} for n in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (
        "preview",
        "mine.yaml",
        f"data.path={file}",
        "data.eval_path=null",
        "machine.eval_answers=auto",
        "machine.eval_steps=auto",
    )


def _in_a_key(bench: Bench) -> tuple[str, ...]:
    file = bench.new().with_suffix(".yaml")
    file.write_text((bench.work / "mine.yaml").read_text() + f"{json.dumps(ESCAPE)}: 1\n")
    return ("validate", str(file))


def _in_a_name(bench: Bench) -> tuple[str, ...]:
    return ("train", "mine.yaml", "--output-dir", str(bench.new()), f"model.name_or_path=./{ESCAPE}")


def shadowed(bench: Bench) -> int:
    """Start in a folder that holds a ``random.py`` of somebody's."""
    place = bench.copy(bench.work)
    (place / "random.py").write_text("open('ran.txt', 'w').write('ran')\nraise SystemExit(3)\n")
    words = ("neftune.noise_alpha=5,6", "train.max_steps=1", "--seeds", "1", "--output-dir", "sweep")
    bench.said("sweep", "mine.yaml", *words, cwd=place)
    hold(not Path(place, "ran.txt").exists(), "its code ran")
    return 0


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
RECIPES = {"aliases of aliases": LAUGHS, "deep nesting": "[" * 20_000, "an alias in itself": "a: &a [*a]\n"}
CHAIN = "{% set b0 = 'aaaaaaaaaa' %}" + "".join(
    f"{{% set b{n} = b{n - 1} ~ b{n - 1} ~ messages[0].role %}}" for n in range(1, 60)
)
TEMPLATES = {
    "an endless loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a product of strings": "{{ 'a' * 10000000000 }}",
    "a chain of variables": CHAIN,
    "replaced again and again": "{% set x = messages[0].role %}"
    + "{% set x = x | replace('e', 'eeeeeeeeee') %}" * 30
    + "{{ x | length }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "a division by zero": "{{ 1 / 0 }}",
}
ADAPTERS: dict[str, dict[str, object]] = {
    "a rank of a billion": {"r": 10**9},
    "an expression that never ends": {"target_modules": "(a+)+$"},
    "an initialisation that runs": {"init_lora_weights": "pissa"},
    "layers repeated": {"layer_replication": [[0, 10**6]]},
    "a base that is nowhere": {"base_model_name_or_path": "../../../etc"},
}
KIND = "files from a stranger"
FAULTS = [
    *(Fault(KIND, f"recipe: {name}", partial(recipe, text=text)) for name, text in RECIPES.items()),
    *(Fault(KIND, f"template: {name}", partial(template, text=text)) for name, text in TEMPLATES.items()),
    *(Fault(KIND, f"adapter: {name}", partial(adapter, **changes)) for name, changes in ADAPTERS.items()),
    Fault(KIND, "adapter: a link to a private key, exported", link),
    Fault(KIND, "terminal sequences in rows", partial(escapes, write=_in_rows)),
    Fault(KIND, "terminal sequences in a recipe's key", partial(escapes, write=_in_a_key)),
    Fault(KIND, "terminal sequences in a name", partial(escapes, write=_in_a_name)),
    Fault(KIND, "a `random.py` where a sweep starts", shadowed),
]
