"""Family `optim` on a GPU: the CPU's bits, for every case; and what only a GPU has: streams, graphs, launches."""

import copy
import itertools

import pytest
import slkernels
import torch
from optim_data import CODECS, FLOATS, PAIRS, random_tensor
from slkernels.optim import clip_coef, grad_norm_sq
from test_optim import MOMENTUM, OPS, RULES, SIZES, Problem

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and slkernels.build_info()["cuda"]), reason="no GPU, or no CUDA kernels"
    ),
]
DEVICE = "cuda"
MIXED = [True, False] * 6 + [True]


def moved(problem: Problem, device: str = DEVICE) -> Problem:
    """A copy on a device, states in fresh allocations."""
    other = copy.copy(problem)
    for name in ("params", "grads", "master_lo"):
        setattr(other, name, [t.to(device, copy=True) for t in getattr(problem, name)])
    other.states = {k: tuple([t.to(device, copy=True) for t in part] for part in s) for k, s in problem.states.items()}
    for name in ("step", "lr", "beta3", "alpha"):
        setattr(other, name, getattr(problem, name).to(device, copy=True))
    return other


def assert_same(got: Problem, want: Problem) -> None:
    """The same bits, but that a NaN is a NaN."""
    for a, b in zip(got.tensors(), want.tensors(), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)


def check(problem: Problem, **options) -> None:
    """One step on either device."""
    there = moved(problem)
    there.run(**{k: o.to(DEVICE) if isinstance(o, torch.Tensor) else o for k, o in options.items()})
    assert_same(there, problem.run(**options))


# ---- the CPU's bits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("block", [16, 48, 256, 4096])
@pytest.mark.parametrize("codec", CODECS)
def test_quantize_block(codec, block, stochastic, dtype):
    x = random_tensor(5 * 4096 + 77, seed=3, decades=9.0)
    x[:block] = 0
    x[block + 3], x[2 * block + 5] = float("nan"), float("-inf")
    x[3 * block : 4 * block] *= 1e-37
    x = x.to(dtype)
    more = {"round_mode": 1, "rng": torch.tensor([2**40 + 5, 9])} if stochastic else {}
    codes, scale = slkernels.quantize_block(x, codec, block, **more)
    there = {k: o.to(DEVICE) if isinstance(o, torch.Tensor) else o for k, o in more.items()}
    got, got_scale = slkernels.quantize_block(x.to(DEVICE), codec, block, **there)
    assert torch.equal(got.cpu(), codes)
    torch.testing.assert_close(got_scale.cpu(), scale, rtol=0, atol=0, equal_nan=True)
    for out_dtype in FLOATS:
        want = slkernels.dequantize_block(codes, scale, codec, block, out_dtype, numel=x.numel())
        back = slkernels.dequantize_block(got, got_scale, codec, block, out_dtype, numel=x.numel())
        torch.testing.assert_close(back.cpu(), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("codec", PAIRS)
@pytest.mark.parametrize("op", OPS)
def test_every_rule_and_codec(op, codec, dtype):
    check(Problem(SIZES, dtype, op=op, codec=codec, quantized=MIXED))


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.0},
        {"decoupled": False},
        {"eps": 0.0},
        {"eps": 1e-3, "beta1": 0.0},
        {"grad_scale": torch.tensor(8.0)},
        {"grad_scale": torch.tensor(1e30)},
        {"grad_scale": torch.tensor(1e-14)},
        {"found_inf": torch.ones(1)},
        {"found_inf": torch.zeros(1)},
    ],
    ids=str,
)
def test_adam_options(options):
    for dtype in FLOATS:
        check(Problem(SIZES, dtype, quantized=MIXED), **options)


@pytest.mark.parametrize("block", [16, 48, 272, 1024, 4096])
@pytest.mark.parametrize("op", OPS)
def test_other_block_sizes(op, block):
    check(Problem([1, 4095, 4096, 9000], torch.bfloat16, op=op, block=block))


@pytest.mark.parametrize("master", [torch.int8, torch.int16])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_master_weights(op, stochastic, master):
    rounding = {"round_mode": 1, "rng": torch.tensor([2**40 + 12345, 7])} if stochastic else {}
    check(Problem(SIZES, torch.bfloat16, op=op, master=master), **rounding)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", OPS)
def test_stochastic_rounding(op, dtype):
    check(Problem(SIZES, dtype, op=op), round_mode=1, rng=torch.tensor([2**40 + 12345, 7]))


@pytest.mark.parametrize("out_dtype", [None, torch.float32])
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_direction(found_inf, out_dtype):
    problem = Problem(SIZES, torch.bfloat16, quantized=MIXED)
    there = moved(problem)
    outs = []
    for p in (problem, there):
        device = p.grads[0].device
        out = [torch.full_like(g, 7.0, dtype=out_dtype) for g in p.grads]
        states = [part for s in p.states.values() for part in s]
        hyper = {k: v for k, v in p.options.items() if k != "weight_decay"}
        found = torch.tensor([found_inf], device=device)
        slkernels.adam_q_dir_(p.grads, *states, out, p.step, found_inf=found, **hyper)
        outs.append(out)
    assert_same(there, problem)
    for want, got in zip(*outs, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0)


