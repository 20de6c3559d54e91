"""The parts of a merge: what is read, what is written, what is measured, and in how much memory."""

import json

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import ARCHITECTURES, mixed_rows
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

from qlora_neft.base.checkpoint import Checkpoint, ShardWriter, skeleton
from qlora_neft.base.nf4 import from_nf4, load_nf4_base, nf4_config, to_nf4
from qlora_neft.errors import UserInputError
from qlora_neft.export.merge.merge import check_space
from qlora_neft.export.merge.plan import quantized_names
from qlora_neft.export.merge.proof import Streamed, distance, reference_of
from qlora_neft.recipe.schema import Quantization

CPU = torch.device("cpu")


def checkpoint(folder):
    return Checkpoint(folder, AutoConfig.from_pretrained(folder), str(folder))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_weight_is_what_loading_makes_of_it(architecture, architecture_dir):
    """Bit for bit, the NF4 ones included; and those are the ones that loading quantizes."""
    base = checkpoint(architecture_dir(architecture))
    loaded = load_nf4_base(str(architecture_dir(architecture)), device=CPU, compute_dtype=torch.float32)
    linear = {f"{name}.weight" for name, module in loaded.named_modules() if isinstance(module, Linear4bit)}
    assert quantized_names(base) == linear and linear
    for name, param in loaded.named_parameters(remove_duplicate=False):
        if name in linear:
            ours = to_nf4(base.weight(name), True)
            assert torch.equal(ours.data, param.data) and torch.equal(from_nf4(ours), from_nf4(param))
        else:
            assert torch.equal(base.weight(name), param)


@pytest.mark.parametrize("double_quant", [True, False])
def test_weights_are_quantized_from_the_dtype_they_are_loaded_in(double_quant, llama, tmp_path):
    """The configuration says bfloat16, the files hold float32."""
    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    options = {"quantization_config": nf4_config(Quantization(bnb_4bit_use_double_quant=double_quant), torch.float32)}
    loaded = load_nf4_base(str(tmp_path), device=CPU, compute_dtype=torch.float32, **options)
    base, name = checkpoint(tmp_path), "model.layers.0.mlp.up_proj.weight"
    assert base.weight(name).dtype == torch.bfloat16
    ours, theirs = to_nf4(base.weight(name), double_quant), loaded.get_parameter(name)
    assert torch.equal(ours.data, theirs.data) and torch.equal(from_nf4(ours), from_nf4(theirs))


def test_a_tied_weight_is_stored_once(architecture_dir):
    base = checkpoint(architecture_dir("llama-tied"))
    assert base.key_of["lm_head.weight"] == "model.embed_tokens.weight"
    assert list(base.parameters()).count("lm_head.weight") == 0
    assert checkpoint(architecture_dir("gpt-neox")).parameters()["lm_head.weight"] == "embed_out.weight"


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "opt", "gemma3", "gpt-neox"])
def test_a_streamed_model_computes_as_a_loaded_one(architecture, keep, architecture_dir):
    folder = architecture_dir(architecture)
    base, ids = checkpoint(folder), torch.tensor([[5, 6, 7, 8]])
    streamed = Streamed(skeleton(AutoConfig.from_pretrained(folder)), base.weight, CPU, keep=keep)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=ids).logits
    for _ in range(2):
        assert torch.equal(streamed(input_ids=ids), expected)
        assert all(param.is_meta != keep for param in streamed.model.parameters())
    streamed.close()
    assert all(param.is_meta for param in streamed.model.parameters())


def test_the_distance_between_two_models():
    """Against torch's own divergence, sequence by sequence and without padding."""
    torch.manual_seed(0)
    table, other = torch.randn(260, 260), torch.randn(260, 260)

    def forward(logits):
        return lambda input_ids, attention_mask: logits[input_ids] + 100 * (1 - attention_mask[..., None])

    rows = [dict(row) for row in mixed_rows(9)]
    reference = reference_of(forward(table), rows, 260, CPU)
    same = distance(forward(table), reference, CPU)
    assert same.kl == 0 and same.top1 == 1 and same.loss == pytest.approx(reference.loss)
    kl = loss = agree = count = 0.0
    for row in rows:
        kept = [i for i, label in enumerate(row["labels"]) if label >= 0 and i > 0]
        before = torch.tensor([row["input_ids"][i - 1] for i in kept])
        p, q = (t[before].double().log_softmax(-1) for t in (table, other))
        kl += torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum").item()
        loss -= sum(q[n, row["labels"][i]].item() for n, i in enumerate(kept))
        agree += (p.argmax(-1) == q.argmax(-1)).sum().item()
        count += len(kept)
    found = distance(forward(other), reference, CPU)
    assert reference.num_tokens == count
    assert (found.kl, found.top1, found.loss) == pytest.approx((kl / count, agree / count, loss / count))


def test_shards_are_no_larger_than_asked_and_indexed(tmp_path):
    weights = {f"w{i}": torch.full((10, 10), float(i)) for i in range(7)}  # 400 bytes each
    writer = ShardWriter(tmp_path, 1000, lambda total: None)
    for key, weight in weights.items():
        writer.add(key, weight)
    writer.add("big", torch.zeros(500))
    writer.close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    assert [len(load_file(tmp_path / name)) for name in files] == [2, 2, 2, 1, 1]
    assert index["metadata"]["total_size"] == writer.total_bytes == 7 * 400 + 2000
    for key, name in index["weight_map"].items():
        with safe_open(tmp_path / name, "pt") as file:
            assert key == "big" or torch.equal(file.get_tensor(key), weights[key])
            assert file.metadata() == {"format": "pt"}


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserInputError, match=r"OUT: the merged model takes .* free"):
        check_space(tmp_path / "out", 10**18)
    assert not list(tmp_path.iterdir())


def test_files_that_are_missing_or_broken_are_named(llama, tmp_path):
    for path in llama.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserInputError, match=r"holds no model.safetensors"):
        checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no such thing")
    with pytest.raises(UserInputError, match="cannot be read"):
        checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserInputError, match="model-00001-of-00001"):
        checkpoint(tmp_path)


def test_experts_that_loading_fuses_are_read_and_split_as_they_are_stored(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 260}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 12}  # 10 comes after 9
    AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **heads)).save_pretrained(tmp_path)
    files = checkpoint(tmp_path)
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    for name in files.stacks:
        assert torch.equal(files.weight(name), loaded[name])
        pieces = dict(files.pieces(name, files.weight(name)))
        assert len(pieces) in (12, 24)
        assert all(torch.equal(piece, files.other(key)) for key, piece in pieces.items())
    assert not files.others()
