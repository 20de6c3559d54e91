"""Number formats by capability; GPUs are simulated by what torch would report of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora_neft.base.precision import resolve_precision
from qlora_neft.errors import UserInputError
from qlora_neft.trainer.config import CHECKPOINTING, QLoRANeftConfig

GPUS = {"T4": (7, 5), "A100": (8, 0), "L4": (8, 9), "H100": (9, 0)}


@pytest.fixture
def gpu(monkeypatch):
    """Let torch see one GPU of a name; it always claims bf16, as torch does even of a T4."""

    def see(name):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: GPUS[name])
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)

    return see


@pytest.fixture
def cpu(monkeypatch):
    """A machine without GPU whose CPU has the flags given."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    read_text, exists = Path.read_text, Path.exists

    def has(flags):
        text = f"processor : 0\nflags : fpu {flags} sse\n"
        is_cpuinfo = "/proc/cpuinfo".__eq__
        monkeypatch.setattr(Path, "exists", lambda p, **k: is_cpuinfo(str(p)) or exists(p, **k))
        monkeypatch.setattr(Path, "read_text", lambda p, *a, **k: text if is_cpuinfo(str(p)) else read_text(p, *a, **k))

    has("avx2")
    return has


# ---- Policies ----


def test_a_t4_computes_in_fp16_with_a_scaler_though_torch_claims_bf16(gpu):
    gpu("T4")
    assert torch.cuda.is_bf16_supported()
    policy = resolve_precision()
    assert (policy.compute_dtype, policy.amp, policy.gradient_scaler) == (torch.float16, "fp16", True)
    assert policy.lora_dtype == torch.float32
    assert "7.5 < 8.0" in str(policy) and "gradient scaler" in str(policy)


@pytest.mark.parametrize("name", ["A100", "L4", "H100"])
def test_capability_8_and_above_computes_in_bf16_without_a_scaler(gpu, name):
    gpu(name)
    policy = resolve_precision()
    assert (policy.compute_dtype, policy.amp, policy.gradient_scaler) == (torch.bfloat16, "bf16", False)
    assert policy.lora_dtype == torch.float32
    assert policy.device == torch.device("cuda", 0)
    assert name in str(policy) and "scaler" not in str(policy)


def test_a_cpu_computes_in_fp32(cpu):
    policy = resolve_precision()
    assert (policy.device.type, policy.compute_dtype, policy.amp) == ("cpu", torch.float32, "no")
    assert policy.lora_dtype == torch.float32
    assert str(policy) == ("precision: float32 compute, float32 LoRA on cpu (this CPU has no bf16 matrix units)")


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [("amx_bf16 amx_tile", torch.bfloat16), ("avx512_bf16", torch.float32), ("not_amx_bf16", torch.float32)],
)
def test_only_matrix_units_count_as_bf16_of_a_cpu(cpu, flags, dtype):
    cpu(flags)
    assert resolve_precision().compute_dtype == dtype


def test_the_cpu_may_be_chosen_beside_a_gpu(gpu):
    gpu("H100")
    assert resolve_precision("fp32", "cpu").device.type == "cpu"


@pytest.mark.parametrize(
    ("precision", "dtype", "scaler"),
    [("bf16", torch.bfloat16, False), ("fp16", torch.float16, True), ("fp32", torch.float32, False)],
)
def test_what_is_asked_for_is_what_is_done(gpu, precision, dtype, scaler):
    gpu("A100")
    policy = resolve_precision(precision)
    assert (policy.compute_dtype, policy.gradient_scaler) == (dtype, scaler)
    assert policy.amp == ("no" if precision == "fp32" else precision)
    assert f"precision={precision} was asked for" in policy.reason


def test_the_compute_dtype_may_be_fixed_apart(cpu):
    policy = resolve_precision("auto", "cpu", "bfloat16")
    assert (policy.compute_dtype, policy.amp) == (torch.bfloat16, "no")


# ---- Refusals ----


def refusal(*args):
    with pytest.raises(UserInputError) as caught:
        resolve_precision(*args)
    return str(caught.value)


def test_bf16_on_a_t4_is_refused_with_the_remedy(gpu):
    gpu("T4")
    message = refusal("bf16")
    assert message.startswith("precision: bf16 needs compute capability >= 8.0, T4 has 7.5")
    assert message.endswith("Use auto (fp16 here) or fp16.")


def test_a_bf16_compute_dtype_on_a_t4_is_refused_as_well(gpu):
    gpu("T4")
    assert "bnb_4bit_compute_dtype" in refusal("auto", None, "bfloat16")


def test_fp16_on_a_cpu_is_refused_with_the_remedy(cpu):
    assert refusal("fp16") == "precision: fp16 training needs a CUDA device, this run is on the CPU. Use auto or fp32."


