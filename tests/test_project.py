"""project, project_back, project_back_add_, apollo_scale_update_."""

from __future__ import annotations

import math

import pytest
import slkernels
import torch
from harness import FLOATS, Inputs, OpCase, assert_bitwise_equal
from op_tests import ErrorCase, OpTests
from slkernels.reference import project as reference
from slkernels.reference.philox import rounding_bits
from torch import Tensor

ops = torch.ops.slkernels

# id: n, m, rank of left, rank of right, small
SHAPES = {
    "right": (7, 5, 0, 3, True),
    "left": (5, 7, 3, 0, True),
    "both": (6, 5, 2, 3, True),
    "both_wide": (4, 9, 3, 2, True),
    "ones": (1, 1, 1, 1, True),
    "no_rows": (0, 5, 0, 3, True),
    "no_columns": (5, 0, 3, 0, True),
    "rank_0": (4, 5, 0, 0, True),
    "primes": (61, 53, 13, 17, False),
    "rows_5461": (5461, 19, 0, 11, False),
    "columns_5461": (19, 5461, 11, 0, False),
    "columns_2736": (23, 2736, 0, 16, False),
    "long": (2736, 67, 7, 5, False),
}


def factors(inputs: Inputs, n: int, m: int, left: int, right: int) -> tuple[Tensor | None, Tensor | None]:
    if left == right == 0:
        return None, inputs.tensor(0, m)
    return (
        inputs.tensor(n, left, scale=max(n, 1) ** -0.5) if left else None,
        inputs.tensor(right, m, scale=max(m, 1) ** -0.5) if right else None,
    )


def make_cases() -> list[OpCase]:
    cases = []
    for name, (n, m, left, right, small) in SHAPES.items():

        def make(inputs: Inputs, back: bool, n=n, m=m, left=left, right=right) -> tuple:
            both = factors(inputs, n, m, left, right)
            if not back:
                return inputs.tensor(n, m), *both
            return inputs.tensor(left or n, right or (0 if left == 0 else m)), *both

        for op, back in (("project", False), ("project_back", True)):
            if back and not small and name != "primes":
                continue  # the same two dense products
            cases.append(
                OpCase(
                    op=op,
                    id=f"{op}_{name}",
                    make=lambda inputs, make=make, back=back: make(inputs, back),
                    reference=getattr(reference, op),
                    terms=max(n, m),
                    roundings=2,  # of the first of two products
                    small=small,
                    twice=small,
                    dense=True,
                    exact=bool(n and m and (left or right)),
                )
            )
    return cases


def call_project(op: str = "project", **changes) -> Tensor:
    a = {"G": torch.ones(4, 5), "left": torch.ones(4, 2), "right": torch.ones(3, 5)} | changes
    return getattr(ops, op)(*a.values())


def call_add(**changes) -> None:
    a = {"W": torch.ones(4, 5), "N": torch.ones(4, 3), "lr": torch.tensor(0.1), "left": None, "right": torch.ones(3, 5)}
    rest = {k: changes.pop(k) for k in list(changes) if k not in a}
    ops.project_back_add_(*(a | changes).values(), **rest)


def call_apollo(**changes) -> None:
    a = {"W": torch.ones(5, 4), "G": torch.ones(5, 4), "N": torch.ones(5, 2), "R": torch.ones(5, 2)}
    a |= {"norm": torch.zeros(1), "lr": torch.tensor(0.1), "side": "auto"}
    rest = {k: changes.pop(k) for k in list(changes) if k not in a}
    ops.apollo_scale_update_(*(a | changes).values(), **rest)


def error(op: str, id: str, message: str, call, **changes) -> ErrorCase:
    return ErrorCase(op, f"{op}_{id}", lambda: call(**changes), message)


