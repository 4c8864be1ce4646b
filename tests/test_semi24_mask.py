"""maskllm24, gate_to_mask, maskllm_prior, srste_grad_."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys

import pytest
import slkernels
import torch
from harness import FLOATS, LAYOUTS, Inputs, OpCase, assert_bitwise_equal
from op_tests import ErrorCase, OpTests
from slkernels.reference import semi24_mask as reference
from torch import Tensor

ops = torch.ops.slkernels

KAPPA, TAU, SEED = 1.5, 0.5, 2**40 + 17

# id: n, m, small
SHAPES = {
    "groups": (3, 8, True),
    "one": (1, 1, True),
    "ragged": (5, 7, True),
    "ragged_6": (2, 6, True),
    "no_rows": (0, 8, True),
    "no_columns": (3, 0, True),
    "vectors": (17, 260, False),
    "row_5461": (3, 5461, False),
    "rows_2736": (2736, 12, False),
    "primes": (61, 53, False),
}


def gate_dtype(dtype: torch.dtype, other: bool) -> torch.dtype:
    """W's dtype, or float32 for 16-bit weights: what MaskLLM trains."""
    return torch.float32 if other and dtype in (torch.bfloat16, torch.float16) else dtype


def magnitude(W: Tensor, gate: Tensor, kappa: Tensor, tau: Tensor, seed: Tensor) -> Tensor:
    """|W| times 1 + the largest exponent of a group, whose rounding is a relative error of p. Its derivative by a gate
    bounds the op's: kappa / tau times the sum of |dY W| over the group."""
    exponent = (float(kappa) * gate.sum(-1) + 20) / float(tau)
    return W * (1 + exponent).repeat_interleave(4, 1)[:, : W.shape[1]]


