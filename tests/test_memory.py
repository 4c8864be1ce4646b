"""bench/memory.py: bytes counted on the meta device are those of real tensors."""

import copy
import gc
import json
from dataclasses import replace

import pytest
import torch
from slkernels.bench import frugal, memory, published
from slkernels.bench.live_bytes import LiveBytes, bytes_inside, distinct_bytes
from slkernels.bench.llama import Llama, LlamaConfig
from slkernels.nn import SLLinear
from torch import nn
from torch.profiler import ProfilerActivity, profile

SMALL = LlamaConfig(64, 176, 4, 5, rank=8, density=0.05, alpha=8, batch=1, accumulate=1, steps=1, vocabulary=500)


# ---- counting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_live_bytes_follow_allocations_and_deletions(device):
    with LiveBytes(device) as counter:
        a = torch.empty(1000, device=device)  # 4000
        b = a + 1  # 8000
        view = b[10:]
        assert (counter.live, counter.peak) == (8000, 8000)
        del a
        assert (counter.live, counter.peak) == (4000, 8000)
        del b
        assert counter.live == 4000  # the view holds it
        counter.restart()
        view.mul_(2)
        assert counter.peak == 4000
        del view
        assert counter.live == 0


def test_distinct_bytes_count_a_storage_once():
    a = torch.empty(10)
    assert distinct_bytes([a, a[2:], a.view(2, 5), torch.empty(3)]) == 52


def test_bytes_inside_an_op_are_those_of_its_temporaries():
    """lowrank keeps z = x A^T; a composed layer builds W."""
    x, A, B = torch.empty(64, 128), torch.empty(16, 128), torch.empty(96, 16)
    inside = bytes_inside(torch.ops.slkernels._lowrank_linear.default, (x, A, B, 1.0), {})
    assert inside >= 0
    crow, col = torch.empty(97, dtype=torch.int32), torch.empty(960, dtype=torch.int16)
    arguments = (x, A, B, torch.empty(960), crow, col, 1.0)
    op = torch.ops.slkernels.sl_linear.default
    composed, chained = (bytes_inside(op, arguments, {"path": path}) for path in ("compose", "chain"))
    assert composed >= 4 * 96 * 128 > chained >= 4 * 64 * 16


@pytest.mark.parametrize("name", memory.RECIPES)
def test_the_meta_device_counts_what_a_real_run_allocates(name):
    """Every number: parameters, indices, gradients to the byte; states and both peaks but for counters."""
    counted, real = (
        memory.measure("small", name, device=device, tokens=(2, 32), config=SMALL) for device in ("meta", "cpu")
    )
    # Counters stay on the CPU, where the real run sees them: some bytes a parameter tensor.
    counters = 48 * 64
    for field in ("states", "steady", "peak"):
        assert 0 <= getattr(real, field) - getattr(counted, field) <= counters, field
    assert replace(counted, states=0, steady=0, peak=0) == replace(real, states=0, steady=0, peak=0)
    assert counted.peak >= counted.parameters + counted.indices + counted.states


def test_the_peak_is_that_of_the_allocator():
    """A whole step as torch's own CPU allocator saw it."""
    recipe = memory.RECIPES["ours-8bit"]
    counted = memory.measure("small", "ours-8bit", tokens=(4, 128), config=SMALL)
    model = memory.build(SMALL, recipe, torch.device("cpu"), torch.bfloat16)
    (optimizer,) = recipe.optimize(model, SMALL)
    tokens = torch.zeros(4, 129, dtype=torch.int64)

    def step():
        model.loss(tokens).backward()
        optimizer.step()
        gc.collect()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    live = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    held = counted.parameters + counted.indices + counted.states
    # What torch's ops allocate inside themselves is not counted.
    assert (counted.peak - held) * 0.98 <= peak <= (counted.peak - held) * 1.15


def test_a_new_subspace_is_in_the_peak():
    row = memory.measure("small", "galore8bit", tokens=(1, 8), config=replace(SMALL, layers=1, vocabulary=16))
    assert row.peak > row.steady


# ---- what is compared -----------------------------------------------------------------------------------------------


def test_the_published_layer_is_ours_with_more_memory():
    torch.manual_seed(0)
    linear = nn.Linear(48, 32, bias=False)
    theirs = published.SpLoRaLinear(linear, 4, 0.1, 8.0)
    nn.init.normal_(theirs.lora_B), nn.init.normal_(theirs.values)
    ours = SLLinear(48, 32, 4, 0.1, 8.0)
    ours.load_state_dict(
        {"lora_A": theirs.lora_A, "lora_B": theirs.lora_B, "sparse_index": theirs.index, "sparse_value": theirs.values}
    )
    x = torch.randn(2, 5, 48)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(i) for layer, i in zip((theirs, ours), inputs, strict=True)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    for y in outputs:
        y.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-3)
    for name in ("lora_B", "values"):
        torch.testing.assert_close(getattr(theirs, name).grad, getattr(ours, name).grad, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(theirs.lora_A.grad, ours.lora_A.grad / 1.0, rtol=1e-4, atol=1e-2)
    assert theirs.index.nbytes == 4 * ours.col.nbytes


def test_the_published_galore_step_is_galore():
    (p,) = (nn.Parameter(torch.randn(40, 24)),)
    optimizer = published.GaLoreAdamW8bit(p, rank=6, gap=2, scale=0.5)
    start = p.detach().clone()
    p.grad = grad = torch.randn(40, 24)
    optimizer.step()
    assert p.shape == start.shape
    P = torch.linalg.svd(grad, full_matrices=False)[2][:6]
    R = grad @ P.t()
    # The first step of Adam is its sign.
    torch.testing.assert_close(p.detach(), start - 1e-3 * 0.5 * (R / (R.abs() + 1e-8)) @ P, rtol=1e-4, atol=1e-6)


def test_a_frugal_model_is_the_same_model():
    torch.manual_seed(0)
    model = Llama(SMALL)
    tokens = torch.randint(500, (2, 33))
    small = copy.deepcopy(model)
    frugal.frugal(small, rows=128, blocks=2)
    losses = [m.loss(tokens) for m in (model, small)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for name in ("embed", "head"):
        whole = getattr(model, name).weight.grad
        parts = torch.cat([part.weight.grad for part in getattr(small, name).parts])
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    pairs = zip(model.layers.parameters(), small.layers.parameters(), strict=True)
    for p, q in pairs:
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-6)


# ---- command line ---------------------------------------------------------------------------------------------------


def test_the_command_line_counts_and_draws(tmp_path, capsys):
    path = tmp_path / "memory.json"
    options = ["--model", "350m", "--recipe", "adam", "--recipe", "sltrain8bit", "--tokens", "1", "16"]
    assert memory.main([*options, "--json", str(path)]) == 0
    assert "8-bit SLTrain per layer" in capsys.readouterr().out
    adam, sltrain = json.loads(path.read_text())["rows"]
    # bfloat16 parameters, gradients and two moments; the parameters and the nonzeros of the paper.
    assert adam["parameters"] == adam["gradients"] == 2 * adam["trained"] == adam["states"] // 2
    assert adam["trained"] == pytest.approx(368.0e6, rel=1e-3)
    assert sltrain["trained"] == pytest.approx(194.3e6, rel=1e-3)
    assert sltrain["indices"] == pytest.approx(8 * 9.07e6, rel=1e-3)
    assert memory.main(["--markdown", str(path)]) == 0
    drawn = capsys.readouterr().out
    assert "| 8-bit SLTrain per layer | 0.39 | 0.07 |" in drawn and "| 2.2 |" in drawn
