"""Family `optim`: the codec and the fused step."""

import copy
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import slkernels
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slkernels.reference import optim as reference

CODECS = ["dyn8", "dyn8u"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
ISAS = slkernels.build_info()["cpu_isas"]


def bits(x):
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def random_tensor(*shape, dtype=torch.float32, seed=0, decades=6.0):
    """Both signs, magnitudes over many decades, some zeros."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g) * 10 ** (-decades * torch.rand(*shape, generator=g))
    return torch.where(torch.rand(*shape, generator=g) < 0.02, 0.0, x).to(dtype)


# ---- the map --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
def test_map_is_bit_equal_to_the_table(codec):
    ours = slkernels.dequantize_block(torch.arange(256, dtype=torch.uint8), torch.ones(1), codec)
    assert same_bits(ours, reference.dynamic_map(codec == "dyn8"))
    assert ours[127 if codec == "dyn8" else 0] == 0 and ours[255] == 1


@pytest.mark.parametrize("codec", CODECS)
def test_map_is_bitsandbytes_map(codec):
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    theirs = functional.create_dynamic_map(signed=codec == "dyn8")
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":  # linspace without FMA
        torch.testing.assert_close(reference.dynamic_map(codec == "dyn8"), theirs, rtol=2e-7, atol=0)
    else:
        assert same_bits(reference.dynamic_map(codec == "dyn8"), theirs)


def near_midpoints(signed, ulps):
    """Every midpoint of the map as the float32 values around it, the values themselves, and random ones."""
    table = reference.dynamic_map(signed).numpy()
    mid = ((table[1:].astype(np.float64) + table[:-1]) / 2).astype(np.float32)
    points, up, down = [mid, table], mid, mid
    for _ in range(ulps):
        up, down = np.nextafter(up, np.float32(2)), np.nextafter(down, np.float32(-2))
        points += [up, down]
    x = torch.from_numpy(np.concatenate(points))
    x = torch.cat([x, random_tensor(20000, seed=1, decades=9.0).clamp(-1, 1)])
    return x if signed else x[x >= 0]


@pytest.mark.parametrize("largest", [1.0, 3.7e-5, 1.9999999, 1.2e20, 3e38, 1.2e-38, 7e-42, 1e-45])
@pytest.mark.parametrize("codec", CODECS)
def test_nearest_is_exact_at_every_midpoint(codec, largest):
    x = near_midpoints(codec == "dyn8", ulps=4)
    x = x[: x.numel() // 15 * 15].view(-1, 15) * largest
    x = torch.cat([torch.full((x.shape[0], 1), largest), x], 1).clamp(-largest, largest)  # scale = largest in each row
    codes, scale = slkernels.quantize_block(x, codec, 16)
    want, want_scale = reference.quantize_block(x, codec, 16)
    assert same_bits(scale, want_scale) and torch.equal(scale, torch.full_like(scale, largest))
    assert torch.equal(codes, want)


@pytest.mark.parametrize("codec", CODECS)
def test_every_code_survives_a_round_trip(codec):
    codes = torch.arange(256, dtype=torch.uint8)
    x = slkernels.dequantize_block(codes, torch.full((1,), 0.37), codec)
    again, _ = slkernels.quantize_block(x, codec)
    assert torch.equal(again, codes)


def test_special_blocks():
    x = random_tensor(5, 64)
    x[1] = 0
    x[2, 3] = float("nan")
    x[3, 5] = float("-inf")
    for codec, zero in (("dyn8", 127), ("dyn8u", 0)):
        y = x if codec == "dyn8" else x.abs()
        codes, scale = slkernels.quantize_block(y, codec, 64)
        assert scale[1] == 0 and (codes[1] == zero).all()
        assert scale[2:4].isnan().all() and (codes[2:4] == zero).all()
        out = slkernels.dequantize_block(codes, scale, codec, 64)
        assert (bits(out[1]) == 0).all() and out[2:4].isnan().all() and out[[0, 4]].isfinite().all()
    codes, scale = slkernels.quantize_block(torch.tensor([-3.0, 0.5]), "dyn8u")
    assert codes.tolist() == [0, 255] and scale.tolist() == [0.5]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 1500),
    block=st.sampled_from([16, 48, 256, 4096]),
    codec=st.sampled_from(CODECS),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**31),
    exponent=st.integers(-40, 30),
)
def test_quantize_matches_reference(n, block, codec, dtype, seed, exponent):
    x = (random_tensor(n, seed=seed, decades=8.0) * 10.0**exponent).to(dtype)
    codes, scale = slkernels.quantize_block(x, codec, block)
    want, want_scale = reference.quantize_block(x, codec, block)
    assert torch.equal(codes, want)
    exactly = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(scale, want_scale, **exactly)
    for out_dtype in FLOATS:
        out = slkernels.dequantize_block(codes, scale, codec, block, out_dtype)
        torch.testing.assert_close(out, reference.dequantize_block(codes, scale, codec, block, out_dtype), **exactly)
    if codec == "dyn8":  # half of the widest step, 0.9 / 64; at the negative end -1 is that far from -0.993
        each = scale.repeat_interleave(block)[:n].double()
        error = (slkernels.dequantize_block(codes, scale, codec, block).double() - x.double()).abs()
        assert (error <= 0.0070315 * each + 2e-45)[each.isfinite()].all()


def test_quantize_shapes():
    x = random_tensor(3, 5, 7)
    codes, scale = slkernels.quantize_block(x, "dyn8", 16)
    assert codes.shape == x.shape and scale.shape == (7,)
    strided = random_tensor(7, 10)[:, ::2].t()
    assert torch.equal(
        slkernels.quantize_block(strided)[0], slkernels.quantize_block(strided.contiguous())[0]
    ) and torch.equal(slkernels.quantize_block(strided)[0], reference.quantize_block(strided)[0])
    codes, scale = slkernels.quantize_block(torch.empty(0, 4))
    assert codes.shape == (0, 4) and scale.shape == (0,)
    assert slkernels.dequantize_block(codes, scale).shape == (0, 4)


# ---- the step -------------------------------------------------------------------------------------------------------


class Problem:
    """Parameters, gradients and states of adam_q_, in separate poisoned allocations with canaries around them."""

    PAD = 64

    def __init__(self, sizes, dtype=torch.float32, block=256, quantized=True, seed=0, warm=True):
        self.block, self.guards = block, []
        self.params, self.grads, self.m, self.m_scale, self.v, self.v_scale = ([] for _ in range(6))
        for i, n in enumerate(sizes):
            q = quantized[i] if isinstance(quantized, list) else quantized
            m = random_tensor(n, seed=seed + 3 * i, decades=3.0) * (1.0 if warm else 0.0)
            v = m.square() * (0.5 + torch.rand(n, generator=torch.Generator().manual_seed(seed + i)))
            self.params.append(self.guarded(random_tensor(n, seed=seed + 7 * i + 2, decades=2.0).to(dtype)))
            self.grads.append(self.guarded(random_tensor(n, seed=seed + 11 * i + 3, decades=3.0).to(dtype)))
            for state, scale, value, codec in ((self.m, self.m_scale, m, "dyn8"), (self.v, self.v_scale, v, "dyn8u")):
                codes, s = reference.quantize_block(value, codec, block) if q else (value, torch.empty(0))
                state.append(self.guarded(codes))
                scale.append(self.guarded(s))
        self.step, self.lr = torch.tensor(3.0), torch.tensor(1e-2)

    def guarded(self, x):
        raw = torch.full((x.numel() + 2 * self.PAD,), 77).to(x.dtype)
        self.guards.append((raw, x.numel()))
        out = raw[self.PAD : self.PAD + x.numel()]
        return out.copy_(x)

    def check_guards(self):
        for raw, n in self.guards:
            assert (raw[: self.PAD] == 77).all() and (raw[self.PAD + n :] == 77).all()

    def lists(self):
        return [self.params, self.grads, self.m, self.m_scale, self.v, self.v_scale]

    def clone(self):
        other = copy.copy(self)
        other.params, other.grads, other.m, other.m_scale, other.v, other.v_scale = (
            [t.clone() for t in tensors] for tensors in self.lists()
        )
        return other

    def run(self, **options):
        options = {**HYPER, "block": self.block, **options}
        slkernels.adam_q_(*self.lists(), [], self.step, self.lr, **options)
        return self

    def tensors(self):
        return list(itertools.chain(*self.lists()))

    def same_as(self, other):
        return all(same_bits(a, b) for a, b in zip(self.tensors(), other.tensors(), strict=True))

    def moments(self):
        """m and v of every tensor, decoded."""
        for m, ms, v, vs in zip(*self.lists()[2:], strict=True):
            if m.dtype == torch.uint8:
                m = reference.dequantize_block(m, ms, "dyn8", self.block)
                v = reference.dequantize_block(v, vs, "dyn8u", self.block)
            yield m, v

    def reference(self, dtype, magnitudes=False, **options):
        """(p, m, v) of every tensor by the definition, before m and v are quantized; or from absolute values."""
        f = (lambda x: x.to(dtype).abs()) if magnitudes else (lambda x: x.to(dtype))
        out = []
        for p, g, (m, v) in zip(self.params, self.grads, self.moments(), strict=True):
            step = (float(self.step), float(self.lr))
            out.append(reference.adam(f(p), f(g), f(m), f(v), *step, **{**HYPER, **options}))
        return out


def check_step(problem, **options):
    """Runs a step. p against the definition in float64: over all elements, at most twice the error of the same formula
    in PyTorch; for every element, the rounding of p and 8 roundings of what was added up. Returns (m, v) in float64."""
    exact, formula = (problem.reference(dtype, **options) for dtype in (torch.float64, torch.float32))
    sums = problem.reference(torch.float64, magnitudes=True, **options)
    starts = [p.double().abs() for p in problem.params]
    problem.run(**options)
    problem.check_guards()
    dtype = problem.params[0].dtype
    ours, theirs = [], []
    for p, start, (want, _, _), (approx, _, _), (down, _, _) in zip(
        problem.params, starts, exact, formula, sums, strict=True
    ):
        ours.append((p.double() - want).abs())
        theirs.append((approx.to(dtype).double() - want).abs())
        added = 2 * start + (start - down).abs()  # |p| and the update, with nothing cancelled
        rounding = 0.501 * torch.finfo(dtype).eps * want.abs() + torch.finfo(dtype).smallest_normal * 2**-10
        assert (ours[-1] <= rounding + 8 * torch.finfo(torch.float32).eps * added).all()
    ours, theirs = torch.cat(ours), torch.cat(theirs)
    assert ours.max() <= 2 * theirs.max() and ours.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt()
    return [(m, v) for _, m, v in exact], [(m, v) for _, m, v in sums]


SIZES = [1, 2, 15, 16, 17, 255, 256, 257, 511, 512, 1000, 5461, 0]


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.0}, {"decoupled": False}, {"beta1": 0.0, "eps": 1e-3}])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("quantized", [True, False])
def test_step_matches_reference(dtype, quantized, options):
    problem = Problem(SIZES, dtype, quantized=quantized)
    if not options.get("decoupled", True):  # where grad + weight_decay * p cancels, v and the error have no bound
        for p, g in zip(problem.params, problem.grads, strict=True):
            g.copy_(g.abs() * p.sign())
    moments, sums = check_step(problem, **options)
    for i, (want, added) in enumerate(zip(moments, sums, strict=True)):
        for state, scale, codec, moment, size in (
            (problem.m[i], problem.m_scale[i], "dyn8", want[0], added[0]),
            (problem.v[i], problem.v_scale[i], "dyn8u", want[1], added[1]),
        ):
            if not quantized:
                assert ((state.double() - moment).abs() <= 4 * torch.finfo(torch.float32).eps * size + 1e-44).all()
                continue
            # The codes are those of the exact moments, but for values that a rounding takes across a midpoint.
            codes, scales = reference.quantize_block(moment.float(), codec)
            torch.testing.assert_close(scale, scales, rtol=1e-6, atol=0)
            wrong = (codes.int() - state.int()).abs()
            assert wrong.sum() <= 1 + 1e-3 * wrong.numel() and wrong.le(1).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradient_scale_divides(dtype):
    problem = Problem([300, 5000], dtype, quantized=[False, True])
    scaled = problem.clone()
    scaled.grads = [g * 8 for g in scaled.grads]
    problem.run()
    scaled.run(grad_scale=torch.tensor(8.0))
    assert all(same_bits(a, b) for a, b in zip(problem.params + problem.m, scaled.params + scaled.m, strict=True))


def test_found_inf_leaves_every_bit():
    problem = Problem([300, 5000], torch.bfloat16, quantized=[False, True])
    before = problem.clone()
    problem.run(found_inf=torch.ones(1))
    assert problem.same_as(before)
    problem.run(found_inf=torch.zeros(1))
    assert not problem.same_as(before)
    assert problem.same_as(before.run())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e25])
@pytest.mark.parametrize("quantized", [True, False])
def test_bad_gradient_element_does_not_touch_its_block(bad, quantized):
    clean, dirty = Problem([1000], quantized=quantized), Problem([1000], quantized=quantized)
    clean.grads[0][300] = 0
    dirty.grads[0][300] = bad
    m, v = (reference.dequantize_block(clean.m[0], clean.m_scale[0]), clean.v[0].clone()) if quantized else (0, 0)
    # Big neighbours, so that the element does not set its block's scale.
    for p in (clean, dirty):
        p.grads[0][299] = 50.0
    clean.run(), dirty.run()
    others = torch.arange(1000) != 300
    assert same_bits(clean.params[0][others], dirty.params[0][others])
    assert torch.equal(clean.m[0][others], dirty.m[0][others]) and torch.equal(clean.v[0][others], dirty.v[0][others])
    assert torch.equal(clean.m_scale[0], dirty.m_scale[0]) and torch.equal(clean.v_scale[0], dirty.v_scale[0])
    assert dirty.params[0][300].isfinite() == (bad == 1e25)
    if quantized:
        kept = reference.dequantize_block(dirty.m[0], dirty.m_scale[0])[300]
        assert abs(kept - m[300]) <= 0.008 * dirty.m_scale[0][1] and dirty.v_scale[0].isfinite().all() and v.numel()
    else:
        assert dirty.m[0].isfinite().all() and dirty.v[0].isfinite().all()


def test_many_tensors_equal_a_loop_of_single_ones():
    sizes = [4096, 1, 255, 8192, 0, 256, 70000, 257]
    together = Problem(sizes, torch.bfloat16, quantized=[True, False] * 4)
    alone = together.clone()
    together.run()
    for i in range(len(sizes)):
        one = copy.copy(alone)
        one.params, one.grads, one.m, one.m_scale, one.v, one.v_scale = ([t[i]] for t in alone.lists())
        one.run()
    assert together.same_as(alone)


def test_mixed_dtypes_in_one_call():
    problems = [Problem([5000], dtype) for dtype in FLOATS]
    together = problems[0].clone()
    for name in ("params", "grads", "m", "m_scale", "v", "v_scale"):
        setattr(together, name, [t.clone() for p in problems for t in getattr(p, name)])
    together.run()
    for i, p in enumerate(problems):
        p.run()
        assert same_bits(together.params[i], p.params[0]) and torch.equal(together.m[i], p.m[0])


def test_thread_count_does_not_matter():
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(Problem([100_003, 5, 8192, 8192], torch.bfloat16).run())
    finally:
        torch.set_num_threads(before)
    assert all(results[0].same_as(r) for r in results[1:])


@pytest.mark.parametrize("block", [16, 48, 1024, 4096])
def test_other_block_sizes(block):
    check_step(Problem([1, 4095, 4096, 9000], block=block))


def test_empty_list_and_strided_gradient():
    slkernels.adam_q_([], [], [], [], [], [], [], torch.ones(()), torch.ones(()), **HYPER)
    a, b = Problem([5000]), Problem([5000])
    b.grads[0] = torch.stack([b.grads[0], b.grads[0]], 1)[:, 0]
    assert not b.grads[0].is_contiguous()
    a.run(), b.run()
    assert same_bits(a.params[0], b.params[0]) and torch.equal(a.m[0], b.m[0])


def test_zero_gradients_move_nothing():
    problem = Problem([5000, 100], torch.float32, quantized=[True, False], warm=False)
    before = [p.clone() for p in problem.params]
    for g in problem.grads:
        g.zero_()
    problem.grads[0][::256] = 1.0  # the blocks' scales are not zero
    others = torch.arange(5000) % 256 != 0
    for _ in range(500):
        problem.run(weight_decay=0.0)
    assert same_bits(problem.params[0][others], before[0][others]) and same_bits(problem.params[1], before[1])
    assert (problem.m[0][others] == 127).all() and (problem.v[0][others] == 0).all()
    assert not torch.equal(problem.params[0][::256], before[0][::256])


ISA_SCRIPT = """
import sys, torch, slkernels
sys.path.insert(0, sys.argv[1])
import test_optim as t
assert slkernels.build_info()["cpu_isa"] == sys.argv[2]
out = []
for codec in t.CODECS:
    x = t.near_midpoints(codec == "dyn8", 4)
    x = torch.cat([torch.ones(1), x])
    for dtype in t.FLOATS:
        out += list(slkernels.quantize_block(x.to(dtype), codec, 4096))
    out.append(slkernels.dequantize_block(torch.arange(256, dtype=torch.uint8), torch.ones(1), codec))
for dtype in t.FLOATS:
    for options in ({}, {"decoupled": False}):
        out += t.Problem(t.SIZES, dtype, quantized=[True, False] * 6 + [True]).run(**options).tensors()
torch.save(out, sys.argv[3])
"""


def test_every_instruction_set_gives_the_same_bits(tmp_path):
    outputs = []
    for isa in ISAS:
        path = tmp_path / f"{isa}.pt"
        environment = {**os.environ, "SLKERNELS_CPU_ISA": isa}
        here = os.path.dirname(__file__)
        done = subprocess.run(
            [sys.executable, "-c", ISA_SCRIPT, here, isa, str(path)], env=environment, capture_output=True, text=True
        )
        if "is not available on this machine" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        outputs.append(torch.load(path))
    assert outputs
    for other in outputs[1:]:
        assert all(same_bits(a, b) for a, b in zip(outputs[0], other, strict=True))


def test_opcheck():
    x = random_tensor(300)
    codes, scale = slkernels.quantize_block(x)
    torch.library.opcheck(torch.ops.slkernels.quantize_block.default, (x, "dyn8", 64))
    torch.library.opcheck(torch.ops.slkernels.dequantize_block.default, (codes, scale))
    p = Problem([300, 40], quantized=[True, False])
    torch.library.opcheck(torch.ops.slkernels.adam_q_.default, (*p.lists(), [], p.step, p.lr), HYPER)


def test_compile():
    def step(params, grads, m, m_scale, v, v_scale, t, lr):
        t = t + 1
        torch.ops.slkernels.adam_q_(params, grads, m, m_scale, v, v_scale, [], t, lr, **HYPER)
        return [p * 2 for p in params]

    eager, compiled = Problem([600, 40], quantized=[True, False]), Problem([600, 40], quantized=[True, False])
    want = step(*eager.lists(), eager.step, eager.lr)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled.lists(), compiled.step, compiled.lr)
    assert eager.same_as(compiled) and all(same_bits(a, b) for a, b in zip(want, got, strict=True))

    x = random_tensor(3, 200)
    round_trip = torch.compile(
        lambda x: slkernels.dequantize_block(*slkernels.quantize_block(x)), fullgraph=True, backend="aot_eager"
    )
    assert same_bits(round_trip(x), slkernels.dequantize_block(*slkernels.quantize_block(x)))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: p.grads.pop(), "grads must have as many tensors as params, 1, got 0"),
        (lambda p: p.params.__setitem__(0, p.params[0].double()), r"params\[0\] must be float32, bfloat16 or float16"),
        (lambda p: p.params.__setitem__(0, torch.zeros(20, 30).t()), r"params\[0\] must be contiguous"),
        (lambda p: p.grads.__setitem__(0, p.grads[0].half()), r"grads\[0\] must have its parameter's dtype float32"),
        (lambda p: p.grads.__setitem__(0, p.grads[0][:5]), r"grads\[0\] must have its parameter's shape \[600\]"),
        (lambda p: p.m.__setitem__(0, p.m[0].int()), r"m\[0\] must be uint8 \(quantized\) or float32, got int32"),
        (lambda p: p.v.__setitem__(0, p.v[0].float()), r"v\[0\] must be contiguous uint8 with 600 elements"),
        (lambda p: p.m.__setitem__(0, p.m[0][1:]), r"m\[0\] must be contiguous uint8 with 600 elements, got uint8 \[5"),
        (lambda p: p.m_scale.__setitem__(0, p.m_scale[0][1:]), r"m_scale\[0\] must be contiguous float32 with 3"),
        (lambda p: setattr(p, "step", torch.ones(2)), "step must be a float32 tensor with one element"),
        (lambda p: setattr(p, "lr", torch.ones(1).double()), "lr must be a float32 tensor with one element"),
    ],
)
def test_adam_errors(change, message):
    problem = Problem([600])
    change(problem)
    before = [t.clone() for t in problem.tensors()]
    with pytest.raises(RuntimeError, match="slkernels::adam_q_: " + message):
        problem.run()
    assert all(same_bits(a, b) for a, b in zip(before, problem.tensors(), strict=True))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"codec": "dyn4"}, "codec 'dyn4' is not supported yet"),
        ({"round_mode": 1}, "round_mode 1 is not supported yet"),
        ({"rng": torch.zeros(1)}, "rng is not supported yet"),
        ({"block": 100}, "block must be a multiple of 16 from 16 to 4096, got 100"),
        ({"block": 8192}, "block must be a multiple of 16"),
        ({"grad_scale": torch.ones(2)}, "grad_scale must be a float32 tensor with one element"),
    ],
)
def test_adam_option_errors(options, message):
    with pytest.raises(RuntimeError, match="slkernels::adam_q_: " + message):
        Problem([600]).run(**options)


def test_master_weights_are_refused():
    p = Problem([600])
    with pytest.raises(RuntimeError, match="master_lo is not supported yet"):
        slkernels.adam_q_(*p.lists(), [torch.zeros(600)], p.step, p.lr, **HYPER)


def test_codec_errors():
    x = torch.zeros(300)
    codes, scale = slkernels.quantize_block(x)
    for call, message in (
        (lambda: slkernels.quantize_block(x.double()), "quantize_block: x must be float32, bfloat16 or float16"),
        (lambda: slkernels.quantize_block(x, "int8"), "quantize_block: codec must be 'dyn8' or 'dyn8u', got 'int8'"),
        (lambda: slkernels.quantize_block(x, block=8), "quantize_block: block must be a multiple of 16"),
        (lambda: slkernels.dequantize_block(x, scale), "dequantize_block: codes must be uint8, got float32"),
        (lambda: slkernels.dequantize_block(codes, scale[:1]), r"dequantize_block: scale must be \[2\], got \[1\]"),
        (lambda: slkernels.dequantize_block(codes, scale.double()), "dequantize_block: scale must be float32"),
        (lambda: slkernels.dequantize_block(codes, scale, dtype=torch.int32), "dtype must be float32, bfloat16 or"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