def make_cases() -> list[OpCase]:
    cases = []
    for name, (n, m, small) in SHAPES.items():
        for other in (False, True):
            if other and name not in ("ragged", "vectors"):
                continue

            def make(inputs: Inputs, n=n, m=m, other=other) -> tuple:
                gate = inputs.tensor(n, (m + 3) // 4, 6).to(gate_dtype(inputs.dtype, other))
                scalars = (torch.tensor(x, device=inputs.device) for x in (KAPPA, TAU, SEED))
                return inputs.tensor(n, m), gate, *scalars

            cases.append(
                OpCase(
                    op="maskllm24",
                    id=f"maskllm24_{name}{'_float32_gates' * other}",
                    make=make,
                    reference=reference.maskllm24,
                    magnitude=magnitude,
                    terms=12,
                    small=small,
                    exact=False,
                )
            )
    return cases


def call(op: str = "maskllm24", **changes) -> object:
    a = {"W": torch.ones(4, 10), "gate": torch.ones(4, 3, 6), "kappa": torch.tensor(1.0), "tau": torch.tensor(1.0)}
    a["seed"] = torch.tensor(1)
    first = [torch.ones(4, 10)] if op == "maskllm24_backward" else []
    first = [changes.pop("dY")] if "dY" in changes else first
    return getattr(ops, op)(*first, *(a | changes).values())


def call_srste(**changes) -> None:
    a = {"grad": torch.ones(4, 6), "W": torch.ones(4, 6), "mask": torch.ones(4, 6, dtype=torch.bool)}
    ops.srste_grad_(*(a | changes).values(), 0.1)


def error(op: str, id: str, message: str, **changes) -> ErrorCase:
    calls = {"srste_grad_": call_srste, "gate_to_mask": ops.gate_to_mask}
    function = calls.get(op, lambda **c: call(op, **c))
    return ErrorCase(op, f"{op}_{id}", lambda: function(**changes), message)


class TestMask(OpTests):
    cases = make_cases()
    errors = [  # noqa: RUF012
        error("maskllm24", "W", "W must be [n, m], got [4]", W=torch.ones(4)),
        error(
            "maskllm24", "int", "W must be float32, bfloat16, float16 or float64, got int64", W=torch.ones(4, 10).long()
        ),
        error("maskllm24", "gate", "gate must be [4, 3, 6], got [4, 2, 6]", gate=torch.ones(4, 2, 6)),
        error(
            "maskllm24",
            "double_gate",
            "gate must be float64 if and only if W is, got gate float64 and W float32",
            gate=torch.ones(4, 3, 6).double(),
        ),
        error("maskllm24", "kappa", "kappa must be float32 with one element, got int64 []", kappa=torch.tensor(1)),
        error("maskllm24", "tau", "tau must be float32 with one element, got float32 [2]", tau=torch.ones(2)),
        error("maskllm24", "seed", "seed must be int64 with one element, got float32 []", seed=torch.tensor(1.0)),
        error("maskllm24_backward", "dY", "dY must be [4, 10], got [4, 9]", dY=torch.ones(4, 9)),
        error(
            "maskllm24_backward", "dtype", "dY must have W's dtype float32, got float64", dY=torch.ones(4, 10).double()
        ),
        error("gate_to_mask", "gate", "gate must be [4, 3, 6], got [4, 2, 6]", gate=torch.ones(4, 2, 6), m=9),
        error("gate_to_mask", "matrix", "gate must be [n, 3, 6], got [4, 6]", gate=torch.ones(4, 6), m=9),
        error("gate_to_mask", "m", "m must not be negative, got -1", gate=torch.ones(4, 0, 6), m=-1),
        error("srste_grad_", "W", "W must be [4, 6], got [4, 5]", W=torch.ones(4, 5)),
        error("srste_grad_", "dtype", "W must have grad's dtype float32, got bfloat16", W=torch.ones(4, 6).bfloat16()),
        error("srste_grad_", "mask", "mask must be bool [4, 6], got float32 [4, 6]", mask=torch.ones(4, 6)),
        error("srste_grad_", "contiguous", "grad must be contiguous", grad=torch.ones(6, 4).t()),
    ]


# ---- noise ----------------------------------------------------------------------------------------------------------


def soft_mask(gate: Tensor, kappa: float, tau: float, seed: int) -> Tensor:
    """[groups, 4]"""
    return slkernels.maskllm24(torch.ones(1, 4 * gate.shape[0]), gate[None], kappa, tau, seed).view(-1, 4)


def gumbel_mask(gate: Tensor, kappa: float, tau: float) -> Tensor:
    """MaskLLM's own: independent Gumbel noise (learnable_sparsity/differentiable_mask.py)."""
    noise = -torch.empty_like(gate).exponential_().log()
    return torch.softmax((gate * kappa + noise) / tau, -1) @ reference.patterns(gate.dtype)


def test_hard_choices_follow_the_softmax_of_the_gates() -> None:
    """The Gumbel-max property, by chi-square with 5 degrees of freedom (99.9 %: 20.5)."""
    groups = 60000
    row = torch.tensor([0.3, -1.0, 0.8, 0.0, 1.2, -0.4])
    mask = soft_mask(row.repeat(groups, 1), 1.0, 1e-3, 5)
    codes = (mask @ reference.patterns(torch.float32).t()).argmax(-1)
    counts, expected = codes.bincount(minlength=6), groups * torch.softmax(row, 0)
    assert float(((counts - expected) ** 2 / expected).sum()) < 20.5


@pytest.mark.parametrize("tau", [0.1, 1.0, 4.0])
def test_soft_masks_are_distributed_as_with_independent_gumbel_noise(tau: float) -> None:
    """Kolmogorov-Smirnov distance of each column's mask, and of the product of two (99.9 %: 1.95 sqrt(2 / n))."""
    groups = 40000
    gate = torch.tensor([0.3, -1.0, 0.8, 0.0, 1.2, -0.4]).repeat(groups, 1)
    ours, theirs = soft_mask(gate, 1.5, tau, 6), gumbel_mask(gate, 1.5, tau)
    for mine, other in [
        *zip(ours.t(), theirs.t(), strict=True),
        (ours[:, 0] * ours[:, 3], theirs[:, 0] * theirs[:, 3]),
    ]:
        both, order = torch.cat([mine, other]).mul(1e5).round().sort()  # masks near 1 differ in their last bits
        steps = torch.cat([torch.ones(groups), -torch.ones(groups)])[order].double().cumsum(0) / groups
        last = torch.cat([both.diff() > 0, torch.ones(1, dtype=torch.bool)])  # of equal numbers
        assert float(steps[last].abs().max()) < 1.95 * (2 / groups) ** 0.5


def test_noise_is_a_function_of_seed_and_group() -> None:
    W, gate = torch.randn(6, 40), torch.randn(6, 10, 6)
    first = slkernels.maskllm24(W, gate, KAPPA, TAU, 1)
    assert_bitwise_equal(slkernels.maskllm24(W, gate, KAPPA, TAU, 1), first, "the same seed")
    assert (slkernels.maskllm24(W, gate, KAPPA, TAU, 2) != first).float().mean() > 0.99
    ones, zeros = torch.ones(50, 400), torch.zeros(50, 100, 6)
    masks = slkernels.maskllm24(ones, zeros, KAPPA, TAU, 1).view(-1, 4)
    assert masks.unique(dim=0).shape[0] == 5000
    assert_bitwise_equal(slkernels.maskllm24(ones[:3], zeros[:3], KAPPA, TAU, 1).view(-1, 4), masks[:300], "rows")
    narrow = slkernels.maskllm24(ones[:, :399], zeros, KAPPA, TAU, 1)
    assert_bitwise_equal(narrow, masks.view(50, 400)[:, :399], "ragged")


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, 2**32])
def test_spacings_use_all_of_the_seed(seed: int) -> None:
    gate = torch.zeros(64, 6, dtype=torch.float64)
    got = slkernels.maskllm24(torch.ones(1, 256).double(), gate[None], 1.0, 1.0, seed)
    want = reference.maskllm24(torch.ones(1, 256).double(), gate[None], 1.0, 1.0, seed)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)


