"""Family lowrank: y = act(x A^T) * gate * alpha B^T, against one dense GEMM and the same chain in PyTorch."""

from __future__ import annotations

from functools import cache

import slkernels
import torch
import torch.nn.functional as F

from ..case import DENSE, OURS, Case, Provider, compare_with
from ..data import generator, nbytes, uniform

CHAIN = "torch chain"
_ALPHA = 0.5


def forward_problem(tokens: int, n: int, m: int, r: int, dtype: torch.dtype, gated: bool):
    def make(device, seed):
        gen = generator(device, seed)
        x, a = uniform(tokens, m, dtype=dtype, gen=gen), uniform(r, m, dtype=dtype, gen=gen, scale=m**-0.5)
        b, w = uniform(n, r, dtype=dtype, gen=gen), uniform(n, m, dtype=dtype, gen=gen)
        gate = uniform(r, dtype=dtype, gen=gen) if gated else None
        activation = "silu" if gated else "none"

        def chain(x, a, b, gate):
            z = F.linear(x, a)
            if gate is not None:
                z = F.silu(z) * gate
            return F.linear(z, b) * _ALPHA

        def expected():
            return (chain(x.double(), a.double(), b.double(), None if gate is None else gate.double()),)

        error = compare_with(cache(expected), dtype)
        dense_error = compare_with(cache(lambda: (F.linear(x.double(), w.double()),)), dtype)
        y = x.new_empty(tokens, n, device="meta")
        work = 2.0 * tokens * r * (n + m), nbytes(x, a, b, y)
        return {
            OURS: Provider(
                lambda: slkernels.lowrank_linear(x, a, b, alpha=_ALPHA, gate=gate, activation=activation), error, *work
            ),
            DENSE: Provider(lambda: F.linear(x, w), dense_error, 2.0 * tokens * n * m, nbytes(x, w, y)),
            CHAIN: Provider(lambda: chain(x, a, b, gate), error, *work),
        }

    return make


def forward_backward_problem(tokens: int, n: int, m: int, r: int, dtype: torch.dtype):
    def make(device, seed):
        gen = generator(device, seed)
        x, dy = uniform(tokens, m, dtype=dtype, gen=gen), uniform(tokens, n, dtype=dtype, gen=gen)
        a, b = uniform(r, m, dtype=dtype, gen=gen, scale=m**-0.5), uniform(n, r, dtype=dtype, gen=gen)
        w = uniform(n, m, dtype=dtype, gen=gen)
        for tensor in (x, a, b, w):
            tensor.requires_grad_()

        def step(y, *inputs):
            return (y, *torch.autograd.grad(y, inputs, dy.to(y.dtype)))

        def chain(x, a, b):
            return step(F.linear(F.linear(x, a), b) * _ALPHA, x, a, b)

        def double(*tensors):
            return (t.detach().double().requires_grad_() for t in tensors)

        def dense(x, w):
            return step(F.linear(x, w), x, w)

        error = compare_with(cache(lambda: chain(*double(x, a, b))), dtype)
        work = 6.0 * tokens * r * (n + m), 2 * nbytes(x, a, b, dy) + nbytes(dy)
        return {
            OURS: Provider(lambda: step(slkernels.lowrank_linear(x, a, b, alpha=_ALPHA), x, a, b), error, *work),
            DENSE: Provider(
                lambda: dense(x, w),
                compare_with(cache(lambda: dense(*double(x, w))), dtype),
                6.0 * tokens * n * m,
                2 * nbytes(x, w, dy) + nbytes(dy),
            ),
            CHAIN: Provider(lambda: chain(x, a, b), error, *work),
        }

    return make


def cases() -> list[Case]:
    """All cases of the family."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, n, m, r in ((2048, 1024, 1024, 256), (2048, 2736, 1024, 256), (1, 4096, 4096, 1024)):
            shape = f"T={tokens} {m}→{n} r={r}"
            quick = dtype == torch.float32 and n != 1024
            for name, gated in (("lowrank_linear", False), ("lowrank_linear silu gate", True)):
                make = forward_problem(tokens, n, m, r, dtype, gated)
                found.append(Case("lowrank", name, shape, dtype, make, quick=quick and not gated))
        for n in (1024, 2736):
            shape = f"T=4096 1024→{n} r=256"
            make = forward_backward_problem(4096, n, 1024, 256, dtype)
            found.append(Case("lowrank", "lowrank_linear fwd+bwd", shape, dtype, make))
    return found