class TestProject(OpTests):
    cases = make_cases()
    errors = [  # noqa: RUF012
        error("project", "vector", "G must be [n, m], got [4]", call_project, G=torch.ones(4)),
        error("project", "none", "left or right must be given", call_project, left=None, right=None),
        error("project", "left", "left must be [4, 2], got [5, 2]", call_project, left=torch.ones(5, 2)),
        error("project", "right", "right must be [3, 5], got [3, 4]", call_project, right=torch.ones(3, 4)),
        error(
            "project",
            "dtype",
            "right must have G's dtype float32, got bfloat16",
            call_project,
            right=torch.ones(3, 5).bfloat16(),
        ),
        error(
            "project",
            "int",
            "G must be float32, bfloat16, float16 or float64, got int64",
            call_project,
            G=torch.ones(4, 5).long(),
        ),
        error(
            "project_back_add_",
            "W",
            "W must be float32, bfloat16 or float16, got float64",
            call_add,
            W=torch.ones(4, 5).double(),
        ),
        error("project_back_add_", "contiguous", "W must be contiguous", call_add, W=torch.ones(5, 4).t()),
        error("project_back_add_", "N", "N must be [4, rank], got [5, 3]", call_add, N=torch.ones(5, 3)),
        error("project_back_add_", "right", "right must be [3, 5], got [2, 5]", call_add, right=torch.ones(2, 5)),
        error(
            "project_back_add_",
            "N_dtype",
            "N must have W's dtype float32 or be float32, got bfloat16",
            call_add,
            N=torch.ones(4, 3).bfloat16(),
        ),
        error(
            "project_back_add_",
            "lr",
            "lr must be a float32 tensor with one element, got float64 []",
            call_add,
            lr=torch.tensor(0.1).double(),
        ),
        error(
            "project_back_add_",
            "mode",
            "round_mode must be 0 (nearest even) or 1 (stochastic), got 2",
            call_add,
            round_mode=2,
        ),
        error("project_back_add_", "rng", "round_mode 1 needs rng, int64 [2] = (seed, step)", call_add, round_mode=1),
        error(
            "project_back_add_",
            "rng_shape",
            "rng must be int64 [2], got int64 [3]",
            call_add,
            round_mode=1,
            rng=torch.zeros(3).long(),
        ),
        error("apollo_scale_update_", "G", "G must be [5, 4], got [4, 4]", call_apollo, G=torch.ones(4, 4)),
        error(
            "apollo_scale_update_",
            "G_dtype",
            "G must have W's dtype float32, got float16",
            call_apollo,
            G=torch.ones(5, 4).half(),
        ),
        error("apollo_scale_update_", "R", "R must be [5, 2], got [4, 2]", call_apollo, R=torch.ones(4, 2)),
        error("apollo_scale_update_", "N", "N must be [5, 2], got [5, 3]", call_apollo, N=torch.ones(5, 3)),
        error("apollo_scale_update_", "side", "side must be auto, left or right, got up", call_apollo, side="up"),
        error("apollo_scale_update_", "kind", "kind must be channel or tensor, got row", call_apollo, kind="row"),
        error(
            "apollo_scale_update_",
            "left",
            "left must not be given where side is right",
            call_apollo,
            left=torch.ones(5, 2),
        ),
        error(
            "apollo_scale_update_",
            "norm",
            "norm must be a float32 tensor with one element, got float32 [2]",
            call_apollo,
            norm=torch.zeros(2),
        ),
    ]


# ---- project_back_add_ ----------------------------------------------------------------------------------------------

LR, ALPHA, DECAY = 0.3, 0.25, 0.1


def scalar(x: float, device="cpu") -> Tensor:
    return torch.tensor(x, dtype=torch.float32, device=device)


def rng(seed: int = 5, step: int = 1, device="cpu") -> Tensor:
    return torch.tensor([seed, step], device=device)


def assert_update(got: Tensor, want: Tensor, in_torch: Tensor, size: Tensor, dtype: torch.dtype) -> None:
    """got is want rounded to W's dtype once; size bounds the terms, of which the product is rounded to ``dtype``."""
    ulp, product = torch.finfo(got.dtype).eps / 2, torch.finfo(dtype).eps / 2
    error = (got.double() - want).abs()
    allowed = 1.01 * ulp * want.abs() + (1.5 * product + 40 * 2.0**-24) * size + torch.finfo(got.dtype).smallest_normal
    assert (error <= allowed).all(), float((error / allowed).max())
    torch_error = (in_torch.double() - want).abs().max()
    assert error.max() <= 2 * torch_error + ulp * want.abs().max()


