"""What every op is held to, written once: OpCase says how to call an op, OpTests (op_tests.py) does the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import slkernels  # noqa: F401  (registers the ops)
import torch
from supports import Support, random
from torch import Tensor

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


class Inputs:
    """Draws the arguments of a case: normal numbers, or small integers, whose sums are exact in every dtype."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str = "cpu", integers: bool = False, seed: int = 0):
        self.dtype, self.device, self.integers = dtype, device, integers
        self.generator = torch.Generator().manual_seed(seed)

    def tensor(self, *shape: int, scale: float = 1.0) -> Tensor:
        if self.integers:
            return torch.randint(-1, 2, shape, generator=self.generator).to(self.device, self.dtype)
        return (torch.randn(shape, generator=self.generator) * scale).to(self.device, self.dtype)

    def support(self, n: int, m: int, density: float) -> Support:
        crow, col = random(n, m, density, self.generator)
        return crow.to(self.device), col.to(self.device)


@dataclass(frozen=True)
class OpCase:
    """One way to call ``torch.ops.slkernels.<op>``.

    Error bound of a result: half an ulp of the result + (terms' rounding in the accumulation dtype + ``roundings`` half
    ulps of intermediates kept in the inputs' dtype) * ``condition`` * the op applied to absolute values.
    """

    op: str
    id: str
    make: Callable[[Inputs], tuple]  # the op's arguments
    reference: Callable  # slkernels.reference.<op>
    terms: int  # of the longest sum
    roundings: int = 0  # of intermediates to the inputs' dtype, in forward or backward
    condition: float = 1.0  # > 1: a nonlinearity amplifies errors
    magnitude: Callable | None = None  # the op on absolute values; default: reference
    differentiable: bool = True
    small: bool = False  # small enough for gradcheck, opcheck, compile and export
    twice: bool = False  # gradgradcheck too: the backward formulas are differentiable ops
    dense: bool = False  # a product of torch's dense library, whose sums depend on the number of threads, is part of it
    exact: bool = True  # small-integer inputs give exact results in every order of summation

    def __str__(self) -> str:
        return f"{self.op}-{self.id}"

    @property
    def overload(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.slkernels, self.op).default

    def __call__(self, *args):
        return self.overload(*args)

    def unchecked(self, args: tuple) -> tuple:
        """The same arguments with ``validate=False``, where the op has it: on a GPU the check waits for the device."""
        schema = self.overload._schema.arguments
        names = [a.name for a in schema]
        if "validate" not in names:
            return args
        at = names.index("validate")
        defaults = [a.default_value for a in schema[len(args) : at]]
        return (*args[:at], *defaults, False, *args[at + 1 :])


# ---- arguments ------------------------------------------------------------------------------------------------------


def is_float(a) -> bool:
    """Whether an argument is data. A tensor without dimensions is a scalar on the device: it keeps its dtype, and gets
    no gradient."""
    return isinstance(a, Tensor) and a.is_floating_point() and a.dim() > 0


def map_floats(f: Callable[[Tensor], Tensor], args: tuple) -> tuple:
    return tuple(f(a) if is_float(a) else a for a in args)


def floats(args: tuple) -> list[Tensor]:
    return [a for a in args if is_float(a)]


def with_grad(args: tuple, dtype: torch.dtype | None = None) -> tuple:
    """Copies of the floating tensors that ask for gradients; views keep their strides."""

    def leaf(t: Tensor) -> Tensor:
        return t.detach().to(dtype or t.dtype).requires_grad_()

    return map_floats(leaf, args)


def outputs(result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def gradients(function: Callable, args: tuple, cotangent: Tensor) -> list[Tensor]:
    """d<function(*args), cotangent> for every floating tensor in args, zeros where it does not depend on one."""
    args = with_grad(args)
    got = torch.autograd.grad(function(*args), floats(args), cotangent, allow_unused=True)
    return [torch.zeros_like(a) if g is None else g for a, g in zip(floats(args), got, strict=True)]


# ---- layouts --------------------------------------------------------------------------------------------------------
# A layout has the same elements at other addresses. What lies between and around them is NaN, so that a kernel that
# reads outside its input cannot give a right answer.


def _in_buffer(t: Tensor, strides: tuple[int, ...], offset: int) -> Tensor:
    last = sum((s - 1) * d for s, d in zip(t.shape, strides, strict=True)) if t.numel() else 0
    buffer = t.new_full((offset + last + 1 + 64,), math.nan)
    view = buffer.as_strided(t.shape, strides, offset)
    return view.copy_(t)


def _row_strides(shape: torch.Size, pad: int, step: int) -> tuple[int, ...]:
    strides, size = [], step
    for extent in reversed(shape):
        strides.append(size)
        size = size * max(extent, 1) + (pad if len(strides) == 1 else 0)
    return tuple(reversed(strides))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    # contiguous, one element past an aligned address
    "offset": lambda t: _in_buffer(t, _row_strides(t.shape, 0, 1), 65),
    # rows of a larger matrix
    "row_slice": lambda t: _in_buffer(t, _row_strides(t.shape, 3, 1), 67),
    # every second element
    "strided": lambda t: _in_buffer(t, _row_strides(t.shape, 1, 2), 65),
    # column-major
    "transposed": lambda t: _in_buffer(t, tuple(reversed(_row_strides(t.shape[::-1], 1, 1))), 65),
    # one row (one element, for vectors), stride 0
    "expanded": lambda t: _in_buffer(t[:1], _row_strides(t[:1].shape, 0, 1), 65).expand(t.shape) if t.dim() else t,
}


