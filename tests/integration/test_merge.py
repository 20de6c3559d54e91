"""A merged model is the one that was trained, on disk as any other model is; what cannot be merged is refused."""

import json
import shutil

import pytest
import torch
from command_line import contents
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, mixed_rows, tiny_lora
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_neft.adapter.folder import find_adapter
from qlora_neft.adapter.load import base_of_adapter, tokenizer_of_adapter, with_adapter
from qlora_neft.base.nf4 import keep_nf4_layout, load_nf4_base
from qlora_neft.base.precision import resolve_precision
from qlora_neft.errors import RunFailed, UserInputError
from qlora_neft.export.merge.merge import merge_adapter
from qlora_neft.export.merge.plan import plan_merge
from qlora_neft.export.merge.proof import ProofRows
from qlora_neft.export.merge.report import KL_LIMIT
from qlora_neft.run_folder.checkpoints import save_adapter

ROWS = ProofRows([dict(row) for row in mixed_rows(6)], "random rows")
IDS = torch.tensor([ROWS.rows[3]["input_ids"]])
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def make_adapter(base, folder, scale=0.05, **lora):
    """An adapter whose every factor is random, saved as a run saves it."""
    model = load_nf4_base(str(base), device=torch.device("cpu"), compute_dtype=torch.float32)
    model = get_peft_model(model, tiny_lora(**lora))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.requires_grad:
                param.copy_(torch.randn_like(param) * scale if "lora_" in name else param * 1.3)
    save_adapter(model, AutoTokenizer.from_pretrained(base), folder)
    return folder


def merged(adapter, out, rows=ROWS, shard=2 * 10**9, say=lambda line: None, **options):
    """The report of a merge through the package."""
    folder = find_adapter(adapter)
    plan = plan_merge(folder, **options)
    return merge_adapter(plan, out, tokenizer_of_adapter(folder), rows, max_shard_bytes=shard, device="cpu", say=say)


def trained_logits(adapter):
    folder = find_adapter(adapter)
    model = with_adapter(base_of_adapter(folder, resolve_precision("fp32", "cpu")), folder)
    return logits_of(model)


@torch.no_grad()
def logits_of(model):
    return model.eval()(input_ids=IDS).logits.float()


def loaded_logits(out):
    return logits_of(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))


@pytest.fixture(scope="module")
def llama_adapter(llama, tmp_path_factory):
    return make_adapter(llama, tmp_path_factory.mktemp("adapter") / "llama")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_merged_model_is_the_trained_one(architecture, architecture_dir, tmp_path):
    base = architecture_dir(architecture)
    adapter = make_adapter(base, tmp_path / "adapter")
    merged(adapter, tmp_path / "exact", rows=None, dtype="float32")
    torch.testing.assert_close(loaded_logits(tmp_path / "exact"), trained_logits(adapter), rtol=0, atol=1e-5)
    stored, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "exact", base))
    assert {key: t.shape for key, t in stored.items()} == {key: t.shape for key, t in base.items()}


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "opt"])
def test_of_the_three_strategies_only_the_default_is_the_trained_model(architecture, architecture_dir, tmp_path):
    adapter = make_adapter(architecture_dir(architecture), tmp_path / "adapter")
    report = merged(adapter, tmp_path / "out")
    found = report["strategies"]
    assert report["status"] == "done" and report["chosen"] == "dequantized" and report["dtype"] == "float16"
    assert found["dequantized"]["kl"] < KL_LIMIT
    # How large the others are depends on the random weights, which are not the same on every CPU.
    assert min(found["original"]["kl"], found["nf4"]["kl"]) > 1000 * found["dequantized"]["kl"]
    assert found["dequantized"]["loss"] == pytest.approx(report["proof"]["reference_loss"], abs=1e-2)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"strategy": "original"}, {"strategy": "nf4"}], ids=str)
def test_the_proof_is_of_the_files_as_written(options, llama_adapter, tmp_path):
    """Loaded by transformers alone, what was written is as far from the trained model as the report says."""
    report = merged(llama_adapter, tmp_path / "out", **options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    keep_nf4_layout(model)
    reference = with_adapter(
        base_of_adapter(find_adapter(llama_adapter), resolve_precision("fp32", "cpu")), find_adapter(llama_adapter)
    )
    kl, same, count = 0.0, 0, 0
    for row in ROWS.rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits[0, :-1][labels >= 0].double().log_softmax(-1) for m in (reference, model))
        kl += torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum").item()
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        count += len(p)
    found = report["strategies"][report["chosen"]]
    assert count == report["proof"]["tokens"]
    assert found["kl"] == pytest.approx(kl / count, rel=1e-3, abs=1e-8)
    assert found["top1"] == pytest.approx(same / count)
    assert ("quantization_config" in json.loads((tmp_path / "out/config.json").read_text())) == (
        options.get("strategy") == "nf4"
    )


def test_adapters_of_some_layers_only_leave_the_others_as_nf4(llama, tmp_path):
    adapter = make_adapter(llama, tmp_path / "adapter", target_modules=["q_proj"])
    merged(adapter, tmp_path / "out", dtype="float32", rows=None)
    torch.testing.assert_close(loaded_logits(tmp_path / "out"), trained_logits(adapter), rtol=0, atol=1e-5)
    original = load_file(llama / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    stored = load_file(tmp_path / "out/model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert not torch.equal(original, stored)


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.mlp.up_proj": 40}},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["v_proj", "lm_head"]},
    ],
    ids=["rslora and patterns", "a trained head", "a head with an adapter"],
)
def test_kinds_of_lora(lora, llama, tmp_path):
    adapter = make_adapter(llama, tmp_path / "adapter", **lora)
    merged(adapter, tmp_path / "out", dtype="float32", rows=None)
    torch.testing.assert_close(loaded_logits(tmp_path / "out"), trained_logits(adapter), rtol=0, atol=1e-5)