@pytest.mark.parametrize("op", OPS)
def test_bad_gradients_are_kept_out_and_counted(op):
    problem = Problem([1000, 5000], op=op, quantized=[True, False])
    for g in problem.grads:
        g[300], g[7], g[999] = float("nan"), float("-inf"), 1e25
    counters = [torch.full((1,), 5, dtype=torch.int64) for _ in range(2)]
    counters[1] = counters[1].to(DEVICE)
    there = moved(problem)
    problem.run(nonfinite=counters[0])
    there.run(nonfinite=counters[1])
    assert_same(there, problem)
    assert counters[0].item() == counters[1].item() > 5


def test_strided_offset_and_many_tensors():
    """Gradients that are copied, pointers that no vector fits, and more tensors than fit a kernel's arguments."""
    problem = Problem([5000])
    problem.grads[0] = torch.stack([problem.grads[0], problem.grads[0]], 1)[:, 0]
    there = moved(problem)
    there.grads[0] = torch.stack([there.grads[0], there.grads[0]], 1)[:, 0]
    there.run()
    assert_same(there, problem.run())

    problem = Problem([1000], torch.bfloat16)
    there = moved(problem)
    for tensors in (there.params, there.grads, there.m, there.v):
        room = tensors[0].new_empty(tensors[0].numel() + 1)
        tensors[0] = room[1:].copy_(tensors[0])
    there.run()
    assert_same(there, problem.run())

    check(Problem([1 + i % 500 for i in range(2000)], torch.bfloat16))


def test_norm_and_clip():
    sizes = [1, 0, 15, 63, 64, 65, 16384, 16385, 100_003]
    for dtype in FLOATS:
        grads = [random_tensor(n, seed=i, decades=3.0).to(dtype) for i, n in enumerate(sizes)]
        want = grad_norm_sq(grads)
        got = grad_norm_sq([g.to(DEVICE) for g in grads])
        assert got.cpu().item() == want.item()
        assert clip_coef(got, 0.5).cpu().item() == clip_coef(want, 0.5).item()


# ---- streams, graphs, launches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_current_stream_is_used(op):
    """A step on a side stream waits for what that stream does to its gradients, and for nothing else."""
    problem = Problem([100_000, 300], op=op)
    there = moved(problem)
    late, there.grads = there.grads, [torch.zeros_like(g) for g in there.grads]
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for g, value in zip(there.grads, late, strict=True):
            g.copy_(value)
        there.run()
    side.synchronize()
    assert_same(there, problem.run())


@pytest.mark.parametrize("op", OPS)
def test_graph_replay_reads_step_and_lr(op):
    """Nothing that changes from step to step is baked into a captured step."""
    problem = Problem([100_000, 300], torch.bfloat16, op=op)
    there = moved(problem)
    scale, found = torch.ones(1), torch.zeros(1)
    there_scale, there_found = scale.to(DEVICE), found.to(DEVICE)
    moved(problem).run(grad_scale=there_scale, found_inf=there_found)  # loads what capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        there.run(grad_scale=there_scale, found_inf=there_found)
    assert_same(there, problem)  # capturing ran nothing
    for step, lr, by, inf in ((1, 1e-2, 1, 0), (2, 3e-3, 2, 0), (3, 1e-3, 1, 1), (3, 1e-3, 4, 0), (1000, 1e-4, 1, 0)):
        for p, s, f in ((problem, scale, found), (there, there_scale, there_found)):
            p.step.fill_(step)
            p.lr.fill_(lr)
            s.fill_(by)
            f.fill_(inf)
        graph.replay()
        problem.run(grad_scale=scale, found_inf=found)
        assert_same(there, problem)


def test_clipping_in_a_graph():
    grads = [random_tensor(n, seed=n).to(DEVICE) for n in (100_000, 3, 16385)]
    graph = torch.cuda.CUDAGraph()
    clip_coef(grad_norm_sq(grads), 1.0)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        divisor = clip_coef(grad_norm_sq(grads), 1.0)
    for factor in (1.0, 10.0, 1e-6):
        for g in grads:
            g.mul_(factor)
        graph.replay()
        assert divisor.item() == clip_coef(grad_norm_sq([g.cpu() for g in grads]), 1.0).item()


def kernels_of(call) -> list[str]:
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if "slk::cuda" in e.name]


def test_one_launch_for_all_tensors_of_a_large_model():
    there = moved(Problem([256 * (1 + i % 5) for i in range(739)], torch.bfloat16))
    assert len(kernels_of(there.run)) == 1


@pytest.mark.parametrize("op", ["adam", "ademamix"])
def test_no_host_synchronization(op):
    there = moved(Problem([5000, 300], op=op, quantized=[True, False]))
    there.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        there.run()
        clip_coef(grad_norm_sq(there.grads), 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["params", "grads", "step", "lr"])
def test_tensors_on_several_devices_are_refused(name):
    there = moved(Problem([600]))
    value = getattr(there, name)
    setattr(there, name, [t.cpu() for t in value] if isinstance(value, list) else value.cpu())
    with pytest.raises(RuntimeError, match=r"slkernels::adam_q_: .*device"):
        there.run()


@pytest.mark.parametrize("rule", RULES)
def test_large_tensor(rule):
    """Several tiles for every warp of the device."""
    problem = Problem([3_000_001], torch.bfloat16, op=rule)
    assert problem.options["beta2"] == MOMENTUM["beta2"]
    check(problem)


def test_large_adam():
    check(Problem(list(itertools.chain([9_000_001], [4096] * 50)), torch.bfloat16))
