"""What a training step moves, launches, keeps and waits for does not rise; and the counter counts what is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from benchmarks.step_counter import recorded
from benchmarks.step_counter.arms import FAMILIES, VOCABULARY, Arm, block, count
from benchmarks.step_counter.counter import ATTENTION, BASE, OTHER, StepCounter
from benchmarks.step_counter.page import text
from qlora_neft.fit.activations import Way, block_bytes
from qlora_neft.fit.geometry import geometry_of
from qlora_neft.fused import ops

ROOT = Path(__file__).parents[2]
RUN_AGAIN = "if the rise is meant: python -m benchmarks.step_counter --record"
QUICK = ("llama", "llama, as on CUDA", "gpt_neox, as on CUDA")  # the others with `make test-slow`


@pytest.fixture(scope="module")
def committed():
    """The committed counts, if they were made with the libraries that are installed here."""
    if recorded.recorded_with() != recorded.installed():
        pytest.skip(f"the counts were made with {recorded.recorded_with()}")
    return recorded.recorded()


def test_every_arm_has_committed_counts(committed):
    assert list(committed) == list(recorded.ARMS)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in recorded.ARMS]
)
def test_no_count_rises(committed, name):
    risen = recorded.rises(committed[name], recorded.rounded(count(recorded.ARMS[name])))
    assert not risen, "\n".join([f"{name}: a training step costs more than before", *risen, RUN_AGAIN])


def test_a_rise_is_named_with_both_values(committed):
    before = committed["llama"]
    now = {**before, "kept": before["kept"] + 100, "launches": {**before["launches"], OTHER: 0}}
    [line] = recorded.rises(before, now)
    assert line == (
        f"kept for the backward pass: {before['kept']:g} -> {before['kept'] + 100:g} bytes a token and layer (+100)"
    )
    now["launches"][OTHER] = before["launches"][OTHER] + 2
    assert [line.split(":")[0] for line in recorded.rises(before, now)] == [
        "launches a layer",
        "kept for the backward pass",
    ]


def test_the_page_of_the_counts_is_up_to_date():
    page = ROOT / "docs" / "results" / "step_counts.md"
    assert page.read_text(encoding="utf-8") == text(), "run: python -m benchmarks.step_counter.page"


# ---- The planner's terms ----

BY_MODULES = {"fused_lora": False, "fused_norms": False, "fused_rotary": False}


@pytest.mark.parametrize(
    ("arm", "way"),
    [
        (Arm("llama", as_on_cuda=True), Way()),
        (Arm("llama", r=2, dropout=0.0, arguments=BY_MODULES), Way(False, False, dropout=False)),
        (Arm("gpt_neox", as_on_cuda=True), Way()),
        (Arm("llama", precision="fp32", arguments={"fused_lora": False}), Way(fused_lora=False, half=False)),
        *(
            pytest.param(Arm(family, as_on_cuda=True), Way(), marks=pytest.mark.slow)
            for family in ("mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "opt")
        ),
        *(
            pytest.param(Arm(family, precision="fp32"), Way(half=False), marks=pytest.mark.slow)
            for family in ("llama", "qwen3", "gpt_neox")
        ),
    ],
    ids=lambda value: value.family if isinstance(value, Arm) else "",
)
def test_the_planner_says_what_a_block_keeps_and_needs_within_3_percent(arm, way):
    length = 41
    name, keys = FAMILIES[arm.family]
    config = getattr(transformers, name)(num_hidden_layers=1, vocab_size=VOCABULARY, **keys)
    planned = block_bytes(geometry_of(config.to_dict()), arm.r, length, way)
    counted = block(arm, length)
    assert planned.kept == pytest.approx(counted[0], rel=0.03)
    near = 0.03 if way.fused_norms else 0.06  # what norms by modules take for a moment is not in the terms
    assert (planned.peak, planned.checkpointed_peak) == pytest.approx(counted[1:], rel=near)


# ---- The counter ----


def counted(function, model=None, lengths=(), **options):
    """The counter after a call."""
    counter = StepCounter(model or nn.Module(), lengths, **options)
    with counter:
        function(counter)
    return counter


def test_operations_are_bytes_read_and_written_and_views_are_free():
    x, y = torch.ones(7, 3), torch.ones(7, 3, dtype=torch.bfloat16)

    def step(counter):
        counter.on_device([x, y])
        x.view(3, 7).t()[1:]  # views
        (x + y).mul_(2)  # 84 + 42 read, 84 written; 84 read, 84 written
        x.zero_()  # 84 written
        torch.empty(100)

    counter = counted(step)
    assert (counter.bytes[OTHER], counter.launches[OTHER]) == (84 + 42 + 84 + 84 + 84 + 84, 3)


def test_an_expanded_tensor_is_read_once_and_one_from_numpy_is_written_once():
    x, row = torch.ones(7, 3), torch.ones(1, 3)

    def step(counter):
        counter.on_device([x, row])
        x + row.expand(7, 3)  # 84 + 12 read, 84 written
        x + torch.from_numpy(np.ones((7, 3), np.float32))  # 84 written before, 84 + 84 read, 84 written

    counter = counted(step)
    assert (counter.bytes[OTHER], counter.launches[OTHER]) == (84 + 12 + 84 + 84 + 84 + 84 + 84, 3)


def test_what_autograd_keeps_is_counted_once_and_by_its_storage():
    linear = nn.Linear(3, 5)
    x = torch.ones(7, 3, requires_grad=True)

    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            ctx.mine = [a * 2]  # 140 bytes, on the context
            return a.exp()

        @staticmethod
        def backward(ctx, grad):
            return grad

    def step(counter):
        counter.on_device(x)
        y = linear(x)  # keeps x, 84 bytes, and its own weight
        loss = (y[:1].sin() + y[1:2].cos() + Keeps.apply(y).sum()).sum()  # y by two views: all of its 140 bytes
        counter.keep_contexts(loss)
        loss.backward()

    assert counted(step, linear).kept == 84 + 140 + 140


def test_products_with_frozen_weights_and_attention_stand_apart():
    linear = nn.Linear(4, 4, bias=False).requires_grad_(False)
    x = torch.ones(1, 2, 7, 4)

    def step(counter):
        counter.on_device(x)
        linear(x)
        scores = x @ x.transpose(-1, -2)  # (1, 2, 7, 7)
        scores.softmax(-1)
        x.mul(2)

    counter = counted(step, linear, lengths=(7,))
    assert counter.launches[BASE] == 1 and counter.launches[OTHER] == 1 and counter.launches[ATTENTION] >= 2


def test_waits_are_counted_for_tensors_of_the_device_alone():
    x = torch.arange(6.0)

    def step(counter):
        torch.ones(3).sum().item()  # of the host
        counter.on_device(x)
        x.sum().item()
        x[x > 2]
        x.tolist()
        bool(x[0] > 1)

    counter = counted(step)
    assert sum(counter.waits.values()) == 4 and counter.waits["tolist"] == 1
    assert counter.waits["index of a mask"] == 1 and counter.waits["_local_scalar_dense"] == 2


def test_a_function_of_the_fast_path_is_one_launch_as_on_cuda_and_what_it_runs_otherwise():
    gate, up = torch.ones(7, 3), torch.ones(7, 3)

    def step(counter):
        counter.on_device([gate, up])
        ops.gated(gate, up, ops.ACTIVATIONS["silu"])

    on_cuda = counted(step, as_on_cuda=True)
    assert (on_cuda.bytes[OTHER], on_cuda.launches[OTHER]) == (3 * 84, 1) and ops.observer is None
    here = counted(step)
    assert (here.bytes[OTHER], here.launches[OTHER]) == (2 * 84 + 3 * 84, 2)


def test_counts_do_not_depend_on_the_lengths_they_are_taken_at(committed):
    elsewhere, usual = recorded.rounded(count(Arm("qwen2"), (11, 13))), committed["qwen2"]
    assert (elsewhere["launches"], elsewhere["kept"]) == (usual["launches"], usual["kept"])
    assert elsewhere["bytes"] == pytest.approx(usual["bytes"], rel=0.01)
