"""What a benchmark case is: a problem that several providers solve, with the work of each and a check of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

OURS = "slkernels"
DENSE = "dense"


@dataclass(frozen=True)
class Provider:
    """One way to solve the problem.

    run: does the timed work once, and returns what ``error`` judges.
    error: relative error of run's result, as a multiple of what is allowed: above 1 (or NaN) the provider is wrong.
    flops, bytes: the least arithmetic and memory traffic that this way needs. They place it under the roofline.
    note: what a reader should know about it; shown below the table.
    """

    run: Callable[[], Any]
    error: Callable[[Any], float]
    flops: float
    bytes: float
    note: Callable[[Any], str] | None = None


@dataclass(frozen=True)
class Absent:
    """A provider that cannot run here, and why: named in the table, never left out in silence."""

    reason: str


@dataclass(frozen=True)
class Target:
    """The goal of a case: ours is ``at_least`` times as fast as provider ``against``."""

    against: str
    at_least: float


@dataclass(frozen=True)
class Case:
    """make(device, seed) builds the buffers of every provider; it is called once for each set of rotated buffers.

    items, item: when given, the rate of a row is nanoseconds per item ("ns/nonzero") in place of GFLOP/s or GB/s.
    baseline: the provider whose ratio is 1.
    devices: where the case makes sense.
    """

    family: str
    name: str
    shape: str
    dtype: torch.dtype
    make: Callable[[torch.device, int], dict[str, Provider | Absent]]
    baseline: str = DENSE
    targets: tuple[Target, ...] = ()
    items: float = 0.0
    item: str = ""
    quick: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def label(self) -> str:
        return f"{self.family} {self.name} {self.shape} {self.dtype_name}"


# Relative Frobenius error allowed against float64. bfloat16 and float16: a few roundings of inputs that a formula may
# store (SLTrain's stores W). float32: accumulation over 4096 terms in any order.
_ALLOWED = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# One element may be off by this multiple of the above times the root mean square, so that a wrong corner cannot hide.
_ELEMENTWISE = 10.0


def relative_error(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> float:
    """Error of got as a multiple of what the dtype allows: the worse of the norm and of one element."""
    if got.shape != expected.shape:
        raise ValueError(f"result must be {list(expected.shape)}, got {list(got.shape)}")
    expected = expected.detach()
    difference = got.detach().to(torch.float64) - expected
    size = expected.norm() / max(expected.numel(), 1) ** 0.5
    if size == 0:
        return 0.0 if bool((difference == 0).all()) else float("inf")
    norm = difference.norm() / max(difference.numel(), 1) ** 0.5 / size
    worst = difference.abs().max() / size / _ELEMENTWISE
    return float(torch.maximum(norm, worst)) / _ALLOWED[dtype]


def compare_with(expected: Callable[[], tuple[torch.Tensor, ...]], dtype: torch.dtype, select=None):
    """An ``error`` function: the worst relative error of run's tensors against ``expected()``, which is in float64.

    select: maps run's result to the tensors to compare; default: the result itself.
    """

    def error(result) -> float:
        got = result if select is None else select(result)
        got = got if isinstance(got, tuple) else (got,)
        errors = [relative_error(g, e, dtype) for g, e in zip(got, expected(), strict=True)]
        return float("nan") if any(e != e for e in errors) else max(errors)

    return error
