"""Family project: the steps of GaLore, APOLLO and Q-GaLore on one weight, against their public formulas in torch."""

from __future__ import annotations

from functools import cache

import slkernels
import torch
import torch.nn.functional as F

from ..case import DENSE, OURS, Case, Provider, Target, compare_with
from ..data import generator, nbytes, uniform

SVD = "torch.linalg.svd"
GALORE = "galore formula"
APOLLO = "apollo formula"
QGALORE = "q-galore formula"
MATERIALIZED = "torch.randn"

_LR, _ALPHA = 0.5, 0.25  # a step as large as the weight, so that its error shows


def range_problem(n: int, m: int, rank: int):
    def make(device, seed):
        gen = generator(device, seed)
        # a gradient's spectrum: falling, with a flat tail
        G = uniform(n, 64, dtype=torch.float32, gen=gen) @ uniform(64, m, dtype=torch.float32, gen=gen)
        G = G + uniform(n, m, dtype=torch.float32, gen=gen, scale=2.0)

        @cache
        def best() -> float:
            return float(torch.linalg.svdvals(G)[:rank].double().square().sum())

        def error(P) -> float:
            """How much more than 2 % of the energy of SVD's subspace is lost, and how far from orthonormal P is."""
            lost = 1 - float((G @ P.t()).double().square().sum()) / best()
            off = float((P.double() @ P.double().t() - torch.eye(rank, device=device)).abs().max())
            return max(lost / 0.02, off / 1e-5)

        flops = 6.0 * n * m * (rank + 8)
        return {
            OURS: Provider(lambda: slkernels.randomized_range(G, rank, 1), error, flops, 3.0 * nbytes(G)),
            SVD: Provider(lambda: torch.linalg.svd(G, full_matrices=False)[2][:rank], error, 0.0, nbytes(G)),
        }

    return make


def back_add_problem(n: int, m: int, rank: int, dtype: torch.dtype):
    def make(device, seed):
        gen = generator(device, seed)
        start = uniform(n, m, dtype=dtype, gen=gen)
        N, P = uniform(n, rank, dtype=dtype, gen=gen), uniform(rank, m, dtype=dtype, gen=gen, scale=rank**-0.5)
        lr = torch.tensor(_LR, device=device)
        ours, dense = start.clone(), start.clone()

        @cache
        def expected():
            return (start.double() - _LR * _ALPHA * (N.double() @ P.double()),)

        def once(weight):
            """Judges one step from the start, whatever the timed steps have done to the weight."""

            def error(step) -> float:
                weight.copy_(start)
                step()
                return compare_with(expected, dtype)(weight)

            return error

        def run_ours():
            slkernels.project_back_add_(ours, N, lr, None, P, alpha=_ALPHA)
            return run_ours

        def formula():
            """galore_torch/adamw8bit.py: the weight is copied, the update made in full, scaled and added."""
            return start.clone().add_((N @ P) * _ALPHA, alpha=-_LR)

        def run_dense():
            torch.addmm(dense, N, P, beta=1.0, alpha=-_LR * _ALPHA, out=dense)
            return run_dense

        flops, traffic = 2.0 * n * m * rank, 2.0 * nbytes(start) + nbytes(N, P)
        return {
            OURS: Provider(run_ours, once(ours), flops, traffic),
            DENSE: Provider(run_dense, once(dense), flops, traffic),
            GALORE: Provider(formula, compare_with(expected, dtype), flops, traffic),
        }

    return make


def back_problem(n: int, m: int, rank: int, dtype: torch.dtype):
    """The way back alone: a GEMM either way."""

    def make(device, seed):
        gen = generator(device, seed)
        N, P = uniform(n, rank, dtype=dtype, gen=gen), uniform(rank, m, dtype=dtype, gen=gen, scale=rank**-0.5)
        error = compare_with(cache(lambda: (N.double() @ P.double(),)), dtype)
        work = 2.0 * n * m * rank, nbytes(N, P) + n * m * N.element_size()
        return {
            OURS: Provider(lambda: slkernels.project_back(N, right=P), error, *work),
            DENSE: Provider(lambda: N @ P, error, *work),
        }

    return make


def rand_back_problem(n: int, m: int, rank: int, dtype: torch.dtype):
    def make(device, seed):
        gen = generator(device, seed)
        R = uniform(n, rank, dtype=dtype, gen=gen)

        @cache
        def expected():
            return (R.double() @ slkernels.rand_matrix(7, rank, m, dtype, device).double(),)

        def materialized():
            return R @ (torch.randn(rank, m, device=device) * rank**-0.5).to(dtype)

        def spread(U) -> float:
            """Another P: |U|^2 is |R|^2 m / rank on average."""
            allowed = 10 * (2.0 / (n * rank)) ** 0.5
            return abs(float(U.double().square().sum() / R.double().square().sum() * rank / m) - 1) / allowed

        work = 2.0 * n * m * rank, nbytes(R) + n * m * R.element_size()
        return {
            OURS: Provider(lambda: slkernels.rand_project_back(R, 7, m, "right"), compare_with(expected, dtype), *work),
            MATERIALIZED: Provider(materialized, spread, *work),
        }

    return make


