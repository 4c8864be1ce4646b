"""Family block8: products with 8x8 blocks at random places, against the same matrix entry by entry and a dense one."""

from __future__ import annotations

from functools import cache

import slkernels
import torch
import torch.nn.functional as F
from slkernels import reference

from ..case import DENSE, OURS, Case, Provider, compare_with
from ..data import generator, nbytes, uniform

CSR = "csr"
_SEED = 7


def problem(tokens: int, n: int, m: int, density: float, dtype: torch.dtype, backward: bool):
    """y = x S^T, and with ``backward`` the gradients of x and of the values."""

    def make(device, seed):
        gen = generator(device, seed)
        x, dy = uniform(tokens, m, dtype=dtype, gen=gen), uniform(tokens, n, dtype=dtype, gen=gen)
        blocks = slkernels.random_blocks8(n, m, density, _SEED, device)
        values, w = uniform(blocks[1].numel(), 8, 8, dtype=dtype, gen=gen), uniform(n, m, dtype=dtype, gen=gen)
        crow, col = slkernels.random_support(n, m, density, _SEED, "block8", device)
        entries = slkernels.gather_support(reference.block8_to_dense(values, *blocks, n, m), crow, col)
        for tensor in (x, values, entries, w):
            tensor.requires_grad_(backward)

        def step(y, *inputs):
            return (y, *torch.autograd.grad(y, inputs, dy.to(y.dtype))) if backward else y

        def dense(x, w):
            return step(F.linear(x, w), x, w)

        def expected():
            x_wide, values_wide = (t.detach().double().requires_grad_(backward) for t in (x, values))
            return step(reference.block8_spmm(x_wide, values_wide, *blocks, n), x_wide, values_wide)

        def as_tuple(result):
            return result if isinstance(result, tuple) else (result,)

        expected = cache(lambda compute=expected: as_tuple(compute()))
        passes = 3 if backward else 1
        work = 2.0 * passes * tokens * entries.numel(), passes * nbytes(x, dy, values)
        full = 2.0 * passes * tokens * n * m, passes * nbytes(x, dy, w)
        return {
            OURS: Provider(
                lambda: step(slkernels.block8_spmm(x, values, *blocks, n, False), x, values),
                compare_with(expected, dtype),
                *work,
            ),
            CSR: Provider(
                lambda: step(slkernels.spmm(x, entries, crow, col, n, False), x, entries),
                # the gradient of the entries is in another order
                compare_with(lambda: expected()[:2], dtype, select=lambda result: as_tuple(result)[:2]),
                *work,
            ),
            DENSE: Provider(
                lambda: dense(x, w),
                compare_with(
                    cache(lambda: as_tuple(dense(*(t.detach().double().requires_grad_() for t in (x, w))))), dtype
                ),
                *full,
            ),
        }

    return make


def cases() -> list[Case]:
    """All cases of the family."""
    found = []
    layers = ((1024, 1024, 0.03), (2736, 1024, 0.03), (4096, 4096, 0.05), (11008, 4096, 0.05), (4096, 11008, 0.05))
    for dtype in (torch.float32, torch.bfloat16):
        for n, m, density in layers:
            large = max(n, m) >= 4096
            if large and dtype == torch.float32:
                continue  # CUDA takes 16-bit types
            on = ("cuda",) if large else ("cpu",) if dtype == torch.float32 else ("cpu", "cuda")
            for tokens in (2048, 16384) if large else (2048,):
                for mode, backward in (("fwd", False), ("fwd+bwd", True)):
                    make = problem(tokens, n, m, density, dtype, backward)
                    shape = f"T={tokens} {m}→{n} {density:.0%}"
                    quick = n == 1024 and backward and dtype == torch.float32
                    found.append(Case("block8", f"block8_spmm {mode}", shape, dtype, make, quick=quick, devices=on))
    return found