@pytest.mark.parametrize("name", ["right", "left", "both", "ones", "primes", "columns_5461", "columns_2736", "long"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["same", "N_float32"])
def test_numeric_back_add(name: str, dtype: torch.dtype, wide: bool, device: torch.device) -> None:
    n, m, left, right, _ = SHAPES[name]
    inputs = Inputs(dtype, device)
    W = inputs.tensor(n, m)
    inputs.dtype = torch.float32 if wide else dtype
    L, P = factors(inputs, n, m, left, right)
    N = inputs.tensor(left or n, right or m)
    for decay in (0.0, DECAY):
        args = {"alpha": ALPHA, "weight_decay": decay}
        double = [None if t is None else t.double() for t in (W, N, L, P)]
        want = reference.project_back_add(double[0], double[1], LR, *double[2:], **args)
        size = (
            LR * ALPHA * reference.project_back(*[None if t is None else t.abs() for t in double[1:]]) + double[0].abs()
        )
        in_torch = reference.project_back_add(W, N, LR, L, P, **args)
        got = W.clone()
        ops.project_back_add_(got, N, scalar(LR, device), L, P, **args)
        assert_update(got, want, in_torch, size, inputs.dtype)
        strided = got.copy_(W)
        layouts = [None if t is None else t.t().contiguous().t() for t in (L, P)]
        ops.project_back_add_(strided, N.t().contiguous().t(), scalar(LR, device), *layouts, **args)
        assert_update(strided, want, in_torch, size, inputs.dtype)


def integer_problem(n: int, m: int, device="cpu") -> tuple[Tensor, Tensor, Tensor]:
    """W, N, right whose product is exact in every dtype."""
    gen = torch.Generator().manual_seed(3)
    W = torch.randn(n, m, generator=gen)
    N = torch.randint(-2, 3, (n, 8), generator=gen).float()
    right = torch.randint(-2, 3, (8, m), generator=gen).float()
    return W.to(device), N.to(device), right.to(device)


def fma_update(W: Tensor, U: Tensor, lr: float, alpha: float, decay: float) -> Tensor:
    """W decay + step U as the kernels do it: float32 scalars, one product, one fused multiply-add."""
    lr32, one = torch.tensor(lr), torch.tensor(1.0)
    scale = (one.double() - lr32.double() * torch.tensor(decay).double()).float()
    step = -lr32 * torch.tensor(alpha)
    return ((W.float() * scale).double() + step.double() * U.double()).float()


def stochastic(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """x float32 to a 16-bit dtype with given random bits: the definition, in float64."""
    wide = x.double()
    exponent = torch.frexp(wide)[1].double() - 1  # |x| in [2^e, 2^(e + 1))
    info = torch.finfo(dtype)
    last = torch.pow(2.0, exponent.clamp(min=math.log2(info.smallest_normal)) + math.log2(info.eps))
    magnitude = wide.abs() / last
    if dtype == torch.bfloat16:  # adding the bits below the last one
        rounded = (magnitude + bits / 65536).floor()
    else:
        subnormal = wide.abs() < info.smallest_normal
        signed = wide / last
        down = signed.floor()
        rounded = torch.where(
            subnormal, (down + (signed - down > bits / 65536)) * wide.sign(), (magnitude + (bits >> 3) / 8192).floor()
        )
    return (rounded * last * wide.sign()).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (9, 64), (4, 2736), (2, 5461)], ids=str)
def test_numeric_stochastic_rounding_is_its_definition(dtype: torch.dtype, shape, device: torch.device) -> None:
    W, N, right = integer_problem(*shape, device)
    W = W.to(dtype)
    W.view(-1)[:4] = torch.tensor([0.0, -0.0, 3e-6, -3e-6])
    got = W.clone()
    ops.project_back_add_(
        got,
        N.to(dtype),
        scalar(1e-3, device),
        None,
        right.to(dtype),
        alpha=0.01,
        weight_decay=0.5,
        round_mode=1,
        rng=rng(7, 9, device),
    )
    x = fma_update(W, N @ right, 1e-3, 0.01, 0.5)
    want = stochastic(x, rounding_bits(W.numel(), 7, 9).view(shape).to(device), dtype)
    assert_bitwise_equal(got, want, "stochastic")


