"""The machine's two ceilings, measured in the same run: dense GEMM GFLOP/s and memory GB/s."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .timing import CpuTimer, CudaTimer


@dataclass
class Roofline:
    """gflops: best rate of a square dense GEMM, by dtype. gbs: best of a read, a copy and a triad beyond the caches.

    For dtypes whose GEMM torch has no fast kernel for, the ceiling is what torch reaches, not what the silicon could.
    """

    gbs: float
    gflops: dict[str, float] = field(default_factory=dict)

    def raise_to(self, other: Roofline) -> None:
        """Keep the higher of each ceiling: a busy moment can only lower a measurement."""
        self.gbs = max(self.gbs, other.gbs)
        for dtype, rate in other.gflops.items():
            self.gflops[dtype] = max(self.gflops.get(dtype, 0.0), rate)

    def least_seconds(self, flops: float, bytes: float, dtype: str) -> float:
        """No solution with this work can take less: max(flops / peak, bytes / bandwidth)."""
        return max(flops / (self.gflops[dtype] * 1e9), bytes / (self.gbs * 1e9))

    def bound(self, flops: float, bytes: float, dtype: str) -> str:
        return "compute" if flops / (self.gflops[dtype] * 1e9) > bytes / (self.gbs * 1e9) else "memory"


def _best(timer: Callable, run: Callable[[], object], least_seconds: float) -> float:
    """The shortest of at least three calls that take least_seconds together: other load only makes a call longer."""
    for _ in range(2):
        timer(run)
    times: list[float] = []
    while len(times) < 3 or sum(times) < least_seconds:
        times.append(timer(run))
    return min(times)


def gemm_gflops(device: torch.device, dtype: torch.dtype, timer: Callable, size: int, least_seconds: float) -> float:
    a = torch.empty(size, size, device=device).uniform_(-1, 1).to(dtype)
    b = torch.empty(size, size, device=device).uniform_(-1, 1).to(dtype)
    out = torch.empty_like(a)
    return 2 * size**3 / _best(timer, lambda: torch.mm(a, b.t(), out=out), least_seconds) / 1e9


def memory_gbs(device: torch.device, timer: Callable, mib: int, least_seconds: float) -> float:
    count = mib * 2**20 // 4
    a, b, c = (torch.full((count,), float(i), device=device) for i in range(3))
    seconds_per_byte = min(
        _best(timer, lambda: a.sum(), least_seconds) / (4 * count),
        _best(timer, lambda: a.copy_(b), least_seconds) / (8 * count),
        _best(timer, lambda: torch.add(b, c, alpha=0.5, out=a), least_seconds) / (12 * count),
    )
    return 1 / seconds_per_byte / 1e9


def measure(device: torch.device, dtypes: set[torch.dtype], quick: bool) -> Roofline:
    """Measure the ceilings for these dtypes; a few seconds."""
    cuda = device.type == "cuda"
    timer = CudaTimer(device) if cuda else CpuTimer()
    size, mib = (8192, 1024) if cuda else (2048, 128 if quick else 512)
    least_seconds = 0.5 if quick else 1.5
    roofline = Roofline(gbs=memory_gbs(device, timer, mib, least_seconds))
    for dtype in sorted(dtypes, key=str):
        roofline.gflops[str(dtype).removeprefix("torch.")] = gemm_gflops(device, dtype, timer, size, least_seconds)
    return roofline