def test_numbers_are_tensors() -> None:
    W, gate = torch.randn(3, 8), torch.randn(3, 2, 6)
    tensors = torch.tensor(KAPPA), torch.tensor([TAU]), torch.tensor([[SEED]])
    assert_bitwise_equal(slkernels.maskllm24(W, gate, KAPPA, TAU, SEED), ops.maskllm24(W, gate, *tensors), "scalars")


def bits() -> str:
    gen = torch.Generator().manual_seed(3)
    digest = hashlib.sha256()
    for dtype in FLOATS:
        W, dY = (torch.randn(37, 531, generator=gen).to(dtype) for _ in range(2))
        gate = torch.randn(37, 133, 6, generator=gen) * 3
        for result in (
            [slkernels.maskllm24(W, gate, KAPPA, 0.3, SEED)],
            ops.maskllm24_backward(dY, W, gate, torch.tensor(KAPPA), torch.tensor(0.3), torch.tensor(SEED)),
            [slkernels.gate_to_mask(gate, 531)],
        ):
            for t in result:
                digest.update(t.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_the_same_bits_on_every_instruction_set() -> None:
    code = "import test_semi24_mask; print(test_semi24_mask.bits())"
    compared = 0
    for isa in slkernels.build_info()["cpu_isas"]:
        environment = {**os.environ, "SLKERNELS_CPU_ISA": isa}
        here = os.path.dirname(__file__)
        done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=here, capture_output=True, text=True)
        if done.returncode == 0:
            compared += 1
            assert done.stdout.strip() == bits(), isa
    assert compared >= 1


# ---- values ---------------------------------------------------------------------------------------------------------


def test_numeric_annealed_masks_are_the_gates_masks(device: torch.device) -> None:
    """With the noise drowned by kappa, the soft mask is the hard one, to the last bit."""
    gate = torch.randn(9, 50, 6, device=device)
    W = torch.randn(9, 197, device=device)
    top = gate.topk(2, -1).values
    clear = (top[..., 0] - top[..., 1] > 0.1).repeat_interleave(4, 1)[:, :197]
    want = W * slkernels.gate_to_mask(gate, 197)
    got = slkernels.maskllm24(W, gate, 5e3, 0.05, 3)
    assert clear.float().mean() > 0.8
    assert_bitwise_equal(torch.where(clear, got, 0), torch.where(clear, want, 0), "mask")


def test_numeric_special_gates(device: torch.device) -> None:
    """As the formula: NaN and +infinity make a group NaN, -infinity excludes a pattern; neighbours do not notice."""
    gate = torch.zeros(1, 40, 6, device=device)
    gate[0, 3, 2], gate[0, 17, 4] = math.nan, math.inf
    gate[0, 20, 1:] = -math.inf
    W = torch.ones(1, 160, device=device)
    got = slkernels.maskllm24(W, gate, 1.0, 1.0, 4).view(40, 4)
    want = reference.maskllm24(W.double(), gate.double(), 1.0, 1.0, 4).view(40, 4)
    assert got.isnan().any(1).nonzero().flatten().tolist() == [3, 17]
    assert torch.equal(got.isnan(), want.isnan())
    assert got[20].tolist() == [1, 1, 0, 0]
    torch.testing.assert_close(got.nan_to_num().double(), want.nan_to_num(), rtol=1e-5, atol=1e-6)


def test_extreme_temperatures_stay_finite() -> None:
    W, gate, dY = torch.randn(8, 64), torch.randn(8, 16, 6), torch.randn(8, 64)
    for kappa, tau in ((5e2, 0.05), (1e4, 1e-3), (0.0, 4.0), (1e2, 1e4)):
        scalars = torch.tensor(kappa), torch.tensor(tau), torch.tensor(SEED)
        dgate, dW = ops.maskllm24_backward(dY, W, gate, *scalars)
        assert ops.maskllm24(W, gate, *scalars).isfinite().all() and dgate.isfinite().all() and dW.isfinite().all()