def test_numeric_stochastic_rounding_is_unbiased() -> None:
    """Updates of a sixteenth of W's last bit: nearest rounding loses them all, stochastic rounding none on average."""
    W = torch.ones(64, 256).bfloat16()
    N, right = torch.ones(64, 1).bfloat16(), torch.ones(1, 256).bfloat16()
    lr = scalar(torch.finfo(torch.bfloat16).eps / 2 / 16)
    nearest = W.clone()
    for step in range(64):
        ops.project_back_add_(nearest, N, lr, None, right)
        ops.project_back_add_(W, N, lr, None, right, round_mode=1, rng=rng(1, step))
    assert (nearest == 1).all()
    moved = float((1 - W.double()).mean()) / (64 * float(lr))
    assert abs(moved - 1) < 0.05, moved


def test_float16_small_steps_do_not_underflow() -> None:
    """-lr alpha times N is 1e-9 here: folded into a float16 N it would be 0."""
    W = torch.zeros(4, 8).half()
    N, right = torch.full((4, 1), 1e-3).half(), torch.full((1, 8), 1e3).half()
    ops.project_back_add_(W, N, scalar(1e-6), None, right)
    torch.testing.assert_close(W.double(), torch.full((4, 8), -1e-6).double(), rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_found_inf_changes_no_bit(dtype: torch.dtype, device: torch.device) -> None:
    W = torch.tensor([[0.0, -0.0, math.nan, math.inf, 1.0]], device=device).to(dtype)
    N, right = torch.full((1, 1), math.nan, device=device).to(dtype), torch.ones(1, 5, device=device).to(dtype)
    got, norm = W.clone(), scalar(2.0, device)
    ops.project_back_add_(got, N, scalar(0.1, device), None, right, weight_decay=1.0, found_inf=scalar(1.0, device))
    ops.apollo_scale_update_(got, W, N, N, norm, scalar(0.1, device), "right", found_inf=scalar(3.0, device))
    bits = {2: torch.int16, 4: torch.int32}[W.element_size()]
    assert torch.equal(got.view(bits), W.view(bits)) and float(norm) == 2.0
    ops.project_back_add_(got, N, scalar(0.1, device), None, right, found_inf=scalar(0.0, device))
    assert got.isnan().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_updates_do_not_depend_on_threads(dtype: torch.dtype, threads) -> None:
    W, N, right = (t.to(dtype) for t in integer_problem(300, 700))
    results = []
    for count in (1, 2, 3):
        threads(count)
        w, v, norm = W.clone(), W.clone(), torch.zeros(1)
        ops.project_back_add_(w, N, scalar(LR), None, right, round_mode=1, rng=rng())
        ops.apollo_scale_update_(v, W, N, N, norm, scalar(LR), "right", round_mode=1, rng=rng())
        results.append((w, v, norm))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_bitwise_equal(b, a, "threads")


def test_a_slice_boundary_is_not_visible() -> None:
    """W of more than one slice of rows: the result is that of its parts."""
    W, N, right = (t.bfloat16() for t in integer_problem(900, 5461))
    whole = W.clone()
    ops.project_back_add_(whole, N, scalar(LR), None, right, weight_decay=DECAY)
    for rows in (slice(0, 300), slice(300, 900)):
        part = W[rows].clone()
        ops.project_back_add_(part, N[rows], scalar(LR), None, right, weight_decay=DECAY)
        assert_bitwise_equal(whole[rows], part, str(rows))


# ---- apollo_scale_update_ -------------------------------------------------------------------------------------------


def apollo_problem(n: int, m: int, rank: int, side: str, dtype: torch.dtype, step: int = 0, device="cpu") -> tuple:
    inputs = Inputs(dtype, device, seed=step)
    G, P = inputs.tensor(n, m), inputs.tensor(*((n, rank) if side == "left" else (rank, m)))
    R = P.t() @ G if side == "left" else G @ P.t()
    return G, R.sign() * R.abs().sqrt(), R


@pytest.mark.parametrize("kind", ["channel", "tensor"])
@pytest.mark.parametrize("shape", [(7, 5, 3), (5, 7, 3), (61, 53, 1), (40, 5461, 8), (2736, 33, 8)], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_numeric_apollo(kind: str, shape, side: str, dtype: torch.dtype, device: torch.device) -> None:
    """Three steps, in which the limiter is inactive, active, and inactive again."""
    n, m, rank = shape
    W = Inputs(dtype, device, seed=9).tensor(n, m)
    norm, want_norm = torch.zeros(1, device=device), 0.0
    for step, gain in enumerate((1.0, 3.0, 0.5)):
        G, N, R = apollo_problem(n, m, rank, side, dtype, step, device)
        N = (N.double() * gain).to(dtype)
        args = {"kind": kind, "alpha": ALPHA, "weight_decay": DECAY}
        double = [t.double() for t in (W, G, N, R)]
        want, want_norm = reference.apollo_scale_update(*double, want_norm, LR, side, **args)
        still, _ = reference.apollo_scale_update(*double, want_norm, 0.0, side, **args)
        in_torch, _ = reference.apollo_scale_update(W, G, N, R, float(norm), LR, side, **args)
        ops.apollo_scale_update_(W, G, N, R, norm, scalar(LR, device), side, **args)
        size = (want - still).abs() + still.abs()
        assert_update(W, want, in_torch, size, torch.float32)
        assert abs(float(norm) / want_norm - 1) < 1e-5
        want_norm = float(norm)


@pytest.mark.parametrize("shape", [(40, 24, 5), (24, 40, 5), (300, 123, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["channel", "tensor"])
def test_numeric_fira_residual(shape, dtype: torch.dtype, kind: str, device: torch.device) -> None:
    """The residual outside the subspace is scaled and limited, the update inside is N's."""
    n, m, rank = shape
    gen = torch.Generator().manual_seed(1)
    W = torch.randn(n, m, generator=gen).to(device, dtype)
    norm, want_norm = torch.zeros(1, device=device), 0.0
    for gain in (1.0, 2.0):
        G = (gain * torch.randn(n, m, generator=gen)).to(device, dtype)
        P = slkernels.randomized_range(G, rank)
        side = {"left": P} if n < m else {"right": P}
        R = reference.project(G.float(), **side)
        N = gain * R.sign() * R.abs().sqrt()
        args = {"kind": kind, "alpha": ALPHA, "weight_decay": DECAY}
        double = {k: v.double() for k, v in side.items()}
        want, want_norm = reference.apollo_scale_update(
            *(t.double() for t in (W, G, N, R)), want_norm, LR, **args, **double
        )
        in_torch, _ = reference.apollo_scale_update(W, G.float(), N, R, float(norm), LR, **args, **side)
        before = W.clone()
        ops.apollo_scale_update_(W, G, N, R, norm, scalar(LR, device), **args, **side)
        size = (want - before.double()).abs() + 3 * before.double().abs().max()
        assert_update(W, want, in_torch.to(dtype), size, torch.float32)
        assert abs(float(norm) / want_norm - 1) < 1e-4
        want_norm = float(norm)


def test_apollo_a_step_without_gradient_does_not_stop_learning() -> None:
    """The published limiter lets the norm after a zero gradient grow by 1 % a step from 1e-8."""
    G, N, R = apollo_problem(6, 4, 2, "right", torch.float32)
    W, norm = torch.zeros(6, 4), torch.ones(1)
    zeros = torch.zeros_like
    ops.apollo_scale_update_(W, zeros(G), zeros(N), zeros(R), norm, scalar(0.1), "right")
    assert float(norm) == 0 and (W == 0).all()
    ops.apollo_scale_update_(W, G, N, R, norm, scalar(0.1), "right")
    want, _ = reference.apollo_scale_update(zeros(W), G, N, R, 0.0, 0.1, "right")
    torch.testing.assert_close(W, want)


def test_apollo_a_nan_does_not_stay_in_the_limiter() -> None:
    G, N, R = apollo_problem(6, 4, 2, "right", torch.float32)
    W, norm = torch.zeros(6, 4), torch.full((1,), 5.0)
    broken = G.clone()
    broken[2, 1] = math.nan
    ops.apollo_scale_update_(W, broken, N, R, norm, scalar(0.1), "right")
    assert float(norm) == 5.0 and W.isnan().sum() == 1 and W[2, 1].isnan()


def test_apollo_limiter_off() -> None:
    G, N, R = apollo_problem(6, 4, 2, "right", torch.float32)
    W, norm = torch.zeros(6, 4), torch.full((1,), 1e-3)
    ops.apollo_scale_update_(W, G, N, R, norm, scalar(0.1), "right", limiter=0.0)
    want, want_norm = reference.apollo_scale_update(torch.zeros(6, 4), G, N, R, 0.0, 0.1, "right")
    torch.testing.assert_close(W, want)
    assert abs(float(norm) / want_norm - 1) < 1e-6


def test_apollo_matches_the_published_formula() -> None:
    """apollo_torch's step with scale at the end: growth at most 1.01 after the first step."""
    side, norms = "right", []
    W, norm = torch.zeros(30, 20), torch.zeros(1)
    for step, gain in enumerate((1.0, 10.0, 10.0)):
        G, N, R = apollo_problem(30, 20, 4, side, torch.float32, step)
        ops.apollo_scale_update_(W, G, gain * N, R, norm, scalar(0.1), side, limiter=1.01)
        norms.append(float(norm))
    assert norms[1] / norms[0] == pytest.approx(1.01, abs=1e-5)
    assert norms[2] / norms[1] == pytest.approx(1.01, abs=1e-5)


# ---- torch's own rules ----------------------------------------------------------------------------------------------


def update_calls(device="cpu") -> dict:
    W, N, right = integer_problem(6, 5, device)
    lr = scalar(LR, device)
    return {
        "project_back_add_": ((W, N, lr, None, right), {"alpha": ALPHA, "round_mode": 1, "rng": rng(device=device)}),
        "apollo_scale_update_": ((W, W.clone(), N, N.clone(), torch.zeros(1, device=device), lr), {"kind": "tensor"}),
    }


@pytest.mark.parametrize("op", ["project_back_add_", "apollo_scale_update_"])
def test_updates_opcheck(op: str, device: torch.device) -> None:
    args, kwargs = update_calls(device)[op]
    utils = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(getattr(ops, op).default, args, kwargs, test_utils=utils)


@pytest.mark.parametrize("op", ["project_back_add_", "apollo_scale_update_"])
def test_updates_compile(op: str, device: torch.device) -> None:
    args, kwargs = update_calls(device)[op]
    compiled = torch.compile(getattr(slkernels, op), fullgraph=True, backend="aot_eager")
    eager_args = [a.clone() if isinstance(a, Tensor) else a for a in args]
    compiled(*args, **kwargs)
    getattr(slkernels, op)(*eager_args, **kwargs)
    for a, b in zip(args, eager_args, strict=True):
        if isinstance(a, Tensor):
            assert_bitwise_equal(a, b, op)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_empty_weights(shape, device: torch.device) -> None:
    n, m = shape
    W = torch.zeros(n, m, device=device)
    lr = scalar(LR, device)
    ops.project_back_add_(W, torch.zeros(n, 2, device=device), lr, None, torch.zeros(2, m, device=device))
    R = torch.zeros(n, 2, device=device)
    ops.apollo_scale_update_(W, W.clone(), R, R.clone(), torch.zeros(1, device=device), lr, "right")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_updates_do_not_wait_for_the_device() -> None:
    W, N, right = integer_problem(64, 48, "cuda")
    lr, norm = scalar(LR, "cuda"), torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.project_back_add_(W, N, lr, None, right, weight_decay=DECAY)
        ops.apollo_scale_update_(W, W.clone(), N, N.clone(), norm, lr, "right")
    finally:
        torch.cuda.set_sync_debug_mode("default")