# ---- comparison -----------------------------------------------------------------------------------------------------


def _ulp(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _describe(error: Tensor, bound: Tensor, got: Tensor, want: Tensor) -> str:
    worst = int((error / bound).flatten().argmax())
    where = [int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape)]
    values = [float(t.flatten()[worst]) for t in (got, want, error, bound)]
    return "at {}: got {:.9g}, want {:.9g}, error {:.3g}, allowed {:.3g}".format(where, *values)


def assert_near(got: Tensor, want: Tensor, in_torch: Tensor, magnitude: Tensor, case: OpCase, what: str) -> None:
    """Two bounds. Of every element: its own rounding, and those of the sums behind it. Of the largest error:
    FlashAttention's rule, at most twice the error of the same formula in PyTorch, plus one rounding of the largest
    result and of the largest sum (a dense product sums in many chains, a row of S in few).

    got and in_torch have the kernel's dtype; want (the reference) and magnitude are float64.
    """
    assert got.shape == want.shape and got.dtype == in_torch.dtype, f"{what}: {got.shape} {got.dtype}"
    if not got.numel():
        return
    assert got.isfinite().all(), f"{what}: not finite at {(~got.isfinite()).nonzero()[0].tolist()}"
    accumulation = torch.float64 if got.dtype == torch.float64 else torch.float32
    tiny = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
    magnitude = case.condition * magnitude
    error = (got.double() - want).abs()
    relative = 2 * (2 + math.sqrt(case.terms)) * _ulp(accumulation) + case.roundings * _ulp(got.dtype)
    bound = 1.01 * _ulp(got.dtype) * want.abs() + relative * magnitude + tiny
    assert (error <= bound).all(), f"{what}: " + _describe(error, bound, got, want)
    if got.dtype != torch.float64:
        torch_error = (in_torch.double() - want).abs().max()
        rounding = _ulp(got.dtype) * want.abs().max() + _ulp(accumulation) * magnitude.max() + tiny
        message = f"{what}: error {error.max():.3g}, PyTorch's own {torch_error:.3g}, one rounding {rounding:.3g}"
        assert error.max() <= 2 * torch_error + rounding, message


def assert_matches_reference(case: OpCase, args: tuple, backward: bool = True) -> None:
    """Results and gradients of the op against the reference in float64, at the bounds of assert_near."""
    wide = map_floats(Tensor.double, args)
    positive = map_floats(lambda t: t.double().abs(), args)
    magnitude = case.magnitude or case.reference
    with torch.no_grad():
        got, want = case(*args), case.reference(*wide)
        assert_near(got, want, case.reference(*args), magnitude(*positive), case, str(case))
    if not (backward and case.differentiable):
        return
    cotangent = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cotangent = cotangent.to(got.device, got.dtype)
    results = (
        gradients(case, args, cotangent),
        gradients(case.reference, wide, cotangent.double()),
        gradients(case.reference, args, cotangent),
        gradients(magnitude, positive, cotangent.double().abs()),
    )
    for index, (g, w, t, m) in enumerate(zip(*results, strict=True)):
        assert_near(g, w, t, m, case, f"{case} gradient {index}")


def assert_bitwise_equal(got: Tensor, want: Tensor, what: str) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype, f"{what}: {got.shape} {got.dtype}"
    same = (got == want) | (got.isnan() & want.isnan())
    if not same.all():
        where = (~same).nonzero()[0].tolist()
        got_at, want_at = got[tuple(where)].item(), want[tuple(where)].item()
        pytest.fail(f"{what}: {int((~same).sum())} of {same.numel()} differ, first at {where}: {got_at} != {want_at}")


def run_bits(case: OpCase, args: tuple) -> list[Tensor]:
    """Results and gradients (for a cotangent of ones), to be compared bit for bit."""
    results = outputs(case(*map_floats(Tensor.detach, args)))
    if case.differentiable:
        results += gradients(case, args, torch.ones_like(results[0]))
    return results
