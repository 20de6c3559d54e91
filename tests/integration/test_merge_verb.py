"""The verb merge on a finished run: what it prints and leaves, and in how much memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import contents, invoke, never_stopped
from forked import environment, quick_python
from safetensors.torch import save_file
from tiny import save_tiny_model

from qlora_neft.run_folder.lock import run_lock


@pytest.fixture
def here(llama, tmp_path, monkeypatch):
    """A folder with the run's data, as the run's recipe names it."""
    run = never_stopped(llama)
    shutil.copytree(run.parent, tmp_path / "work", ignore=shutil.ignore_patterns("checkpoint-*"))
    monkeypatch.chdir(tmp_path / "work")


BLOCKED = """
import sys
sys.modules["bitsandbytes"] = sys.modules["peft"] = None  # as if they were not installed
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("merged")
tokenizer = AutoTokenizer.from_pretrained("merged")
ids = tokenizer("Repeat 7", return_tensors="pt").input_ids
print(model.dtype, model.generate(ids, max_new_tokens=3).shape[1] > ids.shape[1])
"""


def test_the_verb_merges_a_run_and_proves_it_on_its_held_out_rows(here):
    code, stdout, stderr = invoke("merge", "out", "merged", "--device", "cpu")
    assert code == 0, stderr
    report = json.loads(Path("merged/merge_report.json").read_text())
    assert report["chosen"] == "dequantized" and report["status"] == "done"
    assert set(report["strategies"]) == {"dequantized", "original", "nf4"}
    assert all(set(values) == {"kl", "top1", "loss"} for values in report["strategies"].values())
    assert report["proof"]["rows"] == 2 and report["proof"]["rows_from"] == "held-out rows of held.jsonl"
    summary = json.loads(Path("out/summary.json").read_text())
    assert report["proof"]["reference_loss"] == pytest.approx(summary["after"]["held_out_loss"], abs=1e-4)
    for name in ("trained model", "dequantized <", "original", "nf4", "no adapter"):
        assert any(line.startswith(name) for line in stdout.splitlines())
    modes = {path.stat().st_mode for path in Path("merged").iterdir()}
    assert len(modes) == 1  # whoever may read the configuration may read the weights
    everything = "".join(path for path in contents("merged"))
    assert "adapter" not in everything and "quantization_config" not in Path("merged/config.json").read_text()
    ran = subprocess.run(
        [sys.executable, "-c", BLOCKED], env=environment(), capture_output=True, text=True, check=False
    )
    assert ran.stdout.split() == ["torch.float16", "True"], ran.stderr

    code, _, stderr = invoke("merge", "out", "merged")
    assert code == 2 and "OUT: must be a new or empty folder" in stderr


def test_the_rows_of_the_proof(here):
    code, stdout, _ = invoke("merge", "out", "a", "--proof-data", "train.jsonl", "--proof-rows", "3", "--json")
    proof = json.loads(stdout)["proof"]
    assert code == 0 and (proof["rows"], proof["rows_from"]) == (3, "train.jsonl")
    code, stdout, _ = invoke("merge", "out", "b", "--no-proof")
    assert code == 0 and "merged without proof" in stdout
    assert json.loads(Path("b/merge_report.json").read_text())["status"] == "unproven"

    def message(*arguments):
        code, _, stderr = invoke("merge", "out", "c", *arguments)
        assert code == 2 and not contents(".").keys() & {"c", ".c.part"}, stderr
        return stderr

    assert "--no-proof" in message("--no-proof", "--proof-data", "train.jsonl")
    assert "--proof-data" in message("--proof-data", "none.jsonl")
    assert "--max-shard-size" in message("--max-shard-size", "much")
    Path(".c.part").mkdir()
    with run_lock(Path(".c.part")):  # as another merge has it
        code, _, stderr = invoke("merge", "out", "c", "--no-proof")
    assert code == 2 and "give another OUT." in stderr and "--output-dir" not in stderr
    Path(".c.part").rmdir()
    shutil.move("held.jsonl", "elsewhere.jsonl")
    assert "--proof-data FILE" in message()
    shutil.move("out/recipe.yaml", "recipe.yaml")
    assert "no recipe.yaml" in message()


MEASURED = """
from pathlib import Path
from qlora_neft.export.merge.merge import merge_adapter
from qlora_neft.export.merge.plan import plan_merge
from qlora_neft.adapter.folder import find_adapter
from qlora_neft.adapter.load import tokenizer_of_adapter
def own_kib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
folder, marks = find_adapter("adapter"), []
say = lambda line: marks.append(own_kib() * 1024)
options = {"max_shard_bytes": 3_000_000, "device": "cpu", "say": say}
report = merge_adapter(plan_merge(folder), Path("out"), tokenizer_of_adapter(folder), None, **options)
print(report["bytes"], *marks)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status, which is Linux's")
def test_merging_takes_the_memory_of_a_shard_not_of_the_model(tmp_path, monkeypatch):
    """After half of a model of 47 MB, in shards of 3 MB, the process takes no more; mapped files are not counted."""
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 40, "head_dim": 64}
    base = save_tiny_model(Path("base").absolute(), "llama", **sizes)
    Path("adapter").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(base)}
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 256), f"{module}.lora_B.weight": torch.ones(256, 2)}
    save_file(factors, "adapter/adapter_model.safetensors")
    command = [quick_python(), "-c", MEASURED]
    ran = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    size, *after_each_shard = map(int, ran.stdout.split())
    assert size > 45e6 and len(after_each_shard) > 15
    # Where it begins is no measure: allocator and libraries take some 30 MB once.
    assert after_each_shard[-1] - after_each_shard[len(after_each_shard) // 2] < 2 * 3_000_000
