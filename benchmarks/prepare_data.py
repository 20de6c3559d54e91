"""Preparing 50,000 Alpaca-like rows: our preparation against `SFTTrainer`'s own.

    python benchmarks/prepare_data.py --output prepare_data.json

Each arm runs in a process of its own with a cache of its own: once from an empty cache and once from a full one. The
second round takes the arms in reverse order, so that drift of the machine affects all alike. ``ours`` is timed from the
file to the checked sequences. ``plain`` is timed only in `SFTTrainer._prepare_dataset`, after the file is read and the
prompt is put around each row. The rows are made up here, from a seed.

To compare two versions of this package, run one arm from each of their trees in turn (a missing file is made;
``--conversations`` makes OpenAI's messages, for the tokenizer's own chat template):

    PYTHONPATH=TREE python benchmarks/prepare_data.py --arm ours --rows-file rows.jsonl --ids-file ids.npz
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ARMS = ("ours", "plain", "ours, 2 processes", "plain, 2 processes")
ROUNDS = 2
MAX_LENGTH = 512
SEED = 0
LIMITS = {"first_start_seconds": 60.0, "second_start_seconds": 5.0}
LIBRARIES = ("torch", "transformers", "trl", "datasets", "tokenizers", "pyarrow", "numpy")
WORDS = (  # most common first
    "the of and a to in is it that for was on are with as they be at one have this from or by hot but some what there "
    "we can out other were all your when up use word how said an each she which do their time if will way about many "
    "then them would write like so these her long make thing see him two has look more day could go come did my sound "
    "no most number who over know water than call first people may down side been now find any new work part take get "
    "place made live where after back little only round man year came show every good me give our under name very "
    "through just form much great think say help low line before turn cause same mean differ move right boy old too "
    "does tell sentence set three want air well also play small end put home read hand port large spell add even land "
    "here must big high such follow act why ask men change went light kind off need house picture try us again animal "
    "point mother world near build self earth father head stand own page should country found answer school grow study "
    "still learn plant cover food sun four thought let keep eye never last door between city tree cross since hard"
).split()


def main() -> None:
    """Run all arms and print, and optionally write, the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", choices=ARMS, help="run one arm and print its figures as JSON")
    parser.add_argument("--rows-file", type=Path, help="file of the rows, for --arm")
    parser.add_argument("--conversations", action="store_true", help="rows of messages, for --arm ours")
    parser.add_argument("--ids-file", type=Path, help="where --arm leaves its token ids")
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--tokenizer", default="bundled:demo/base", help="Hub id, folder, or bundled:NAME")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.arm:
        if not options.rows_file.exists():
            write_rows(options.rows_file, options.rows, conversations=options.conversations)
        print(json.dumps(run_arm(options.arm, options.rows_file, options.tokenizer, options.ids_file)))
        return
    result = compare(options.rows, options.tokenizer)
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def compare(num_rows: int, tokenizer: str) -> dict[str, Any]:
    """Run all arms in turn; return the best of their rounds, and whether they agree."""
    runs: dict[str, dict[str, list[Any]]] = {arm: {"first": [], "second": []} for arm in ARMS}
    previews = []
    with tempfile.TemporaryDirectory() as folder:
        rows = write_rows(Path(folder) / "rows.jsonl", num_rows)
        ids = {arm: Path(folder) / f"{arm}.npz" for arm in ARMS}
        for number in range(ROUNDS):
            for arm in ARMS if number % 2 == 0 else reversed(ARMS):
                cache = Path(folder) / f"cache of {arm}, {number}"
                for start in ("first", "second"):
                    runs[arm][start].append(spawn(arm, rows, tokenizer, ids[arm], cache))
                if arm == "ours":
                    previews.append(preview_seconds(rows, tokenizer, cache))
        agreement = agree(np.load(ids["ours"]), np.load(ids["plain"]))
    best = {arm: {start: min(of[start], key=lambda run: run["seconds"]) for start in of} for arm, of in runs.items()}
    return summary(best, runs, previews) | {
        "agreement": agreement,
        "rows": num_rows,
        "max_length": MAX_LENGTH,
        "tokenizer": tokenizer,
        "machine": machine(),
    }


