"""Family `optim`: the fused steps."""

import copy
import itertools
import os
import subprocess
import sys

import pytest
import slkernels
import torch
from optim_data import BLOCKS, FLOATS, PAIRS, random_tensor, same_bits
from slkernels.reference import optim as reference
from slkernels.reference import optim_codec
from slkernels.reference.philox import rounding_bits

HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
MOMENTUM = {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1}
RULES = ["lion", "sgd", "nesterov", "signum"]
OPS = ["adam", "ademamix", *RULES]
ISAS = slkernels.build_info()["cpu_isas"]
SIZES = [1, 2, 15, 16, 17, 255, 256, 257, 511, 512, 1000, 5461, 0]


# ---- problems -------------------------------------------------------------------------------------------------------


class Problem:
    """Parameters, gradients and states of a step, in separate poisoned allocations with canaries around them.

    ``op``: "adam", "ademamix" or a rule of momentum_q_. States are lists by name: m, v, m_slow as the op has them.
    """

    PAD = 64

    def __init__(
        self,
        sizes,
        dtype=torch.float32,
        *,
        op="adam",
        codec="dyn8",
        block=None,
        quantized=True,
        seed=0,
        warm=True,
        master=None,
    ):
        self.op, self.codec, self.block, self.guards = op, codec, block or BLOCKS[codec], []
        self.moment_codecs = {"m": codec}
        if op == "ademamix":
            self.moment_codecs["m_slow"] = codec
        if op in ("adam", "ademamix"):
            self.moment_codecs["v"] = PAIRS[codec]
        self.params, self.grads, self.master_lo = [], [], []
        self.states = {name: ([], []) for name in self.moment_codecs}
        for i, n in enumerate(sizes):
            q = quantized[i] if isinstance(quantized, list) else quantized
            m = random_tensor(n, seed=seed + 3 * i, decades=3.0) * (1.0 if warm else 0.0)
            values = {
                "m": m,
                "m_slow": random_tensor(n, seed=seed + 5 * i + 1, decades=3.0) * (1.0 if warm else 0.0),
                "v": m.square() * (0.5 + torch.rand(n, generator=torch.Generator().manual_seed(seed + i))),
            }
            self.params.append(self.guarded(random_tensor(n, seed=seed + 7 * i + 2, decades=2.0).to(dtype)))
            self.grads.append(self.guarded(random_tensor(n, seed=seed + 11 * i + 3, decades=3.0).to(dtype)))
            for name, state_codec in self.moment_codecs.items():
                value = values[name]
                codes, s = reference.quantize_block(value, state_codec, self.block) if q else (value, torch.empty(0))
                self.states[name][0].append(self.guarded(codes))
                self.states[name][1].append(self.guarded(s))
            if master:
                low = torch.randint(-128, 128, (n,), generator=torch.Generator().manual_seed(seed + i))
                low = torch.where(self.params[-1] == 0, 0, low * (256 if master == torch.int16 else 1))
                self.master_lo.append(self.guarded(low.to(master)))
        self.step, self.lr = torch.tensor(3.0), torch.tensor(1e-2)
        self.beta3, self.alpha = torch.tensor(0.9999), torch.tensor(5.0)

    def guarded(self, x):
        raw = torch.full((x.numel() + 2 * self.PAD,), 77).to(x.dtype)
        self.guards.append((raw, x.numel()))
        out = raw[self.PAD : self.PAD + x.numel()]
        return out.copy_(x)

    def check_guards(self):
        for raw, n in self.guards:
            assert (raw[: self.PAD] == 77).all() and (raw[self.PAD + n :] == 77).all()

    @property
    def m(self):
        return self.states["m"][0]

    @property
    def m_scale(self):
        return self.states["m"][1]

    @property
    def v(self):
        return self.states["v"][0]

    @property
    def v_scale(self):
        return self.states["v"][1]

    def clone(self):
        other = copy.copy(self)
        for name in ("params", "grads", "master_lo"):
            setattr(other, name, [t.clone() for t in getattr(self, name)])
        other.states = {k: tuple([t.clone() for t in part] for part in s) for k, s in self.states.items()}
        return other

    def only(self, i):
        """Tensor i alone, sharing memory."""
        other = copy.copy(self)
        other.params, other.grads, other.master_lo = [self.params[i]], [self.grads[i]], self.master_lo[i : i + 1]
        other.states = {k: tuple([part[i]] for part in s) for k, s in self.states.items()}
        return other

    def arguments(self):
        states = [part for s in self.states.values() for part in s]
        scalars = [self.step, self.lr] + ([self.beta3, self.alpha] if self.op == "ademamix" else [])
        return [self.params, self.grads, *states, self.master_lo, *scalars]

    @property
    def options(self):
        more = {"codec": self.codec, "block": self.block}
        return {**HYPER, **more} if self.op in ("adam", "ademamix") else {**MOMENTUM, "rule": self.op, **more}

    @property
    def function(self):
        return {"adam": slkernels.adam_q_, "ademamix": slkernels.ademamix_q_}.get(self.op, slkernels.momentum_q_)

    def run(self, **options):
        self.function(*self.arguments(), **{**self.options, **options})
        return self

    def tensors(self):
        return [*self.params, *self.grads, *self.master_lo, *itertools.chain(*itertools.chain(*self.states.values()))]

    def same_as(self, other):
        return all(same_bits(a, b) for a, b in zip(self.tensors(), other.tensors(), strict=True))

    def moment(self, name, i):
        """A moment of tensor i, as the step reads it."""
        codes, scale = (part[i] for part in self.states[name])
        if codes.dtype != torch.uint8:
            return codes
        return reference.decode_in_step(codes, scale, self.moment_codecs[name], self.block, self.params[i].numel())

    def reference(self, dtype, magnitudes=False, **options):
        """(p, {moment: value}) of every tensor by the definition, before the moments are quantized; or from absolute
        values, which bounds the roundings."""
        f = (lambda x: x.to(dtype).abs()) if magnitudes else (lambda x: x.to(dtype))
        formula = {"adam": reference.adam, "ademamix": reference.ademamix}.get(self.op, reference.momentum)
        scalars = [float(self.step), float(self.lr)]
        if self.op == "ademamix":
            scalars += [float(self.beta3), float(self.alpha)]
        known = {k: x for k, x in {**self.options, **options}.items() if k not in ("codec", "block")}
        out = []
        for i, (p, g) in enumerate(zip(self.params, self.grads, strict=True)):
            if self.master_lo:
                p = reference.join_master(p, self.master_lo[i])
            moments = [f(self.moment(name, i)) for name in self.moment_codecs]
            p, *moments = formula(f(p), f(g), *moments, *scalars, **known)
            out.append((p, dict(zip(self.moment_codecs, moments, strict=True))))
        return out


