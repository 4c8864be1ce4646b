"""Family lowrank: y = act(x A^T) * gate * alpha B^T (+ x base^T), and layers that share x, against dense GEMMs and the
same chain in PyTorch."""

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


def shared_problem(tokens: int, sizes: tuple[int, ...], m: int, r: int, dtype: torch.dtype, swiglu: bool):
    """Forward and backward of layers m -> sizes of rank r each that share x: q, k, v, or gate and up with SwiGLU."""

    def make(device, seed):
        gen = generator(device, seed)
        x, a = uniform(tokens, m, dtype=dtype, gen=gen), uniform(len(sizes) * r, m, dtype=dtype, gen=gen, scale=m**-0.5)
        bs, ws = ([uniform(n, k, dtype=dtype, gen=gen, scale=0.1) for n in sizes] for k in (r, m))
        outputs = sizes[:1] if swiglu else sizes
        dys = [uniform(tokens, n, dtype=dtype, gen=gen) for n in outputs]
        for tensor in (x, a, *bs, *ws):
            tensor.requires_grad_()

        def step(ys, *inputs):
            ys = [F.silu(ys[0]) * ys[1]] if swiglu and len(ys) == 2 else ys
            grads = torch.autograd.grad(ys, inputs, [dy.to(ys[0].dtype) for dy in dys])
            # h's largest elements, products of two normal numbers, are so large that one rounding of them is more than
            # a bound in units of the root mean square allows; gradients are sums over them.
            return grads if swiglu else (*ys, *grads)

        def ours():
            ys = [slkernels.lowrank_swiglu(x, a, *bs)] if swiglu else slkernels.lowrank_linear_multi(x, a, bs)
            return step(ys, x, a, *bs)

        def chain(x, a, *bs):
            return step([F.linear(F.linear(x, part), b) for part, b in zip(a.split(r), bs, strict=True)], x, a, *bs)

        def dense(x, *ws):
            return step([F.linear(x, w) for w in ws], x, *ws)

        def double(*tensors):
            return (t.detach().double().requires_grad_() for t in tensors)

        error = compare_with(cache(lambda: chain(*double(x, a, *bs))), dtype)
        flops = 6.0 * tokens * sum(r * (n + m) for n in sizes) + swiglu * 2.0 * tokens * r * sum(sizes)
        work = flops, 2 * nbytes(x, a, *bs, *dys) + nbytes(*dys)
        return {
            OURS: Provider(ours, error, *work),
            DENSE: Provider(
                lambda: dense(x, *ws),
                compare_with(cache(lambda: dense(*double(x, *ws))), dtype),
                6.0 * tokens * m * sum(sizes),
                2 * nbytes(x, *ws, *dys) + nbytes(*dys),
            ),
            CHAIN: Provider(lambda: chain(x, a, *bs), error, *work),
        }

    return make


def lora_problem(tokens: int, n: int, m: int, r: int, dtype: torch.dtype):
    """y = x base^T + alpha (x A^T) B^T: an adapter beside a frozen dense weight."""

    def make(device, seed):
        gen = generator(device, seed)
        x, w = uniform(tokens, m, dtype=dtype, gen=gen), uniform(n, m, dtype=dtype, gen=gen)
        a, b = uniform(r, m, dtype=dtype, gen=gen, scale=m**-0.5), uniform(n, r, dtype=dtype, gen=gen)

        def chain(x, a, b, w):
            return F.linear(x, w) + F.linear(F.linear(x, a), b) * _ALPHA

        error = compare_with(cache(lambda: (chain(*(t.double() for t in (x, a, b, w))),)), dtype)
        dense_error = compare_with(cache(lambda: (F.linear(x.double(), w.double()),)), dtype)
        y = x.new_empty(tokens, n, device="meta")
        work = 2.0 * tokens * (n * m + r * (n + m)), nbytes(x, a, b, w, y)
        return {
            OURS: Provider(lambda: slkernels.lowrank_linear(x, a, b, alpha=_ALPHA, base=w), error, *work),
            DENSE: Provider(lambda: F.linear(x, w), dense_error, 2.0 * tokens * n * m, nbytes(x, w, y)),
            CHAIN: Provider(lambda: chain(x, a, b, w), error, *work),
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
        for tokens, n, m, r in ((1, 4096, 4096, 16), (2048, 1024, 1024, 16), (2048, 4096, 4096, 16)):
            make = lora_problem(tokens, n, m, r, dtype)
            found.append(Case("lowrank", "lowrank_linear base", f"T={tokens} {m}→{n} r={r}", dtype, make))
        for tokens, m, n, hidden, r in ((2048, 1024, 1024, 2736, 256), (2048, 4096, 4096, 11008, 1024)):
            on = ("cpu", "cuda") if m == 1024 else ("cuda",)
            make = shared_problem(tokens, (n, n, n), m, r, dtype, False)
            shape = f"T={tokens} {m}→3 x {n} r={r}"
            found.append(Case("lowrank", "lowrank_linear_multi fwd+bwd", shape, dtype, make, devices=on))
            make = shared_problem(tokens, (hidden, hidden), m, r, dtype, True)
            shape = f"T={tokens} {m}→{hidden} r={r}"
            found.append(Case("lowrank", "lowrank_swiglu fwd+bwd", shape, dtype, make, devices=on))
    return found