def summary(best: dict[str, Any], runs: dict[str, Any], previews: list[float]) -> dict[str, Any]:
    """Return ratios, seconds, and the requirements."""
    first = {arm: best[arm]["first"]["seconds"] for arm in ARMS}
    second = {arm: best[arm]["second"]["seconds"] for arm in ARMS}
    return {
        "plain_over_ours": first["plain"] / first["ours"],
        "plain_over_ours_2_processes": first["plain, 2 processes"] / first["ours, 2 processes"],
        "plain_over_ours_cpu_seconds": best["plain"]["first"]["cpu_seconds"] / best["ours"]["first"]["cpu_seconds"],
        "first_over_second_start": {arm: first[arm] / second[arm] for arm in ARMS},
        "first_start_seconds": first,
        "second_start_seconds": second,
        "preview_again_seconds": min(previews),
        "holds": {
            "first_start": max(first["ours"], first["ours, 2 processes"]) < LIMITS["first_start_seconds"],
            "second_start": max(second["ours"], min(previews)) < LIMITS["second_start_seconds"],
            "not_slower": first["ours"] <= first["plain"] and first["ours, 2 processes"] <= first["plain, 2 processes"],
        },
        "limits": LIMITS,
        "all_runs": {**runs, "preview_again_seconds": previews},
    }


def agree(ours: Any, plain: Any) -> dict[str, int]:
    """Count the rows in which token ids and labels are the same."""
    by_row = [dict(zip(arm["row"].tolist(), sequences(arm), strict=True)) for arm in (ours, plain)]
    both = [(by_row[0][row], by_row[1][row]) for row in by_row[0].keys() & by_row[1].keys()]
    same_ids = [np.array_equal(a[0], b[0]) for a, b in both]
    same_labels = [np.array_equal(a[1], b[1]) for a, b in both]
    return {
        "rows_ours": len(by_row[0]),
        "rows_plain": len(by_row[1]),
        "same_ids": sum(same_ids),
        "same_ids_and_labels": sum(map(all, zip(same_ids, same_labels, strict=True))),
        "longest": max(len(a[0]) for a, _ in both),
    }


