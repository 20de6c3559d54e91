"""A folder in which the documentation's commands find what they name: runs, rows, prompts, outputs of other models."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import yaml
from command_line import ROWS, copied, invoke, never_stopped
from sweep_runs import swept_in

# Commands are run as shown, but for these: they make them short.
EXTRA = {
    "train": ("machine.save_steps=auto",),
    "generate": ("--max-new-tokens", "4"),
    "chat": ("--max-new-tokens", "4"),
    "merge": ("--proof-rows", "1"),
    "eval loss": ("--rows", "2"),
    "eval overfit": ("--rows", "2", "--max-new-tokens", "4"),
    "eval flips": ("--rows", "8"),
    "export": ("--base-id", "some/base"),
}
SOME = [{"instruction": f"Say {n}", "input": "", "output": f"{n}, {n}"} for n in range(8)]
TALK = [{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]}]
ASKED = [f"Say {n}" for n in range(3)]
LONG = " ".join(f"word{n % 40}" for n in range(60))
OUTPUTS = [{"instruction": text, "output": f"{text} {LONG}", "generator": "mine"} for text in ASKED]
JUDGED = [
    {
        "instruction": text,
        "output_1": "No.",
        "output_2": f"{text} {LONG}",
        "generator_1": "theirs",
        "generator_2": "mine",
    }
    | {"preference": 1.0 + number % 2, "annotator": "somebody"}
    for number, text in enumerate(ASKED)
]


def make_documented_place(llama: Path, folder: Path) -> Path:
    """Two steps are a run here; `out` is a finished one that also holds `out/alpha0` and `out/alpha5`."""
    finished = never_stopped(llama)
    copied(finished.parent, folder)
    recipe = yaml.safe_load((folder / "mine.yaml").read_text())
    recipe["train"]["max_steps"] = 2
    (folder / "mine.yaml").write_text(yaml.safe_dump(recipe))
    # A recipe without held-out rows, as a copy of a chat recipe has none with local ones.
    recipe |= {"data": {"path": "train.jsonl", "max_length": 250}, "machine": {"device": "cpu", "precision": "fp32"}}
    (folder / "my-qwen.yaml").write_text(yaml.safe_dump(recipe))
    for checkpoint in (folder / "out").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    finished = copied(folder / "out", folder / "out-demo")
    for name in ("alpha0", "alpha5"):
        copied(finished, folder / "out" / name)
    swept_in(folder, "neftune.noise_alpha=0,5", "machine.eval_answers=0", seeds=1, output_dir="sweep")
    with contextlib.chdir(folder):
        code, _, stderr = invoke("merge", "out", "merged", "--no-proof")
    assert code == 0, stderr
    for name in ("my_rows", "other", "evol_instruct", "alpaca"):
        _write_lines(folder / f"{name}.jsonl", ROWS if name == "my_rows" else SOME)
    _write_lines(folder / "messages.jsonl", TALK)
    (folder / "prompts.txt").write_text("One?\nTwo?\n")
    for name in ("model_outputs", "drawn", "long"):
        (folder / f"{name}.json").write_text(json.dumps(OUTPUTS))
    (folder / "annotations.json").write_text(json.dumps(JUDGED))
    with contextlib.chdir(folder):  # a study that people have filled in
        code, _, stderr = invoke("eval", "alpaca", "pairs", "long.json", "drawn.json", "--rows", "2")
        assert code == 0, stderr
        pairs = json.loads(Path("study.json").read_text())
        Path("study.json").write_text(json.dumps([{**pair, "verdict": 1} for pair in pairs]))
    return folder


def made_by(words: list[str]) -> list[Path]:
    """What a command makes, removed first where it is there already."""
    positional = [word for word in words if not word.startswith("-") and "=" not in word]
    made: list[Path] = []
    if words[0] in ("cp", "merge", "gguf"):
        made = [Path(positional[2])]
    made += [Path(words[words.index(option) + 1]) for option in ("--output-dir", "--output") if option in words]
    if "--modelfile" in words:
        made.append(Path("Modelfile"))
    for path in made:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return [] if "--dry-run" in words else made


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