def test_a_device_that_is_not_there_is_refused(cpu):
    assert "cuda was asked for, but torch sees no CUDA device. Run `qlora-neft doctor`." in refusal("auto", "cuda")


def test_an_unknown_precision_is_refused(cpu):
    assert refusal("bfloat16") == "precision: must be one of auto, bf16, fp16, fp32, got 'bfloat16'."


# ---- QLoRANeftConfig ----


def config(tmp_path, **overrides):
    return QLoRANeftConfig(output_dir=str(tmp_path), report_to="none", **overrides)


def test_a_config_on_a_cpu_has_neither_bf16_nor_fp16_nor_checkpointing(cpu, tmp_path):
    args = config(tmp_path, use_cpu=True)
    assert (args.bf16, args.fp16, getattr(args, CHECKPOINTING)) == (False, False, False)
    assert args.compute_dtype == torch.float32


def test_a_config_on_a_cpu_with_matrix_units_has_bf16(cpu, tmp_path):
    cpu("amx_bf16")
    args = config(tmp_path, use_cpu=True)
    assert (args.bf16, args.fp16) == (True, False)
    assert args.compute_dtype == torch.bfloat16


def test_bf16_asked_for_or_declined_is_kept(cpu, tmp_path):
    assert config(tmp_path, use_cpu=True, bf16=True).bf16 is True
    cpu("amx_bf16")
    declined = config(tmp_path, use_cpu=True, bf16=False)
    assert (declined.bf16, declined.compute_dtype) == (False, torch.float32)


def test_fp16_on_a_cpu_is_refused_by_the_config_too(cpu, tmp_path):
    with pytest.raises(UserInputError, match="fp16 training needs a CUDA device"):
        config(tmp_path, use_cpu=True, fp16=True)


def test_blocks_to_checkpoint_switch_checkpointing(cpu, tmp_path):
    for asked, on in (({"checkpointed_blocks": 2}, True), ({"checkpointed_blocks": 0}, False)):
        assert getattr(config(tmp_path, use_cpu=True, **asked), CHECKPOINTING) is on
    assert getattr(config(tmp_path, use_cpu=True, gradient_checkpointing=True), CHECKPOINTING) is True


@pytest.mark.parametrize("alpha", [-1, -1e-9, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["neftune_noise_alpha", "neftune_final_alpha"])
def test_alpha_must_be_finite_and_not_negative(tmp_path, name, alpha):
    other = {"neftune_noise_alpha": 5.0, "neftune_schedule": "linear", "neftune_final_alpha": 0.0}
    with pytest.raises(ValueError, match=rf"^{name}: must be a finite number >= 0, got "):
        config(tmp_path, use_cpu=True, **{**other, name: alpha})


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        (
            {"neftune_distribution": "normal"},
            "neftune_distribution: must be one of uniform, gaussian, bernoulli, got",
        ),
        ({"neftune_schedule": "step"}, "neftune_schedule: must be one of constant, linear, cosine, got 'step'"),
        ({"neftune_final_alpha": 1.0}, "neftune_final_alpha: has no effect under the constant schedule, got 1.0"),
        ({"neftune_schedule": "cosine"}, "neftune_final_alpha: required by neftune_schedule='cosine'"),
        ({"micro_batch_size": 0}, "micro_batch_size: must be at least 1, got 0"),
        ({"max_tokens_per_micro_batch": 0}, "max_tokens_per_micro_batch: must be at least 1, got 0"),
        ({"clean_loss_rows": 0}, "clean_loss_rows: must be at least 1, got 0"),
        ({"clean_loss_steps": -1}, "clean_loss_steps: must be at least 0, got -1"),
        ({"checkpointed_blocks": -1}, "checkpointed_blocks: must be at least 0, got -1"),
        ({"activation_offloading": True}, "activation_offloading: needs a CUDA device to offload from, got True"),
        ({"liger_kernel_config": {"rope": False}}, "liger_kernel_config: has no effect, got {'rope': False}"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, settings, rule):
    with pytest.raises(ValueError) as caught:
        config(tmp_path, use_cpu=True, neftune_noise_alpha=5.0, **settings)
    assert str(caught.value).startswith(rule)


@pytest.mark.parametrize(
    ("settings", "on"),
    [
        ({}, False),
        ({"neftune_noise_alpha": 0}, False),
        ({"neftune_noise_alpha": 5}, True),
        ({"neftune_noise_alpha": 0, "neftune_schedule": "linear", "neftune_final_alpha": 5}, True),
        ({"neftune_noise_alpha": 0, "neftune_schedule": "linear", "neftune_final_alpha": 0}, False),
    ],
)
def test_noise_is_on_if_any_step_adds_some(tmp_path, settings, on):
    assert config(tmp_path, use_cpu=True, **settings).noise_is_on is on