def check_step(problem, **options):
    """Runs a step. p against the definition in float64: over all elements, at most twice the error of the same formula
    in PyTorch; for every element, the rounding of p and 8 roundings of what was added up. Moments: the codes are those
    of the exact ones, but for values that a rounding takes across a midpoint; fp32 ones within 4 roundings."""
    exact, formula = (problem.reference(dtype, **options) for dtype in (torch.float64, torch.float32))
    sums = problem.reference(torch.float64, magnitudes=True, **options)
    starts = [p.double().abs() for p in problem.params]
    problem.run(**options)
    problem.check_guards()
    dtype = problem.params[0].dtype
    eps = torch.finfo(torch.float32).eps
    ours, theirs = [], []
    for p, start, (want, _), (approx, _), (down, _) in zip(problem.params, starts, exact, formula, sums, strict=True):
        ours.append((p.double() - want).abs())
        theirs.append((approx.to(dtype).double() - want).abs())
        added = 2 * start + (start - down).abs()  # |p| and the update, with nothing cancelled
        rounding = 0.501 * torch.finfo(dtype).eps * want.abs() + torch.finfo(dtype).smallest_normal * 2**-10
        assert problem.op in ("lion", "signum") or (ours[-1] <= rounding + 8 * eps * added).all()
    ours, theirs = torch.cat(ours), torch.cat(theirs)
    assert ours.max() <= 2 * theirs.max() and ours.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt()
    for i, ((_, moments), (_, magnitudes)) in enumerate(zip(exact, sums, strict=True)):
        for name, codec in problem.moment_codecs.items():
            state, scale = (part[i] for part in problem.states[name])
            if state.dtype != torch.uint8:
                error = (state.double() - moments[name]).abs()
                assert (error <= 4 * eps * magnitudes[name] + 1e-44).all()
                continue
            codes, scales = reference.quantize_block(moments[name].float(), codec, problem.block)
            torch.testing.assert_close(scale, scales, rtol=1e-6, atol=0)
            got, codes = (optim_codec.unpack(c, codec).int() for c in (state, codes))
            wrong = torch.minimum((codes - got).abs(), 256 - (codes - got).abs())
            assert wrong.sum() <= 1 + 1e-3 * wrong.numel() and wrong.le(1).all()