def test_a_base_in_bfloat16_and_shards(llama, tmp_path):
    """Its files are read by their index, and it is quantized from the dtype it is loaded in."""
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    model.save_pretrained(base, max_shard_size="60KB")
    AutoTokenizer.from_pretrained(llama).save_pretrained(base)
    assert len(list(base.glob("model-*.safetensors"))) > 2
    adapter = make_adapter(base, tmp_path / "adapter")
    merged(adapter, tmp_path / "exact", rows=None, dtype="float32")
    torch.testing.assert_close(loaded_logits(tmp_path / "exact"), trained_logits(adapter), rtol=0, atol=1e-5)
    report = merged(adapter, tmp_path / "out", shard=50_000)
    assert report["dtype"] == "bfloat16" and report["strategies"]["dequantized"]["kl"] < KL_LIMIT
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2 and shards == sorted(set(index["weight_map"].values()))
    assert index["metadata"]["total_size"] == report["bytes"]


def test_a_base_stored_in_nf4(llama, tmp_path):
    base = tmp_path / "base"
    nf4 = load_nf4_base(str(llama), device=torch.device("cpu"), compute_dtype=torch.float32)
    nf4.save_pretrained(base)
    AutoTokenizer.from_pretrained(llama).save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter")
    report = merged(adapter, tmp_path / "exact", dtype="float32")
    assert set(report["strategies"]) == {"dequantized", "nf4"}
    torch.testing.assert_close(loaded_logits(tmp_path / "exact"), trained_logits(adapter), rtol=0, atol=1e-5)
    assert "quantization_config" not in json.loads((tmp_path / "exact/config.json").read_text())
    with pytest.raises(UserInputError, match="original weights are not known"):
        merged(adapter, tmp_path / "out", strategy="original")


def test_a_merge_that_rounding_spoils_is_not_presented_as_done(llama, tmp_path):
    """A head of large weights: bfloat16's rounding moves its logits by nats, float32 mends it."""
    base = shutil.copytree(llama, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] * 300
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    adapter = make_adapter(base, tmp_path / "adapter")
    before = contents(tmp_path)
    with pytest.raises(RunFailed, match=r"out\.failed. Try --dtype float16"):
        merged(adapter, tmp_path / "out", dtype="bfloat16")
    assert not (tmp_path / "out").exists()
    assert json.loads((tmp_path / "out.failed/merge_report.json").read_text())["status"] == "failed"
    with pytest.raises(RunFailed):  # again, over the failed one
        merged(adapter, tmp_path / "out", dtype="bfloat16")
    assert {path.split("/")[0] for path in contents(tmp_path).keys() - before.keys()} == {"out.failed"}
    assert merged(adapter, tmp_path / "out", dtype="float32")["status"] == "done"
    weights["lm_head.weight"] = weights["lm_head.weight"] * 1e6
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserInputError, match=r"--dtype: lm_head.weight holds .* 65504"):
        merged(adapter, tmp_path / "other", dtype="float16")
    assert not (tmp_path / "other").exists() and not (tmp_path / ".other.part").exists()


def test_an_interrupted_merge_leaves_nothing(llama_adapter, tmp_path):
    def interrupt(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merged(llama_adapter, tmp_path / "out", say=interrupt)
    assert contents(tmp_path) == {}
    (tmp_path / ".out.part").mkdir()  # as a killed one leaves it
    (tmp_path / ".out.part/shard-0.part").write_bytes(b"half")
    merged(llama_adapter, tmp_path / "out", rows=None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").glob("*.part")) and not (tmp_path / "out/.run.lock").exists()


def test_what_cannot_be_merged_is_refused(llama, architecture_dir, llama_adapter, tmp_path):
    def message(adapter, **options):
        with pytest.raises(UserInputError) as caught:
            merged(adapter, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    changed = shutil.copytree(llama_adapter, tmp_path / "changed")
    config = json.loads((changed / "adapter_config.json").read_text())

    def with_config(**changes):
        (changed / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        return changed

    assert "use_dora" in message(with_config(use_dora=True))
    assert "init_lora_weights=pissa" in message(with_config(init_lora_weights="pissa"))
    assert "bias=all" in message(with_config(bias="all"))
    phi = str(architecture_dir("phi"))
    assert "does not fit the base" in message(with_config(base_model_name_or_path=phi))
    assert "no folder at" in message(with_config(base_model_name_or_path="/none/such"))
    assert "--dtype" in message(llama_adapter, dtype="int8")
    assert "--strategy" in message(llama_adapter, strategy="best")
    tied = make_adapter(
        architecture_dir("llama-tied"), tmp_path / "tied", target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    assert "lm_head.weight" in message(tied) and "shared" in message(tied)
    incomplete = shutil.copytree(llama, tmp_path / "incomplete")
    weights = load_file(incomplete / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, incomplete / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight" in message(with_config(base_model_name_or_path=str(incomplete)))
    (incomplete / "model.safetensors").unlink()
    assert "safetensors" in message(with_config(base_model_name_or_path=str(incomplete)))