def back_add_q_problem(n: int, m: int, rank: int):
    """Q-GaLore's update of int8 weights, rounded stochastically."""

    def make(device, seed):
        gen = generator(device, seed)
        w = uniform(n, m, dtype=torch.bfloat16, gen=gen)
        N = uniform(n, rank, dtype=torch.bfloat16, gen=gen)
        P = uniform(rank, m, dtype=torch.bfloat16, gen=gen, scale=rank**-0.5)
        lr, rng = torch.tensor(_LR, device=device), torch.tensor([1, 2], device=device)
        start = slkernels.quantize_group(w)
        ours = [t.clone() for t in start]

        @cache
        def expected():
            return slkernels.dequantize_group(*start).double() - _LR * _ALPHA * (N.double() @ P.double())

        def distance(codes, scale, zero) -> float:
            """In steps of the codes: stochastic rounding is off by less than one."""
            read = (codes.view(n, -1, 256).double() - zero.view(n, -1, 1)) * scale.view(n, -1, 1).double()
            return float(((read.view(n, m) - expected()).abs() / scale.repeat_interleave(256, -1)).max()) / 1.05

        def error(step) -> float:
            for t, s in zip(ours, start, strict=True):
                t.copy_(s)
            step()
            return distance(*ours)

        def run_ours():
            slkernels.project_back_add_q_(*ours, N, lr, None, P, alpha=_ALPHA, rng=rng)
            return run_ours

        def formula():
            """q_galore_torch: dequantize, add the update, quantize again with torch operations."""
            codes, scale, zero = start
            rows = (codes.view(-1, 256).float() - zero.view(-1, 1)) * scale.view(-1, 1)
            rows = (rows.view(n, m) - _LR * _ALPHA * (N @ P).float()).view(-1, 256)
            hi, lo = rows.amax(1, keepdim=True).clamp(min=0), rows.amin(1, keepdim=True).clamp(max=0)
            new_scale = (hi - lo) / 255
            new_zero, y = (-lo / new_scale).round(), rows / new_scale
            new_codes = (torch.floor(y + torch.rand_like(y)) + new_zero).clamp(0, 255).to(torch.uint8)
            return new_codes.view(n, m), new_scale.view(n, -1), new_zero.view(n, -1)

        work = 2.0 * n * m * rank, 2.0 * nbytes(*start) + nbytes(N, P)
        return {
            OURS: Provider(run_ours, error, *work),
            QGALORE: Provider(formula, lambda result: distance(*result), *work),
        }

    return make


def apollo_problem(n: int, m: int, rank: int, dtype: torch.dtype, kind: str):
    def make(device, seed):
        gen = generator(device, seed)
        start, G = uniform(n, m, dtype=dtype, gen=gen), uniform(n, m, dtype=dtype, gen=gen)
        R, N = uniform(n, rank, dtype=dtype, gen=gen), uniform(n, rank, dtype=dtype, gen=gen)
        lr, norm = torch.tensor(_LR, device=device), torch.zeros(1, device=device)
        ours = start.clone()
        dim = {"dim": 1, "keepdim": True} if kind == "channel" else {}

        def formula(W, G, N, R):
            """apollo_torch/apollo.py:169-201; the limiter's comparison waits for the device there too."""
            s = N.norm(**dim) / (R.norm(**dim) + 1e-8)
            scaled = G * s
            u = scaled.norm()
            limit = max(float(u / (u + 1e-8)), 1.01) / 1.01
            return W.clone().add_(scaled / limit, alpha=-_LR)

        @cache
        def expected():
            return (formula(start.double(), G.double(), N.double(), R.double()),)

        def error(step) -> float:
            ours.copy_(start)
            norm.zero_()
            step()
            return compare_with(expected, dtype)(ours)

        def run_ours():
            slkernels.apollo_scale_update_(ours, G, N, R, norm, lr, "right", kind=kind)
            return run_ours

        traffic = 2.0 * nbytes(start) + 2.0 * nbytes(G) + nbytes(N, R)
        return {
            OURS: Provider(run_ours, error, 0.0, traffic),
            APOLLO: Provider(lambda: formula(start, G, N, R), compare_with(expected, dtype), 0.0, traffic),
        }

    return make


def rand_project_problem(n: int, m: int, rank: int, dtype: torch.dtype):
    def make(device, seed):
        gen = generator(device, seed)
        G = uniform(n, m, dtype=dtype, gen=gen)

        @cache
        def expected():
            return (G.double() @ slkernels.rand_matrix(7, rank, m, torch.float64, device).t(),)

        def materialized():
            return G @ (torch.randn(rank, m, device=device) * rank**-0.5).to(dtype).t()

        def spread(R) -> float:
            """Another P cannot be compared number by number: |R|^2 is |G|^2 on average."""
            allowed = 10 * (2.0 / (n * rank)) ** 0.5
            return abs(float(R.double().square().sum() / G.double().square().sum()) - 1) / allowed

        work = 2.0 * n * m * rank, nbytes(G)
        return {
            OURS: Provider(lambda: slkernels.rand_project(G, 7, rank, "right"), compare_with(expected, dtype), *work),
            MATERIALIZED: Provider(materialized, spread, *work),
        }

    return make


