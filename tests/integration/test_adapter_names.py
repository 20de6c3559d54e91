"""An adapter that PEFT would load in part, or not at all, is refused with the likely cause."""

import shutil

import pytest
import torch
from command_line import invoke
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import save_tiny_model, tiny_trainer

from qlora_neft.adapter.folder import find_adapter
from qlora_neft.adapter.load import base_of_adapter, load_trained, with_adapter
from qlora_neft.adapter.names import check_names
from qlora_neft.base.precision import resolve_precision
from qlora_neft.errors import UserInputError
from qlora_neft.export.consumers import CONSUMERS, facts_of, verdict_for
from qlora_neft.export.merge.plan import plan_merge

PREFIX = "base_model.model."
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names")
    base = save_tiny_model(folder / "base", num_hidden_layers=4)
    tiny_trainer(base, folder / "run").save_model(str(folder / "adapter"))
    return folder / "adapter"


def changed(whole, folder, change):
    """A copy of the adapter with other tensors in its file."""
    shutil.copytree(whole, folder)
    save_file(change(load_file(whole / FILE)), folder / FILE, metadata={"format": "pt"})
    return folder


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def without(*parts):
    return lambda tensors: {n: t for n, t in tensors.items() if not any(part in n for part in parts)}


def with_rows(rows, *modules):
    return lambda tensors: tensors | {f"{PREFIX}{name}.weight": torch.zeros(rows, 64) for name in modules}


FAULTS = {
    "compiled": (renamed(PREFIX, f"{PREFIX}_orig_mod."), "'_orig_mod' in their names"),
    "compiled outside": (renamed(PREFIX, f"_orig_mod.{PREFIX}"), "'_orig_mod' in their names"),
    "one compiled block": (renamed(".layers.0.", ".layers.0._orig_mod."), "14 of its 56 weights have '_orig_mod'"),
    "data parallel": (renamed(PREFIX, f"module.{PREFIX}"), "'module' in their names"),
    "no prefix": (renamed(PREFIX, ""), "lack 'base_model.model.'"),
    "a state dict": (renamed(".weight", ".default.weight"), "the name of an adapter"),
    "half of the layers": (without(".layers.2.", ".layers.3."), "14 of 28 layers are in its file"),
    "one layer less": (without(".layers.1.mlp.up_proj"), "27 of 28 layers"),
    "a target less": (without("v_proj"), "24 of 28 layers"),
    "no B": (without("layers.3.mlp.up_proj.lora_B"), "only one of the two matrices"),
    "added tokens": (with_rows(262, "model.embed_tokens", "lm_head"), "resized in training.*2 tokens were added"),
    "blocks too many": (
        renamed(".layers.3.", ".layers.7."),
        "no layers.*.self_attn.k_proj in block|no layers.* in block 7",
    ),
    "nothing": (lambda tensors: {}, "holds no weights"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_it_is_refused_from_its_headers(fault, whole, tmp_path):
    change, message = FAULTS[fault]
    folder = find_adapter(changed(whole, tmp_path / "adapter", change))
    for verb in (check_names, plan_merge, load_trained):
        with pytest.raises(UserInputError, match=message):
            verb(folder)
    facts = facts_of(folder)
    assert not any(verdict_for(name, facts).is_usable for name in CONSUMERS)


def test_a_whole_adapter_and_one_with_trained_embeddings_pass(whole, tmp_path):
    check_names(find_adapter(whole))
    check_names(find_adapter(changed(whole, tmp_path / "adapter", with_rows(260, "model.embed_tokens"))))


def test_another_base_is_told(whole, tmp_path):
    other = save_tiny_model(tmp_path / "other", num_hidden_layers=4, intermediate_size=128)
    with pytest.raises(UserInputError, match=r"does not fit the base .* 96 inputs"):
        check_names(find_adapter(whole, base=str(other)))


def test_what_the_headers_cannot_show_the_loaded_model_does(whole, tmp_path):
    """Names of the base are not known before it is loaded if its files lie elsewhere; PEFT would only warn."""
    folder = find_adapter(changed(whole, tmp_path / "adapter", without(".layers.3.")))
    base = base_of_adapter(folder, resolve_precision("fp32", "cpu"))
    with pytest.raises(UserInputError, match="14 weights of the model are not in its file"):
        with_adapter(base, folder)


def test_a_whole_adapter_loads_as_peft_loads_it(whole):
    folder, policy = find_adapter(whole), resolve_precision("fp32", "cpu")
    ours = with_adapter(base_of_adapter(folder, policy), folder)
    theirs = PeftModel.from_pretrained(base_of_adapter(folder, policy), str(whole)).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_check_says_it(whole, tmp_path):
    folder = changed(whole, tmp_path / "adapter", renamed(PREFIX, f"{PREFIX}_orig_mod."))
    code, out, _ = invoke("check", str(folder))
    assert code == 1 and "_orig_mod" in out
