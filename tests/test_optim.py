"""Family `optim`: the fused steps."""

import os
import subprocess
import sys

import pytest
import slkernels
import torch
from optim_data import BLOCKS, FLOATS, PAIRS, random_tensor, same_bits
from optim_problem import HYPER, MOMENTUM, OPS, RULES, SIZES, Problem, cancel_nothing, check_step
from slkernels.reference import optim as reference
from slkernels.reference import optim_codec
from slkernels.reference.philox import rounding_bits

ISAS = slkernels.build_info()["cpu_isas"]


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