def sequences(arm: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return ids and labels of each sequence."""
    places = np.cumsum(arm["lengths"])[:-1]
    return list(zip(np.split(arm["input_ids"], places), np.split(arm["labels"], places), strict=True))


def write_rows(path: Path, count: int, *, conversations: bool = False) -> Path:
    """Make up rows: instructions of 5 to 30 words, an input in 40% of them, responses of 5 to 150 words.

    Conversations have one to three such exchanges without inputs, and a system message in 30% of them.
    """
    draw = random.Random(SEED)
    weights = [1 / rank for rank in range(10, 10 + len(WORDS))]

    def text(shortest: int, longest: int) -> str:
        words = draw.choices(WORDS, weights, k=draw.randint(shortest, longest))
        commas = [word + "," * (draw.random() < 0.08) for word in words[:-1]]
        return " ".join([*commas, words[-1]]).capitalize() + "."

    with path.open("w", encoding="utf-8") as stream:
        for _ in range(count if conversations else 0):
            system = [{"role": "system", "content": text(3, 15)}] if draw.random() < 0.3 else []
            turns = [("user", 5, 30), ("assistant", 5, 150)] * draw.choice((1, 1, 1, 2, 2, 3))
            messages = [*system, *({"role": role, "content": text(*words)} for role, *words in turns)]
            stream.write(json.dumps({"messages": messages}) + "\n")
        for _ in range(0 if conversations else count):
            given = text(5, 60) if draw.random() < 0.4 else ""
            row = {"instruction": text(5, 30), "input": given, "output": text(5, 150)}
            stream.write(json.dumps(row) + "\n")
    return path


def spawn(arm: str, rows: Path, tokenizer: str, ids: Path, cache: Path) -> dict[str, Any]:
    """Run one arm in a process of its own."""
    command = [sys.executable, __file__, "--arm", arm, "--rows-file", str(rows), "--tokenizer", tokenizer]
    return json.loads(spawned([*command, "--ids-file", str(ids)], cache).strip().splitlines()[-1])


def preview_seconds(rows: Path, tokenizer: str, cache: Path) -> float:
    """Time a whole process that shows data prepared before, as a user waits for it."""
    start = time.perf_counter()
    spawned([sys.executable, "-m", "qlora_neft", "preview", "demo", *overrides(rows, tokenizer), "-n", "0"], cache)
    seconds = time.perf_counter() - start
    if len(list((cache / "qlora_neft").iterdir())) != 1:
        sys.exit("preview did not find what was prepared before")
    return seconds


def spawned(command: list[str], cache: Path) -> str:
    """Return the standard output of a command."""
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def overrides(rows: Path, tokenizer: str) -> list[str]:
    """Return the changes to the recipe demo."""
    data = [
        f"data.path={rows}",
        "data.format=auto",
        "data.prompt_template=auto",
        "data.eval_path=null",
        f"data.max_length={MAX_LENGTH}",
    ]
    return [f"model.name_or_path={tokenizer}", *data, "machine.eval_answers=auto", "machine.dataset_num_proc=1"]


def run_arm(arm: str, rows: Path, tokenizer: str, ids_file: Path) -> dict[str, Any]:
    """Prepare the rows in one way and return the cost; token ids go into a file."""
    processes = 2 if arm.endswith("2 processes") else 1
    prepared, figures = (ours if arm.startswith("ours") else plain)(rows, tokenizer, processes)
    lists = {name: prepared.data.column(name).combine_chunks() for name in ("input_ids", "labels")}
    flat = {name: np.asarray(column.flatten(), dtype=np.int32) for name, column in lists.items()}
    lengths = np.asarray(lists["input_ids"].value_lengths())
    np.savez(ids_file, **flat, lengths=lengths, row=np.asarray(prepared["row"]))
    return figures | {"tokens": int(lengths.sum())}


def ours(rows: Path, tokenizer: str, processes: int) -> tuple[Any, dict[str, Any]]:
    """Prepare from the file to the checked sequences, as `train` and `preview` do."""
    from qlora_neft.base.config import load_tokenizer
    from qlora_neft.recipe import load_recipe
    from qlora_neft.runner.build import data_of, model_path

    changes = [*overrides(rows, tokenizer), f"machine.dataset_num_proc={processes}"]
    recipe = load_recipe("demo", changes)
    loaded = load_tokenizer(model_path(recipe), revision=recipe.model.revision)
    clock = Clock()
    data = data_of(recipe, loaded)
    return data.train, clock.figures() | {"from_cache": data.from_cache}


def plain(rows: Path, tokenizer: str, processes: int) -> tuple[Any, dict[str, Any]]:
    """Prepare as TRL does when `SFTTrainer` is created with rows of prompt and completion."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from qlora_neft.data.templates import alpaca_prompt
    from qlora_neft.paths import resolve_bundled

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            clock = Clock()
            self.prepared = super()._prepare_dataset(*args, **kwargs)
            self.figures = clock.figures()
            return self.prepared

    def with_prompt(row: dict[str, str], number: int) -> dict[str, Any]:
        prompt = alpaca_prompt(row["instruction"], row["input"])
        return {"prompt": prompt, "completion": row["output"], "row": number + 1}

    clock = Clock()
    dataset = load_dataset("json", data_files=str(rows), split="train")
    dataset = dataset.map(with_prompt, with_indices=True, remove_columns=dataset.column_names)
    before = clock.figures()["seconds"]
    loaded = AutoTokenizer.from_pretrained(resolve_bundled(tokenizer))
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(loaded), **sizes))
    args = SFTConfig(
        str(rows.parent / "trainer"),
        max_length=MAX_LENGTH,
        dataset_num_proc=None if processes == 1 else processes,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Timed(model, args, train_dataset=dataset, processing_class=loaded)
    return trainer.prepared, trainer.figures | {"seconds_before": before}


class Clock:
    """Seconds and CPU seconds since it was created, including those of processes that have ended by then."""

    def __init__(self) -> None:
        self.cpu, self.start = self._cpu_seconds(), time.perf_counter()

    def figures(self) -> dict[str, float]:
        """Return the seconds so far."""
        return {"seconds": time.perf_counter() - self.start, "cpu_seconds": self._cpu_seconds() - self.cpu}

    def _cpu_seconds(self) -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in used)


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


if __name__ == "__main__":
    main()
