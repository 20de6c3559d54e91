"""Triton's kernels: what they compute in its interpreter, that they compile for GPUs, and when they are left out."""

import json
import subprocess
import sys

import pytest
import torch
from forked import TESTS, environment

from qlora_neft.errors import UserInputError
from qlora_neft.fused import ops
from qlora_neft.fused.kernel_check import failures, use_kernels
from qlora_neft.fused.triton_ops import OPERATIONS

CPU, F32 = torch.device("cpu"), torch.float32
pytest.importorskip("triton")


def test_in_the_interpreter_kernels_compute_what_the_plain_operations_do(tmp_path):
    command = [sys.executable, str(TESTS / "kernel_worker.py")]
    process = subprocess.run(
        command, env=environment(TRITON_INTERPRET="1"), cwd=tmp_path, text=True, capture_output=True, timeout=280
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    assert result["found"] == [] and result["count"] > 200


FLOATS = "*fp32"
TILE = {"BLOCK": 1024}
NORM = {"WEIGHTED": True, "OFFSET": 1.0, "ROWS": 1, "BLOCK": 4096}
# Pointers by dtype, integers as i32 or i64, and constants: as `triton_ops` passes them.
DROPPED = ["x", "out", "positions:*i32", "keys:*i64", "seed:i64", "module:i32", "threshold:i32"]
SIGNATURES = {
    "dropped": (DROPPED, {"ADD": True, "GROUPS": 128}),
    "gated": (["gate", "up", "out"], {"KIND": "silu", "GATED": True, **TILE}),
    "gated_backward": (
        ["gate", "up", "grad", "out", "grad_gate", "grad_up"],
        {"KIND": "gelu", "GATED": True, **TILE},
    ),
    "dequantize": (
        [
            "packed:*u8",
            "out",
            f"code:{FLOATS}",
            "absmax:*u8",
            f"nested_code:{FLOATS}",
            f"nested_absmax:{FLOATS}",
            f"offset:{FLOATS}",
        ],
        {"BLOCKSIZE": 64, "NESTED_BLOCKSIZE": 256, **TILE},
    ),
    "rms_norm": (["x", "weight", "y", f"rstd:{FLOATS}", "rows:i32", "columns:i32", "eps:fp32"], NORM),
    "rotated": (["q", "k", "q_out", "k_out", "cos", "sin"], {"HALF": 64, "HEADS": 16, "BLOCK": 64, "BACK": True}),
    "rms_norm_backward": (["grad", "x", "weight", f"rstd:{FLOATS}", "dx"], NORM),
}
DISTANCES = {"columns", "num_out", "num_packed", "x_row", "out_row", "gate_row", "up_row", "grad_row", "angle_batch"}
DISTANCES |= {f"{x}_{name}" for x in "qk" for name in ("batch", "token", "head")}


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_kernel_compiles_for_a_gpu_and_moves_eight_numbers_at_a_time(name, tmp_path, monkeypatch):
    # Ahead of time: neither a GPU nor its driver is needed, only what Triton brings along.
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from qlora_neft.fused import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(kernels, f"{name}_kernel")
    given, constants = SIGNATURES[name]
    positions = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    for capability, half in ((75, "*fp16"), (90, "*bf16")):
        types = dict(one.split(":") if ":" in one else (one, half) for one in given)
        signature = {arg: types.get(arg, "constexpr" if arg in constants else "i32") for arg in kernel.arg_names}
        # Pointers and the distances between rows are multiples of 16, as they are for the widths of real models.
        aligned = [i for i, (arg, kind) in enumerate(signature.items()) if kind.startswith("*") or arg in DISTANCES]
        source = ASTSource(kernel, signature, positions, attrs={(i,): [["tt.divisibility", 16]] for i in aligned})
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert "st.global.v4.b32" in compiled.asm["ptx"] and compiled.asm["cubin"]


def test_every_operation_has_a_kernel_or_is_plain_for_a_reason():
    assert set(OPERATIONS) == set(ops.ONE_KERNEL)


def test_without_cuda_the_plain_operations_serve_and_insisting_is_an_error():
    assert "plain operations" in use_kernels(CPU, F32)
    assert "plain operations" in use_kernels(CPU, F32, asked=False)
    with pytest.raises(UserInputError, match=r"use_triton_kernels: .*CUDA.*got true"):
        use_kernels(CPU, F32, asked=True)


def test_a_kernel_that_does_not_run_stays_out_and_is_named(monkeypatch):
    # On a CPU none does: Triton has no driver there. Treated as if it were a GPU, every kernel fails its check.
    monkeypatch.setattr("qlora_neft.fused.kernel_check.why_not", lambda device: "")
    line = use_kernels(CPU, F32)
    assert set(failures(CPU, F32)) == set(OPERATIONS)
    assert all(f"{name}: " in line for name in OPERATIONS)
    x = torch.randn(2, 3)
    assert torch.equal(ops.activated(x, ops.ACTIVATIONS["silu"]), torch.nn.functional.silu(x))
