"""Family semi24_linear, on a CPU: products with 2:4 weights and their gradients, against the dense product, the dense
product with a mask applied in every call, and torch.sparse_csr."""

from __future__ import annotations

from functools import cache

import slkernels
import torch
import torch.nn.functional as F
from torch import Tensor

from ..case import DENSE, OURS, Absent, Case, Provider, Target, compare_with
from ..data import generator, nbytes, uniform

MASKED = "torch W * mask"
CSR = "torch.sparse_csr"
_NO_CSR = Absent("torch has no CSR product in this dtype on a CPU")


class Weight:
    """A dense weight, the mask of the two largest of every four along a row, and the plain pack."""

    def __init__(self, n: int, m: int, dtype: torch.dtype, gen: torch.Generator):
        self.w = uniform(n, m, dtype=dtype, gen=gen, scale=m**-0.5)
        self.mask = slkernels.prune24(self.w)
        self.values, self.meta = slkernels.compress24(self.w, self.mask)

    def pruned(self) -> Tensor:
        return self.w * self.mask

    @property
    def nbytes(self) -> float:
        return nbytes(self.values, self.meta)


def linear_problem(tokens: int, n: int, m: int, dtype: torch.dtype):
    def make(device, seed):
        gen = generator(device, seed)
        s, x = Weight(n, m, dtype, gen), uniform(tokens, m, dtype=dtype, gen=gen)
        error = compare_with(cache(lambda: (F.linear(x.double(), s.pruned().double()),)), dtype)
        flops, y = 2.0 * tokens * n * m, x.new_empty(tokens, n, device="meta")
        w = s.pruned()
        providers = {
            OURS: Provider(
                lambda: slkernels.linear24(x, s.values, s.meta, n), error, flops / 2, s.nbytes + nbytes(x, y)
            ),
            DENSE: Provider(lambda: F.linear(x, w), error, flops, nbytes(w, x, y)),
            MASKED: Provider(lambda: F.linear(x, s.pruned()), error, flops, nbytes(s.w, s.mask, x, y)),
            CSR: _NO_CSR if dtype != torch.float32 else Absent("not run beyond 8 tokens: seconds a call"),
        }
        if dtype == torch.float32 and tokens <= 8:
            csr = w.to_sparse_csr()
            work = flops / 2, nbytes(csr.values(), csr.col_indices(), x, y)
            providers[CSR] = Provider(lambda: (csr @ x.t()).t(), error, *work)
        return providers

    return make


def gradient_problem(tokens: int, n: int, m: int, dtype: torch.dtype, of_x: bool):
    """dx = dy W from the transposed pack, or dvalues."""

    def make(device, seed):
        gen = generator(device, seed)
        s = Weight(n, m, dtype, gen)
        dy, x = uniform(tokens, n, dtype=dtype, gen=gen), uniform(tokens, m, dtype=dtype, gen=gen)
        flops, w = 2.0 * tokens * n * m, s.pruned()
        if of_x:
            # The mask of the transposable kind is its own transpose's: both packs hold the same elements.
            values, meta, values_t, meta_t = slkernels.prune_compress24(s.w, "transposable")
            w = slkernels.decompress24(values, meta, n, m)
            error = compare_with(cache(lambda: (dy.double() @ w.double(),)), dtype)
            work = s.nbytes + nbytes(dy, x)
            return {
                OURS: Provider(lambda: slkernels.linear24(dy, values_t, meta_t, m), error, flops / 2, work),
                "slkernels plain pack": Provider(
                    lambda: torch.ops.slkernels._linear24_dx(dy, values, meta, m), error, flops / 2, work
                ),
                DENSE: Provider(lambda: dy @ w, error, flops, nbytes(w, dy, x)),
            }
        kept = cache(lambda: slkernels.compress24(dy.double().t() @ x.double(), s.mask)[:1])
        work = flops, nbytes(dy, x, w)
        return {
            OURS: Provider(
                lambda: slkernels.dw_compress24(dy, x, s.meta),
                compare_with(kept, dtype),
                flops / 2,
                s.nbytes + nbytes(dy, x),
            ),
            DENSE: Provider(
                lambda: dy.t() @ x, compare_with(kept, dtype, lambda dw: slkernels.compress24(dw, s.mask)[0]), *work
            ),
            "torch, compressed": Provider(
                lambda: slkernels.compress24(dy.t() @ x, s.mask)[0], compare_with(kept, dtype), *work
            ),
        }

    return make


def cases() -> list[Case]:
    """All cases of the products on a CPU."""
    found = []

    def add(name: str, shape: str, dtype: torch.dtype, make, goals: tuple[Target, ...] = (), quick: bool = False):
        found.append(Case("semi24_linear", name, shape, dtype, make, targets=goals, quick=quick, devices=("cpu",)))

    for dtype in (torch.float32, torch.bfloat16):
        full = dtype == torch.float32
        for n, m in ((1024, 4096), (4096, 1024)):
            shape = f"T=2048 {m}→{n}"
            add(
                "linear24", shape, dtype, linear_problem(2048, n, m, dtype), (Target(DENSE, 1.2),) if full else (), full
            )
            add("linear24 dx", shape, dtype, gradient_problem(2048, n, m, dtype, True))
            add("dw_compress24", shape, dtype, gradient_problem(2048, n, m, dtype, False))
        for tokens in (1, 8, 32):
            goals = (Target(DENSE, 1.7),) if tokens == 1 else ()
            add(
                "linear24",
                f"T={tokens} 4096→4096",
                dtype,
                linear_problem(tokens, 4096, 4096, dtype),
                goals,
                tokens == 1,
            )
    return found
