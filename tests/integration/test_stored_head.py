"""Where a configuration calls a head tied, or says another vocabulary than the files hold, the files decide."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM

from qlora_neft.export.gguf.model import write_model_gguf
from qlora_neft.fit.config import read_config
from qlora_neft.fit.geometry import geometry_of
from qlora_neft.fit.stored import as_stored, stored_tensors_of


def geometry(folder):
    config, origin = read_config(str(folder))
    return as_stored(geometry_of(config), str(folder), stored_tensors_of(str(folder), "main", origin))


@pytest.fixture
def tied(tmp_path):
    """Makes a checkpoint that is called tied and stores a head."""

    def make(own_head, **sizes):
        folder = save_tiny_model(tmp_path / "model", "llama-tied", **sizes)
        weights = load_file(folder / "model.safetensors")
        embedding = weights["model.embed_tokens.weight"]
        weights["lm_head.weight"] = torch.randn_like(embedding) if own_head else embedding.clone()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize("own_head", [True, False])
def test_fit_counts_what_transformers_loads(tied, own_head):
    folder = tied(own_head)
    counted, notes = geometry(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert counted.parameters() == sum(parameter.numel() for parameter in loaded.parameters())
    assert counted.tied is not own_head and bool(notes) is own_head
    config, _ = read_config(str(folder))
    assert (geometry_of(config).parameters() != counted.parameters()) is own_head


def test_another_number_of_rows_counts(tied):
    folder = tied(True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] - 4}))
    counted, notes = geometry(folder)
    assert counted.vocab_size == config["vocab_size"] and "rows of embeddings" in notes[0]
    (folder / "config.json").write_text(json.dumps(config))
    assert counted.parameters() == geometry(folder)[0].parameters()


@pytest.mark.parametrize("own_head", [True, False])
def test_gguf_keeps_a_head_of_its_own(tied, own_head, tmp_path):
    from gguf import GGUFReader

    folder = tied(own_head)
    write_model_gguf(folder, tmp_path / "model.gguf", "f32")
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert ("output.weight" in tensors) == own_head
    if own_head:
        head = load_file(folder / "model.safetensors")["lm_head.weight"]
        assert torch.equal(torch.tensor(tensors["output.weight"]), head)
