"""RMSNorm in few passes: transformers' own norms, recognized by what they compute, equal to rounding."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.bamba.modeling_bamba import BambaRMSNormGated
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nanochat.modeling_nanochat import NanoChatRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from qlora_neft.fused.norm import FewPassNorm, install_norms, uninstall_norms

NORMS = {
    "llama": lambda: LlamaRMSNorm(48, eps=1e-5),
    "weight times a float32 norm": lambda: Olmo2RMSNorm(48),
    "one plus its weight": lambda: Gemma3RMSNorm(48),
    "gemma4": lambda: Gemma4RMSNorm(48),
    "without a weight": lambda: NanoChatRMSNorm(),
    "without a weight by a flag": lambda: Gemma4RMSNorm(48, with_scale=False),
}

ROUNDED_ALIKE = ("llama", "without a weight", "without a weight by a flag")


def frozen(make, dtype=torch.float32):
    """A norm as a training base has it: a weight that is not all ones, and frozen."""
    torch.manual_seed(0)
    norm = make()
    if getattr(norm, "weight", None) is not None:
        norm.weight = nn.Parameter(norm.weight + 0.3 * torch.randn(48), requires_grad=False)
    return norm.to(dtype)


def forward_and_gradient(norm, x, grad):
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(grad)
    return y.detach(), x.grad


def inputs(dtype=torch.float32):
    x = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(1))
    # A row of tiny numbers, where epsilon decides, and one of zeros, where nothing else is left.
    x[0, 0] *= 1e-4
    x[1, 1] = 0
    return x.to(dtype), torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_and_its_gradient_are_upstreams(kind):
    norm, (x, grad) = frozen(NORMS[kind]), inputs()
    expected = forward_and_gradient(norm, x, grad)
    box = nn.Sequential(norm)

    assert install_norms(box) == 1 and isinstance(norm, FewPassNorm)
    for found, wanted in zip(forward_and_gradient(norm, x, grad), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6)
        assert not torch.equal(found, torch.zeros_like(found))


@pytest.mark.parametrize("kind", NORMS)
def test_in_bf16_it_is_as_close_to_float64_as_upstreams(kind):
    norm, (x, grad) = frozen(NORMS[kind], torch.bfloat16), inputs(torch.bfloat16)
    reference = frozen(NORMS[kind])
    if getattr(norm, "weight", None) is not None:
        reference.weight.data = norm.weight.data.double()
    # Upstream computes in float32 whatever it is given; exact enough to tell two bf16 results apart.
    exact = forward_and_gradient(reference, x.double(), grad.double())
    upstream = forward_and_gradient(norm, x, grad)
    install_norms(nn.Sequential(norm))
    ours = forward_and_gradient(norm, x, grad)

    for found, theirs, wanted in zip(ours, upstream, exact, strict=True):
        assert found.dtype == torch.bfloat16
        # Most families round as often as these operations; some round once: twice their error at most.
        bound = 1.1 if kind in ROUNDED_ALIKE else 2.0
        assert (found - wanted).norm() <= bound * (theirs - wanted).norm()


def test_strided_rows_and_recomputation_change_nothing():
    norm, (x, grad) = frozen(NORMS["llama"]), inputs()
    wide = torch.cat((x, x), dim=-1)[..., :48]  # rows are not next to each other
    install_norms(nn.Sequential(norm))
    plain = forward_and_gradient(norm, x, grad)
    leaf = wide.detach().requires_grad_()
    checkpoint(norm, leaf, use_reentrant=False).backward(grad.expand(3, 5, 48))
    assert torch.equal(leaf.grad, plain[1])


def test_a_weight_that_trains_or_has_another_dtype_takes_upstreams_path():
    norm, (x, _) = frozen(NORMS["llama"]), inputs()
    install_norms(nn.Sequential(norm))
    norm.weight.requires_grad_()
    norm(x).sum().backward()
    assert norm.weight.grad is not None
    # Llama's own rule: a float32 weight makes a float32 result.
    norm.weight.requires_grad_(False)
    assert norm(x.bfloat16()).dtype == torch.float32


def test_in_evaluation_it_is_upstreams_bit_for_bit():
    norm, (x, _) = frozen(NORMS["llama"]), inputs()
    expected = norm(x)
    install_norms(nn.Sequential(norm))
    assert torch.equal(norm.eval()(x), expected)


def test_what_is_not_an_rms_norm_is_left_alone():
    class ScaledRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states) * 1.001

    others = nn.ModuleList([nn.RMSNorm(48), nn.LayerNorm(48), BambaRMSNormGated(48, 16), ScaledRMSNorm(48)])
    classes = [type(module) for module in others]
    assert install_norms(others) == 0
    assert [type(module) for module in others] == classes


def test_what_was_installed_is_taken_back():
    box = nn.ModuleList([LlamaRMSNorm(48), Gemma3RMSNorm(48)])
    assert install_norms(box) == 2 and install_norms(box) == 0
    assert [type(module).__name__ for module in box] == ["LlamaRMSNorm", "Gemma3RMSNorm"]
    assert isinstance(box[0], LlamaRMSNorm)
    uninstall_norms(box)
    assert [type(module) for module in box] == [LlamaRMSNorm, Gemma3RMSNorm]
