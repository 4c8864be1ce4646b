"""Family gemm: the dense C = A B^T of the two tensor-core kernels that the others grow from, against cuBLAS. On a CPU
the op is torch's own product, and there is nothing to measure."""

from __future__ import annotations

from functools import cache

import slkernels
import torch

from ..case import DENSE, OURS, Absent, Case, Provider, Target, compare_with
from ..data import generator, nbytes, uniform

_SM80 = "slkernels sm80"


def gemm_problem(size: int):
    def make(device, seed):
        gen = generator(device, seed)
        a, b = (uniform(size, size, dtype=torch.bfloat16, gen=gen) for _ in range(2))
        error = compare_with(cache(lambda: (a.double() @ b.double().t(),)), torch.bfloat16)
        work = 2.0 * size**3, 3 * nbytes(a)

        def kernel(name: str) -> Provider:
            return Provider(lambda: slkernels.gemm(a, b, name), error, *work)

        hopper = torch.cuda.get_device_capability(device) == (9, 0)
        return {
            OURS: kernel("sm90") if hopper else Absent("the sm_90a kernel needs a GPU of compute capability 9.0"),
            _SM80: kernel("sm80"),
            DENSE: Provider(lambda: a @ b.t(), error, *work),
        }

    return make


def cases() -> list[Case]:
    return [
        Case(
            "gemm",
            "gemm",
            f"{size}^3",
            torch.bfloat16,
            gemm_problem(size),
            targets=(Target(DENSE, 0.8),),
            quick=True,
            devices=("cuda",),
        )
        for size in (4096, 8192)
    ]