def test_backward_keeps_its_arguments_only() -> None:
    """Nothing of the size of the gates' probabilities is saved, and W's gradient is made only where it is asked for."""
    W, gate = torch.randn(8, 64), torch.randn(8, 16, 6, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = slkernels.maskllm24(W, gate, KAPPA, TAU, SEED)
    assert {t.data_ptr() for t in saved if t.numel() > 1} == {W.data_ptr(), gate.data_ptr()}
    y.sum().backward()
    dgate, dW = ops.maskllm24_backward(
        torch.ones(8, 64), W, gate.detach(), torch.tensor(KAPPA), torch.tensor(TAU), torch.tensor(SEED), True, False
    )
    assert dW.shape == (0,)
    assert_bitwise_equal(gate.grad, dgate, "d gate")


# ---- gate_to_mask, maskllm_prior ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_numeric_gate_to_mask(shape: tuple, dtype: torch.dtype, device: torch.device) -> None:
    n, m, _ = shape
    gate = torch.randint(-2, 3, (n, (m + 3) // 4, 6)).to(device, dtype)  # many ties
    gate[gate == 2] = math.nan
    gate[gate == -2] = -math.inf
    want = reference.gate_to_mask(gate, m)
    for name, layout in {"contiguous": lambda t: t, **LAYOUTS}.items():
        if name != "expanded" or n == 1:
            assert_bitwise_equal(slkernels.gate_to_mask(layout(gate), m), want, name)


def test_gate_to_mask_under_compile_and_opcheck() -> None:
    gate = torch.randn(5, 3, 6)
    torch.library.opcheck(ops.gate_to_mask.default, (gate, 11))
    compiled = torch.compile(lambda g: slkernels.gate_to_mask(g, 11), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(gate), reference.gate_to_mask(gate, 11))


@pytest.mark.parametrize("m", [64, 61])
def test_prior_moves_gates_to_the_masks_pattern(m: int) -> None:
    gate = torch.randn(500, 16, 6)
    mask = reference.gate_to_mask(torch.randn(500, 16, 6), m)
    moved = slkernels.maskllm_prior(gate, mask)
    torch.testing.assert_close(moved, reference.maskllm_prior(gate, mask))
    whole = m // 4 * 4
    same = (slkernels.gate_to_mask(moved, m) == mask)[:, :whole].reshape(500, -1, 4).all(-1)
    assert 0.93 < same.float().mean() < 0.97  # strength 3


def test_prior_of_another_shape_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"slkernels::maskllm_prior: gate must be \[5, 4, 6\], got \[5, 3, 6\]"):
        slkernels.maskllm_prior(torch.ones(5, 3, 6), torch.ones(5, 16, dtype=torch.bool))


# ---- srste_grad_ ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (7, 9), (61, 53), (3, 5461), (2, 3, 40), (40000,)], ids=str)
def test_numeric_srste_grad(shape: tuple, dtype: torch.dtype, device: torch.device) -> None:
    grad, W = (torch.randn(shape).to(device, dtype) for _ in range(2))
    mask = torch.rand(shape, device=device) < 0.5
    want = reference.srste_grad(grad.double(), W.double(), mask, 0.3)
    kept = torch.where(mask, math.nan, W)  # what is kept is not read into the sum
    for name, layout in {"contiguous": lambda t: t, **LAYOUTS}.items():
        if name == "expanded":
            continue
        got = grad.clone()
        slkernels.srste_grad_(got, layout(kept), mask, 0.3)
        eps = torch.finfo(dtype).eps
        bound = (
            eps / 2 * 1.01 * want.abs() + (2**-24 if dtype != torch.float64 else eps) * (grad.abs() + W.abs()).double()
        )
        assert ((got.double() - want).abs() <= bound).all(), name
        assert_bitwise_equal(torch.where(mask, got, 0), torch.where(mask, grad, 0), f"{name}: kept")


def test_srste_grad_under_compile_and_opcheck() -> None:
    grad, W, mask = torch.randn(5, 8), torch.randn(5, 8), torch.rand(5, 8) < 0.5
    torch.library.opcheck(ops.srste_grad_.default, (grad.clone(), W, mask, 0.1))

    def step(g: Tensor) -> Tensor:
        g = g * 1
        slkernels.srste_grad_(g, W, mask, 0.1)
        return g

    assert_bitwise_equal(torch.compile(step, fullgraph=True, backend="aot_eager")(grad), step(grad), "compiled")