def cancel_nothing(problem):
    """Where grad + weight_decay * p cancels, the moments and the error have no bound."""
    for p, g in zip(problem.params, problem.grads, strict=True):
        g.copy_(g.abs() * p.sign())
    return problem


# ---- the step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.0}, {"decoupled": False}, {"beta1": 0.0, "eps": 1e-3}])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("quantized", [True, False])
def test_adam_matches_reference(dtype, quantized, options):
    problem = Problem(SIZES, dtype, quantized=quantized)
    check_step(problem if options.get("decoupled", True) else cancel_nothing(problem), **options)


@pytest.mark.parametrize("codec", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_every_codec_and_rule_matches_reference(op, dtype, codec):
    check_step(cancel_nothing(Problem(SIZES, dtype, op=op, codec=codec)))


@pytest.mark.parametrize("op", OPS)
def test_unquantized_state_matches_reference(op):
    check_step(cancel_nothing(Problem(SIZES, torch.bfloat16, op=op, quantized=False)))


@pytest.mark.parametrize("op", ["sgd", "nesterov"])
def test_first_step_of_sgd_ignores_the_state(op):
    problem = cancel_nothing(Problem([1000], op=op))
    problem.step.fill_(1.0)
    want = problem.grads[0] + MOMENTUM["weight_decay"] * problem.params[0]
    check_step(problem)
    torch.testing.assert_close(problem.m_scale[0][0], want[:256].abs().max())


# Ten steps against torch's own optimizers, with decay, on fp32 states: the formula and its order.
@pytest.mark.parametrize(
    "op, build",
    [
        ("adam", lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)),
        ("adam_l2", lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)),
        ("sgd", lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1)),
        ("nesterov", lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1, nesterov=True)),
    ],
)
def test_every_step_is_torchs(op, build):
    options = {"decoupled": False} if op == "adam_l2" else {}
    problem = Problem([1000], op=op.removesuffix("_l2"), quantized=False, warm=False)
    p = torch.nn.Parameter(problem.params[0].double())
    optimizer = build([p])
    for t in range(1, 11):
        problem.grads[0].copy_(random_tensor(1000, seed=t, decades=2.0))
        p.grad = problem.grads[0].double()
        problem.step.fill_(float(t))
        problem.run(**options)
        optimizer.step()
        torch.testing.assert_close(problem.params[0].double(), p.detach(), rtol=2e-6, atol=2e-7)


