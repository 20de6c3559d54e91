"""Liger's pieces, the switches of the fast path, and what they say where something is not there."""

import inspect

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from qlora_neft.errors import UserInputError
from qlora_neft.fused import liger
from qlora_neft.fused.norm import FewPassNorm
from qlora_neft.fused.pieces import Pieces, Switches, compiled_blocks
from qlora_neft.fused.rotary import FusedAttention

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def llama():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model("llama", vocab_size=64, num_hidden_layers=2, head_dim=16, **sizes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def test_without_cuda_liger_is_left_out_and_insisting_is_an_error():
    assert "CUDA" in liger.why_not_liger(CPU, "llama")
    assert liger.check_liger(CPU, "llama", None)
    with pytest.raises(UserInputError, match=r"use_liger_kernel: .*CUDA.*got true. Use auto."):
        liger.check_liger(CPU, "llama", True)


def test_liger_that_is_not_installed_or_does_not_know_a_family_is_named(monkeypatch):
    pytest.importorskip("liger_kernel")
    assert liger.why_not_liger(GPU, "llama") == ""
    assert "no kernels for mpt" in liger.why_not_liger(GPU, "mpt")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserInputError, match=r"liger_kernel is not installed \(pip install .*fast"):
        liger.check_liger(GPU, "llama", True)


@pytest.mark.parametrize("own", [True, False])
def test_liger_replaces_only_what_nothing_here_covers(own):
    families = pytest.importorskip("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    for model_type, function in families.items():
        pieces = liger.pieces_of(model_type, own_rotary=own, own_norms=own, own_mlps=own, has_experts=False)
        switches = {n for n, p in inspect.signature(function).parameters.items() if isinstance(p.default, bool)}
        assert set(pieces) == switches
        allowed = set() if own else {"rope", "rms_norm", "swiglu", "geglu", "relu_squared"}
        # Never a loss: TRL's fused head is the one that knows the whole step's tokens.
        assert {name for name, on in pieces.items() if on} <= allowed
        assert pieces.get("rope", not own) is not own
    experts = liger.pieces_of("mixtral", own_rotary=True, own_norms=False, own_mlps=False, has_experts=True)
    assert experts["rms_norm"] and not experts["swiglu"]


def test_liger_is_there_for_training_only(llama):
    functions = pytest.importorskip("liger_kernel.transformers.rope")
    before, norm = dict(vars(modeling_llama)), llama.model.layers[0].input_layernorm
    attributes = set(vars(norm))
    pieces = liger.pieces_of("llama", own_rotary=False, own_norms=False, own_mlps=False, has_experts=False)
    with liger.liger_applied(llama, pieces, None) as line:
        assert line == "Liger: rope, rms_norm, swiglu"
        assert modeling_llama.apply_rotary_pos_emb is functions.liger_rotary_pos_emb
        assert "Liger" in norm.forward.__func__.__qualname__
        norm.own_note = "set while training"
    assert dict(vars(modeling_llama)) == before
    assert set(vars(norm)) - attributes == {"own_note"}
    assert llama(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_pieces_that_change_a_models_hidden_states_are_taken_back(llama, monkeypatch):
    original = modeling_llama.apply_rotary_pos_emb

    def apply(model, rope):
        modeling_llama.apply_rotary_pos_emb = lambda q, k, *rest: (1000 * q.roll(1, -2), k)

    monkeypatch.setattr(liger, "_families", lambda: {"llama": apply})
    with liger.liger_applied(llama, {"rope": True}, torch.no_grad) as line:
        assert "not used, rope gave other hidden states" in line
        assert modeling_llama.apply_rotary_pos_emb is original


def test_what_was_on_is_recorded(llama):
    pieces = Pieces(llama, CPU, Switches())
    record = pieces.record()
    assert (
        record["fused_norms"] == 5
        and record["fused_rotary"] == 2
        and not record["triton_kernels"]
        and record["liger"] == []
    )
    with pieces.in_use() as lines:
        assert lines == []
    with Pieces(llama, CPU, Switches(compiled=True)).in_use() as lines:
        assert len(lines) == 1 and "compiled" in lines[0]
    pieces.uninstall()
    assert not any(isinstance(module, (FewPassNorm, FusedAttention)) for module in llama.modules())
    record = Pieces(llama, CPU, Switches(norms=False, rotary=False)).record()
    assert record["fused_norms"] == record["fused_rotary"] == 0


def recomputed(function, *args):
    return checkpoint(function, *args, use_reentrant=False)


def test_upstreams_switch_of_ligers_name_is_never_on(tmp_path):
    from qlora_neft.trainer.config import QLoRANeftConfig
    from qlora_neft.trainer.trainer import _step_arguments

    asked = QLoRANeftConfig(str(tmp_path), use_cpu=True, use_liger_kernel=True)
    assert asked.use_liger_kernel and _step_arguments(asked).use_liger_kernel is False


def test_compiled_blocks_compute_the_same_and_keep_their_names(llama):
    ids, names = torch.arange(1, 12)[None], [name for name, _ in llama.named_parameters()]
    llama.train()
    for block in llama.model.layers:
        block.gradient_checkpointing, block._gradient_checkpointing_func = True, recomputed
    plain = llama(ids).logits
    graphs = []

    def backend(graph, inputs):  # TorchDynamo alone: no compiler is needed, and none is tested
        graphs.append(graph)
        return graph

    with compiled_blocks(llama, backend=backend):
        compiled = llama(ids).logits
        compiled.sum().backward()
        assert [name for name, _ in llama.named_parameters()] == names
    assert graphs
    torch.testing.assert_close(compiled, plain)
    count = len(graphs)
    llama(ids)
    assert len(graphs) == count and all(block._compiled_call_impl is None for block in llama.model.layers)