def quantize_problem(n: int, m: int, bits: int, stochastic: bool):
    def make(device, seed):
        gen = generator(device, seed)
        w = uniform(n, m, dtype=torch.bfloat16, gen=gen)
        rng = torch.tensor([1, 2], device=device) if stochastic else None

        def formula():
            """Q-GaLore's utils/quantization.py, with the range that includes 0."""
            g = w.view(-1, 256).float()
            hi, lo = g.amax(1, keepdim=True).clamp(min=0), g.amin(1, keepdim=True).clamp(max=0)
            scale = (hi - lo) / (2**bits - 1)
            zero, y = (-lo / scale).round(), g / scale
            y = torch.floor(y + torch.rand_like(y)) if stochastic else y.round()
            return (y + zero).clamp(0, 2**bits - 1).to(torch.uint8), scale, zero

        def error(result) -> float:
            read = slkernels.dequantize_group(*result, bits=bits)
            step = result[1].repeat_interleave(256, -1)
            return float(((read - w.float()).abs() / step).max()) / (1.001 if stochastic else 0.501)

        def formula_error(result) -> float:
            codes, scale, zero = result
            off = ((codes - zero) * scale - w.view(-1, 256).float()).abs() / scale
            return float(off.max()) / (1.001 if stochastic else 0.501)

        traffic = nbytes(w) + n * m * bits / 8
        return {
            OURS: Provider(lambda: slkernels.quantize_group(w, bits, 256, int(stochastic), rng), error, 0.0, traffic),
            QGALORE: Provider(formula, formula_error, 0.0, traffic),
        }

    return make


def linear_problem(tokens: int, n: int, m: int, dtype: torch.dtype):
    def make(device, seed):
        gen = generator(device, seed)
        x, w = uniform(tokens, m, dtype=dtype, gen=gen), uniform(n, m, dtype=dtype, gen=gen)
        q = slkernels.quantize_group(w)
        read = slkernels.dequantize_group(*q)
        y = x.new_empty(tokens, n, device="meta")

        def formula():
            """Q-GaLore: the whole weight is dequantized, then multiplied."""
            codes, scale, zero = q
            rows = (codes.view(-1, 256).to(dtype) - zero.view(-1, 1)) * scale.view(-1, 1).to(dtype)
            return F.linear(x, rows.view(n, m))

        error = compare_with(cache(lambda: (x.double() @ read.double().t(),)), dtype)
        dense_error = compare_with(cache(lambda: (x.double() @ w.double().t(),)), dtype)
        flops = 2.0 * tokens * n * m
        return {
            OURS: Provider(lambda: slkernels.w8a16_linear(x, *q), error, flops, nbytes(x, *q, y)),
            DENSE: Provider(lambda: F.linear(x, w), dense_error, flops, nbytes(x, w, y)),
            QGALORE: Provider(formula, error, flops, nbytes(x, *q, y)),
        }

    return make


def cases() -> list[Case]:
    """All cases of the family."""
    found = []
    bf16 = torch.bfloat16
    for size, rank in ((1024, 256), (4096, 1024)):
        shape = f"{size}x{size} r={rank}"
        found.append(
            Case(
                "project",
                "randomized_range",
                shape,
                torch.float32,
                range_problem(size, size, rank),
                baseline=SVD,
                targets=(Target(SVD, 10.0),),
            )
        )
        for dtype in (bf16, torch.float32):
            make = back_add_problem(size, size, rank, dtype)
            found.append(Case("project", "project_back_add_", shape, dtype, make, baseline=GALORE))
        make = back_problem(size, size, rank, bf16)
        found.append(Case("project", "project_back", shape, bf16, make))
        make = rand_back_problem(size, size, rank, bf16)
        found.append(Case("project", "rand_project_back", shape, bf16, make, baseline=MATERIALIZED))
        make = back_add_q_problem(size, size, rank)
        found.append(Case("project", "project_back_add_q_", shape, bf16, make, baseline=QGALORE))
        for kind, r in (("channel", rank), ("tensor", 1)):
            make = apollo_problem(size, size, r, bf16, kind)
            name = f"apollo_scale_update_ {kind}"
            found.append(Case("project", name, f"{size}x{size} r={r}", bf16, make, baseline=APOLLO, quick=size == 1024))
        for r in (1, rank):
            make = rand_project_problem(size, size, r, bf16)
            found.append(Case("project", "rand_project", f"{size}x{size} r={r}", bf16, make, baseline=MATERIALIZED))
    for bits, stochastic in ((8, False), (8, True), (4, False)):
        name = f"quantize_group u{bits}" + (" stochastic" if stochastic else "")
        make = quantize_problem(4096, 4096, bits, stochastic)
        found.append(
            Case("project", name, "4096x4096", bf16, make, baseline=QGALORE, items=4096 * 4096, item="element")
        )
    for tokens in (1, 8, 512):
        make = linear_problem(tokens, 4096, 4096, bf16)
        found.append(Case("project", "w8a16_linear", f"T={tokens} 4096→4096", bf16, make))
    return found