def test_every_step_is_lions():
    """Algorithm 2 of arXiv 2302.06675."""
    problem = Problem([1000], op="lion", quantized=False, warm=False)
    p, m = problem.params[0].double(), torch.zeros(1000, dtype=torch.float64)
    for t in range(1, 11):
        g = random_tensor(1000, seed=t, decades=2.0)
        problem.grads[0].copy_(g)
        problem.run()
        c = 0.9 * m + 0.1 * g.double()
        p = p - 1e-2 * (c.sign() + 0.1 * p)
        m = 0.99 * m + 0.01 * g.double()
        torch.testing.assert_close(problem.params[0].double(), p, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("codec", PAIRS)
def test_second_moment_error_is_relative(codec):
    """v after a step, element by element, relative to v: half a step of the codec where it has one."""
    problem = Problem([4096], codec=codec, warm=False)
    problem.grads[0].copy_(0.1 + torch.rand(4096, generator=torch.Generator().manual_seed(1)))
    v = 0.001 * problem.grads[0].double().square()
    problem.run()
    got = reference.dequantize_block(problem.v[0], problem.v_scale[0], PAIRS[codec], problem.block)
    # The largest is 121 times the smallest: half a step of the codec there, relative to it.
    worst = {"dyn8": 0.0704, "lin8": 0.25, "cmp8": 0.0436, "dyn4": 7.6, "fp8": 0.0626}[codec]
    assert ((got.double() - v).abs() <= worst * v).all()


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", OPS)
def test_gradient_scale_divides(op, dtype):
    problem = Problem([300, 5000], dtype, op=op, quantized=[False, True])
    scaled = problem.clone()
    scaled.grads = [g * 8 for g in scaled.grads]
    problem.run(weight_decay=0.0)
    scaled.run(weight_decay=0.0, grad_scale=torch.tensor(8.0))
    assert all(same_bits(a, b) for a, b in zip(problem.params + problem.m, scaled.params + scaled.m, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_found_inf_leaves_every_bit(op):
    problem = Problem([300, 5000], torch.bfloat16, op=op, quantized=[False, True], master=torch.int16)
    before, counter = problem.clone(), torch.zeros(1, dtype=torch.int64)
    problem.grads[0][7] = float("nan")
    before.grads[0][7] = float("nan")
    problem.run(found_inf=torch.ones(1), nonfinite=counter)
    assert problem.same_as(before) and counter == 0
    problem.run(found_inf=torch.zeros(1), nonfinite=counter)
    assert not problem.same_as(before) and counter == 1
    assert problem.same_as(before.run())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e25])
@pytest.mark.parametrize("codec", [None, *PAIRS])
def test_bad_gradient_element_does_not_touch_its_block(bad, codec):
    clean, dirty = (Problem([1000], codec=codec or "dyn8", quantized=codec is not None) for _ in range(2))
    before = clean.moment("m", 0).clone()
    clean.grads[0][300] = 0
    dirty.grads[0][300] = bad
    for p in (clean, dirty):  # a big neighbour, so that the element does not set its block's scale
        p.grads[0][299] = 50.0
    counter = torch.tensor([5])
    clean.run(nonfinite=counter)
    assert counter == 5
    dirty.run(nonfinite=counter)
    assert counter == 6
    others = torch.arange(1000) != 300
    assert same_bits(clean.params[0][others], dirty.params[0][others])
    for name, state_codec in clean.moment_codecs.items():
        a, b = (optim_codec.unpack(p.states[name][0][0], state_codec if codec else "dyn8") for p in (clean, dirty))
        assert torch.equal(a[others], b[others])
        assert torch.equal(clean.states[name][1][0], dirty.states[name][1][0])
    assert dirty.params[0][300].isfinite() == (bad == 1e25)
    if codec:
        step = {"dyn8": 0.008, "lin8": 0.004, "cmp8": 0.008, "dyn4": 0.12, "fp8": 0.036}[codec]
        assert abs(dirty.moment("m", 0)[300] - before[300]) <= step * dirty.m_scale[0].max() * (
            {"lin8": 127, "fp8": 448}.get(codec, 1)
        )
    else:
        assert dirty.m[0][300] == before[300] and dirty.v[0].isfinite().all()


@pytest.mark.parametrize("rule", RULES)
def test_bad_gradient_element_of_one_moment(rule):
    clean, dirty = Problem([1000], op=rule), Problem([1000], op=rule)
    for p in (clean, dirty):
        p.grads[0][299] = 50.0
    clean.grads[0][300], dirty.grads[0][300] = 0.0, float("nan")
    counter = torch.zeros(1, dtype=torch.int64)
    clean.run(), dirty.run(nonfinite=counter)
    others = torch.arange(1000) != 300
    assert counter == 1 and dirty.params[0][300].isnan()
    assert torch.equal(clean.m[0][others], dirty.m[0][others]) and torch.equal(clean.m_scale[0], dirty.m_scale[0])


@pytest.mark.parametrize("out_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("codec", PAIRS)
def test_direction(codec, dtype, out_dtype):
    """Moments as adam_q_'s bit for bit, and the direction to the bound of a rounding and the formula's own error."""
    problem = Problem(SIZES, dtype, codec=codec, quantized=[True, False] * 6 + [True])
    stepped = problem.clone().run()
    out = [torch.full_like(g, 7.0, dtype=out_dtype) for g in problem.grads]
    zero = problem.clone()
    zero.params = [p.zero_() for p in zero.params]
    zero.lr = torch.tensor(-1.0)
    exact = zero.reference(torch.float64, weight_decay=0.0)
    states = [part for s in problem.states.values() for part in s]
    hyper = {k: v for k, v in problem.options.items() if k != "weight_decay"}
    slkernels.adam_q_dir_(problem.grads, *states, out, problem.step, **hyper)
    problem.check_guards()
    for name in ("m", "v"):
        for a, b in zip(problem.states[name], stepped.states[name], strict=True):
            assert all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    for got, (want, _) in zip(out, exact, strict=True):
        eps = torch.finfo(got.dtype).eps
        bound = 0.501 * eps * want.abs() + 4e-6 * (want.abs() + 1) + torch.finfo(got.dtype).smallest_normal
        inside = want.abs() < 0.999 * torch.finfo(got.dtype).max  # where v decodes to 0, m / eps may be large
        assert ((got.double() - want).abs() <= bound)[inside].all()


def test_direction_with_found_inf_is_zero():
    problem = Problem([300, 5000], quantized=[False, True])
    before, out = problem.clone(), [torch.full_like(g, 7.0) for g in problem.grads]
    states = [part for s in problem.states.values() for part in s]
    hyper = {k: v for k, v in problem.options.items() if k != "weight_decay"}
    slkernels.adam_q_dir_(problem.grads, *states, out, problem.step, found_inf=torch.ones(1), **hyper)
    assert problem.same_as(before) and all((o == 0).all() for o in out)


# ---- rounding of parameters -----------------------------------------------------------------------------------------


def stochastic_reference(problem, low=None):
    """Parameters (and remainders) that a step of `problem` must round to, from the same step on fp32 copies."""
    wide = problem.clone()
    wide.master_lo = []
    wide.params = [
        reference.join_master(p, problem.master_lo[i]) if low else p.float() for i, p in enumerate(problem.params)
    ]
    wide.grads = [g.float() for g in wide.grads]
    wide.run()
    return wide.params


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_stochastic_rounding_is_the_reference(op, dtype):
    problem = Problem(SIZES, dtype, op=op)
    seed, step = 2**40 + 12345, 7
    wide = stochastic_reference(problem)
    problem.run(round_mode=1, rng=torch.tensor([seed, step]))
    problem.check_guards()
    for i, (p, x) in enumerate(zip(problem.params, wide, strict=True)):
        assert same_bits(p, reference.round_stochastic(x, dtype, rounding_bits(x.numel(), seed, step, i)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_unbiased(dtype):
    """20000 equal elements between two numbers: the mean within 5 standard errors, of half a gap at most each."""
    for x in (1.003, -0.3001, 1e-3, 3e-6):
        n = 20000
        problem = Problem([n], dtype, op="sgd", quantized=False, warm=False)
        problem.params[0].zero_()
        problem.grads[0].fill_(1.0)
        problem.lr.fill_(-x)
        problem.run(weight_decay=0.0, round_mode=1, rng=torch.tensor([1, 2]))
        p = problem.params[0].double()
        gap = p.max() - p.min()
        assert p.unique().numel() == 2 and abs(p.mean() - x) <= 2.5 * gap / n**0.5


@pytest.mark.parametrize("low", [torch.int16, torch.int8])
@pytest.mark.parametrize("stochastic", [False, True])
def test_master_weights(low, stochastic):
    problem = Problem(SIZES, torch.bfloat16, master=low)
    wide = stochastic_reference(problem, low)
    rounding = {"round_mode": 1, "rng": torch.tensor([5, 6])} if stochastic else {}
    problem.run(**rounding)
    problem.check_guards()
    for i, x in enumerate(wide):
        bits = rounding_bits(x.numel(), 5, 6, i) if stochastic else None
        high, remainder = reference.split_master(x, low, bits)
        assert same_bits(problem.params[i], high) and same_bits(problem.master_lo[i], remainder)
        if low == torch.int16:
            assert same_bits(reference.join_master(problem.params[i], problem.master_lo[i]), x)


def test_master_weights_keep_small_updates():
    """Updates of 1e-4 of a bf16 ulp: lost without a master, kept with one."""
    problem = Problem([1000], torch.bfloat16, op="sgd", warm=False, master=torch.int16, quantized=False)
    problem.params[0].fill_(1.0), problem.master_lo[0].zero_(), problem.grads[0].fill_(1.0)
    plain = problem.clone()
    plain.master_lo = []
    for p in (problem, plain):
        p.lr.fill_(1e-5)
        for _ in range(1000):
            p.run(beta1=0.0, weight_decay=0.0)
    assert (plain.params[0] == 1).all()
    torch.testing.assert_close(
        reference.join_master(problem.params[0], problem.master_lo[0]), torch.full((1000,), 0.99), rtol=1e-4, atol=0
    )


# ---- lists, threads, blocks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("codec", PAIRS)
def test_many_tensors_equal_a_loop_of_single_ones(op, codec):
    sizes = [4096, 1, 255, 8192, 0, 256, 70001, 257]
    together = Problem(sizes, torch.bfloat16, op=op, codec=codec, quantized=[True, False] * 4)
    alone = together.clone()
    together.run()
    for i in range(len(sizes)):
        alone.only(i).run()
    assert together.same_as(alone)


def test_mixed_dtypes_in_one_call():
    problems = [Problem([5000], dtype) for dtype in FLOATS]
    together = problems[0].clone()
    together.params, together.grads = ([getattr(p, name)[0].clone() for p in problems] for name in ("params", "grads"))
    together.states = {
        k: tuple([p.states[k][part][0].clone() for p in problems] for part in (0, 1)) for k in together.states
    }
    together.run()
    for i, p in enumerate(problems):
        p.run()
        assert same_bits(together.params[i], p.params[0]) and torch.equal(together.m[i], p.m[0])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("codec", ["dyn8", "cmp8"])
def test_thread_count_does_not_matter(op, codec, threads):
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        problem = Problem([100_003, 5, 8192, 8192], torch.bfloat16, op=op, codec=codec)
        results.append(problem.run(round_mode=1, rng=torch.tensor([1, 2])))
    assert all(results[0].same_as(r) for r in results[1:])


@pytest.mark.parametrize("block", [16, 32, 48, 1024, 4080, 4096])
@pytest.mark.parametrize("codec", PAIRS)
def test_other_block_sizes(codec, block):
    check_step(Problem([1, 4095, 4096, 9000], codec=codec, block=block))


def test_empty_list_and_strided_gradient():
    slkernels.adam_q_([], [], [], [], [], [], [], torch.ones(()), torch.ones(()), **HYPER)
    a, b = Problem([5000]), Problem([5000])
    b.grads[0] = torch.stack([b.grads[0], b.grads[0]], 1)[:, 0]
    assert not b.grads[0].is_contiguous()
    a.run(), b.run()
    assert same_bits(a.params[0], b.params[0]) and torch.equal(a.m[0], b.m[0])


@pytest.mark.parametrize("codec", PAIRS)
@pytest.mark.parametrize("op", OPS)
def test_zero_gradients_move_nothing(op, codec):
    block = BLOCKS[codec]
    problem = Problem([5000, 100], op=op, codec=codec, quantized=[True, False], warm=False)
    before = [p.clone() for p in problem.params]
    for g in problem.grads:
        g.zero_()
    problem.grads[0][::block] = 1.0  # the blocks' scales are not zero
    others = torch.arange(5000) % block != 0
    for t in range(500):
        problem.step.fill_(t + 1.0)
        problem.run(weight_decay=0.0)
    assert same_bits(problem.params[0][others], before[0][others]) and same_bits(problem.params[1], before[1])
    for name, state_codec in problem.moment_codecs.items():
        if state_codec != "lin4u":
            assert (problem.moment(name, 0)[others] == 0).all()
    assert not torch.equal(problem.params[0][::block], before[0][::block])


def test_fresh_state_is_zeros():
    """Codes say nothing where the scale is 0."""
    for codec in PAIRS:
        a, b = Problem([1000], codec=codec, warm=False), Problem([1000], codec=codec, warm=False)
        for codes in (b.m[0], b.v[0]):
            codes.zero_()
        a.run(), b.run()
        assert a.same_as(b)


# ---- instruction sets -----------------------------------------------------------------------------------------------


ISA_SCRIPT = """
import sys, torch, slkernels
sys.path.insert(0, sys.argv[1])
import optim_data, test_optim as t, test_optim_codec as c
assert slkernels.build_info()["cpu_isa"] == sys.argv[2]
out = []
for codec in optim_data.CODECS:
    x = torch.cat([torch.ones(1), c.near_midpoints(codec, 4)])
    for dtype in optim_data.FLOATS:
        out += list(slkernels.quantize_block(x.to(dtype), codec, 4096))
    out += list(slkernels.quantize_block(x[:4000], codec, 32, 1, torch.tensor([1, 2])))
    out.append(c.code_values(codec))
quantized = [True, False] * 6 + [True]
stochastic = {"round_mode": 1, "rng": torch.tensor([3, 4])}
for op in t.OPS:
    for codec in optim_data.PAIRS:
        for dtype, options in ((torch.float32, {}), (torch.bfloat16, {}), (torch.float16, stochastic)):
            out += t.Problem(t.SIZES, dtype, op=op, codec=codec, quantized=quantized).run(**options).tensors()
for low in (torch.int16, torch.int8):
    out += t.Problem(t.SIZES, torch.bfloat16, master=low).run(**stochastic).tensors()
out += t.Problem(t.SIZES).run(decoupled=False).tensors()
bad = t.Problem(t.SIZES)
bad.grads[5][3] = float("nan")
out += bad.run().tensors()
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


# ---- torch's own rules, errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["adam", "ademamix", "lion"])
def test_opcheck(op):
    overload = {"adam": "adam_q_", "ademamix": "ademamix_q_"}.get(op, "momentum_q_")
    overload = getattr(torch.ops.slkernels, overload).default
    p = Problem([300, 40], op=op, quantized=[True, False])
    torch.library.opcheck(overload, tuple(p.arguments()), p.options)
    p = Problem([300], torch.bfloat16, op=op, codec="dyn4", master=torch.int8)
    more = {"round_mode": 1, "rng": torch.tensor([1, 2]), "nonfinite": torch.zeros(1, dtype=torch.int64)}
    torch.library.opcheck(overload, tuple(p.arguments()), {**p.options, **more})


def test_opcheck_direction():
    p = Problem([300, 40], quantized=[True, False])
    states = [part for s in p.states.values() for part in s]
    hyper = {k: v for k, v in p.options.items() if k != "weight_decay"}
    out = [torch.empty_like(g) for g in p.grads]
    torch.library.opcheck(torch.ops.slkernels.adam_q_dir_.default, (p.grads, *states, out, p.step), hyper)


@pytest.mark.parametrize("op", ["adam", "ademamix", "lion"])
def test_compile(op):
    eager, compiled = (
        Problem([600, 40], op=op, quantized=[True, False]),
        Problem([600, 40], op=op, quantized=[True, False]),
    )
    options = eager.options
    function = {"adam": "adam_q_", "ademamix": "ademamix_q_"}.get(op, "momentum_q_")

    def step(*arguments):
        getattr(torch.ops.slkernels, function)(*arguments, **options)
        return [p * 2 for p in arguments[0]]

    want = step(*eager.arguments())
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled.arguments())
    assert eager.same_as(compiled) and all(same_bits(a, b) for a, b in zip(want, got, strict=True))


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
        ({"codec": "dyn8u"}, "codec must be 'dyn8', 'lin8', 'cmp8', 'dyn4' or 'fp8', got 'dyn8u'"),
        ({"codec": "dyn4"}, r"m\[0\] must be contiguous uint8 with 300 elements, got uint8 \[600\]"),
        ({"round_mode": 2}, r"round_mode must be 0 \(nearest even\) or 1 \(stochastic\), got 2"),
        ({"round_mode": 1}, r"round_mode 1 needs rng, int64 \[2\] = \(seed, step\)"),
        ({"round_mode": 1, "rng": torch.zeros(2)}, r"rng must be contiguous int64 \[2\] = \(seed, step\), got float32"),
        ({"block": 100}, "block must be a multiple of 16 from 16 to 4096, got 100"),
        ({"block": 8192}, "block must be a multiple of 16"),
        ({"grad_scale": torch.ones(2)}, "grad_scale must be a float32 tensor with one element"),
        ({"nonfinite": torch.ones(1)}, "nonfinite must be an int64 tensor with one element, got float32"),
    ],
)
def test_adam_option_errors(options, message):
    with pytest.raises(RuntimeError, match="slkernels::adam_q_: " + message):
        Problem([600]).run(**options)


def test_other_errors():
    p = Problem([600])
    with pytest.raises(
        RuntimeError, match="momentum_q_: rule must be 'lion', 'sgd', 'nesterov' or 'signum', got 'rms'"
    ):
        Problem([600], op="lion").run(rule="rms")
    p.master_lo = [torch.zeros(600, dtype=torch.int16)]
    with pytest.raises(RuntimeError, match=r"params\[0\] must be bfloat16 to have a master_lo, got float32"):
        p.run()
    p = Problem([600], torch.bfloat16)
    for low in (torch.zeros(600), torch.zeros(599, dtype=torch.int8)):
        p.master_lo = [low]
        with pytest.raises(RuntimeError, match=r"master_lo\[0\] must be contiguous int16 or int8 with 600 elements"):
            p.run()
    p.master_lo = [low, low]
    with pytest.raises(RuntimeError, match="master_lo must have as many tensors as params, 1, got 2"):
        p.run()
    states = [part for s in p.states.values() for part in s]
    hyper = {k: v for k, v in p.options.items() if k != "weight_decay"}
    for out, message in (
        (torch.zeros(600).half(), r"out\[0\] must have its gradient's dtype bfloat16 or float32, got float16"),
        (torch.zeros(20, 30), r"out\[0\] must have its gradient's shape \[600\], got \[20, 30\]"),
        (torch.zeros(1200)[::2], r"out\[0\] must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match="adam_q_dir_: " + message):
            slkernels.adam_q_dir_(p.grads, *states, [out], p.step, **hyper)
