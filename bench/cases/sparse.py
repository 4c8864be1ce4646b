"""Family sparse: products with S on a random support, against dense GEMM and torch.sparse_csr."""

from __future__ import annotations

from functools import cache

import slkernels
import torch
import torch.nn.functional as F

from ..case import DENSE, OURS, Absent, Case, Provider, Target, compare_with
from ..data import Sparse, generator, nbytes, sparse, uniform

CSR = "torch.sparse_csr"
SLTRAIN = "sltrain"
_PRODUCT = "B A alone"
_TILE = "slkernels tile"
_BF16_CSR = Absent("torch has no CSR product in this dtype on a CPU")
_BF16_SDDMM = Absent("torch's CSR sampled_addmm (cuSPARSE, MKL) has no bfloat16")


def _csr_runs(dtype: torch.dtype, device: torch.device) -> bool:
    return dtype in (torch.float32, torch.float64) or device.type == "cuda"


def _work(s: Sparse, tokens: int, *tensors: torch.Tensor) -> tuple[float, float]:
    """(flops, bytes) of a product with S: two operations a nonzero and token; every tensor moves once."""
    return 2.0 * tokens * s.nnz, s.nbytes + nbytes(*tensors)


def spmm_problem(tokens: int, n: int, m: int, density: float, dtype: torch.dtype):
    def make(device, seed):
        gen = generator(device, seed)
        s = sparse(n, m, density, dtype, gen)
        x = uniform(tokens, m, dtype=dtype, gen=gen)
        w, y = s.dense(), x.new_empty(tokens, n, device="meta")
        error = compare_with(cache(lambda: (F.linear(x.double(), s.dense(torch.float64)),)), dtype)
        flops, bytes = _work(s, tokens, x, y)
        providers = {
            OURS: Provider(lambda: slkernels.spmm(x, s.values, s.crow, s.col, n, validate=False), error, flops, bytes),
            DENSE: Provider(lambda: F.linear(x, w), error, 2.0 * tokens * n * m, nbytes(x, w, y)),
            CSR: _BF16_CSR,
        }
        if _csr_runs(dtype, device):
            csr = s.torch_csr()
            providers[CSR] = Provider(lambda: (csr @ x.t()).t(), error, flops, bytes)
        return providers

    return make


def spmm_t_problem(tokens: int, n: int, m: int, density: float, dtype: torch.dtype):
    def make(device, seed):
        gen = generator(device, seed)
        s = sparse(n, m, density, dtype, gen)
        dy = uniform(tokens, n, dtype=dtype, gen=gen)
        w, dx = s.dense(), dy.new_empty(tokens, m, device="meta")
        error = compare_with(cache(lambda: (dy.double() @ s.dense(torch.float64),)), dtype)
        flops, bytes = _work(s, tokens, dy, dx)
        providers = {
            OURS: Provider(
                lambda: slkernels.spmm_t(dy, s.values, s.crow, s.col, m, validate=False), error, flops, bytes
            ),
            DENSE: Provider(lambda: dy @ w, error, 2.0 * tokens * n * m, nbytes(dy, w, dx)),
            CSR: _BF16_CSR,
        }
        if _csr_runs(dtype, device):
            transposed = s.torch_csr_transposed()  # given to it for free; ours transposes in the call
            providers[CSR] = Provider(lambda: (transposed @ dy.t()).t(), error, flops, bytes)
        return providers

    return make


def sddmm_problem(tokens: int, n: int, m: int, density: float, dtype: torch.dtype):
    def make(device, seed):
        gen = generator(device, seed)
        s = sparse(n, m, density, dtype, gen)
        x, dy = uniform(tokens, m, dtype=dtype, gen=gen), uniform(tokens, n, dtype=dtype, gen=gen)
        expected = cache(lambda: ((dy.double().t() @ x.double()).view(-1)[s.flat],))
        error = compare_with(expected, dtype)
        flops, bytes = _work(s, tokens, x, dy)
        dense = 2.0 * tokens * n * m, nbytes(x, dy) + n * m * x.element_size()
        providers = {
            OURS: Provider(lambda: slkernels.sddmm(dy, x, s.crow, s.col, validate=False), error, flops, bytes),
            DENSE: Provider(
                lambda: dy.t() @ x, compare_with(expected, dtype, lambda dw: dw.reshape(-1)[s.flat]), *dense
            ),
            SLTRAIN: Provider(lambda: (dy.t() @ x).view(-1).gather(0, s.flat), error, *dense),
            CSR: _BF16_SDDMM,
        }
        if dtype in (torch.float32, torch.float64):
            csr = s.torch_csr()
            values = compare_with(expected, dtype, lambda product: product.values())
            providers[CSR] = Provider(
                lambda: torch.sparse.sampled_addmm(csr, dy.t(), x, beta=0.0), values, flops, bytes
            )
        return providers

    return make


def compose_problem(n: int, m: int, r: int, density: float, dtype: torch.dtype):
    alpha = 0.5

    def make(device, seed):
        gen = generator(device, seed)
        s = sparse(n, m, density, dtype, gen)
        a, b = uniform(r, m, dtype=dtype, gen=gen), uniform(n, r, dtype=dtype, gen=gen, scale=r**-0.5)
        w = s.values.new_empty(n, m, device="meta")
        expected = cache(lambda: (alpha * (b.double() @ a.double()) + s.dense(torch.float64),))
        error = compare_with(expected, dtype)
        gemm = 2.0 * n * m * r

        def sltrain():
            weight = torch.mm(b, a) * alpha
            weight.view(-1).scatter_add_(0, s.flat, s.values)
            return weight

        bytes = s.nbytes + nbytes(a, b, w)
        tile = Absent("the tensor-core kernel that adds S in its epilogue is for CUDA and bfloat16")
        if device.type == "cuda" and dtype == torch.bfloat16:
            tile = Provider(
                lambda: torch.ops.slkernels._compose_tile(s.values, s.crow, s.col, m, a, b, alpha), error, gemm, bytes
            )
        product = compare_with(cache(lambda: (alpha * (b.double() @ a.double()),)), dtype)
        return {
            OURS: Provider(
                lambda: slkernels.compose(s.values, s.crow, s.col, m, a, b, alpha, validate=False), error, gemm, bytes
            ),
            SLTRAIN: Provider(sltrain, error, gemm, nbytes(a, b, w, s.flat, s.values)),
            _TILE: tile,
            _PRODUCT: Provider(
                lambda: torch.addmm(b.new_empty(n, m), b, a, beta=0, alpha=alpha), product, gemm, nbytes(a, b, w)
            ),
        }

    return make


def random_support_problem(n: int, m: int, density: float):
    nnz = int(density * n * m)

    def error_of(flat: torch.Tensor) -> float:
        """0 when flat is nnz distinct positions in order, and about half of them lie in the lower half."""
        sound = flat.numel() == nnz and bool((flat.diff() > 0).all()) and int(flat[0]) >= 0 and int(flat[-1]) < n * m
        half = (flat < n * m // 2).sum().item() / nnz
        return 0.0 if sound and abs(half - 0.5) < 5 * 0.5 / nnz**0.5 else float("inf")

    def make(device, seed):
        def ours():
            return slkernels.random_support(n, m, density, seed, "uniform", device)

        def randperm():
            return torch.randperm(n * m, device=device)[:nnz].sort().values

        def flat_of(support):
            crow, col = support
            row = torch.repeat_interleave(torch.arange(n, device=device), crow.diff())
            return row * m + col

        return {
            OURS: Provider(ours, lambda support: error_of(flat_of(support)), 0.0, 2.0 * nnz + 4 * n),
            "torch.randperm": Provider(randperm, error_of, 0.0, 8.0 * nnz),
        }

    return make


def gpu_cases() -> list[Case]:
    """7B's square projection on a GPU: where the dense product wins, and where the sparse ones should (few tokens, low
    density), and W itself, whose goal is the time of B A."""
    found = []
    n = m = 4096
    for density in (0.01, 0.05):
        for tokens in (1, 8, 64, 2048):
            shape = f"T={tokens} {m}→{n} {density:.0%}"
            for name, make in (("spmm", spmm_problem), ("spmm_t", spmm_t_problem), ("sddmm", sddmm_problem)):
                if tokens < 64 and name != "spmm":
                    continue  # decode has no backward
                problem = make(tokens, n, m, density, torch.bfloat16)
                quick = tokens in (1, 2048)
                found.append(Case("sparse", name, shape, torch.bfloat16, problem, quick=quick, devices=("cuda",)))
    compose = compose_problem(n, m, 1024, 0.05, torch.bfloat16)
    found.append(
        Case(
            "sparse",
            "compose",
            f"{m}→{n} r=1024 5%",
            torch.bfloat16,
            compose,
            baseline=SLTRAIN,
            targets=(Target(_PRODUCT, 1 / 1.1),),
            quick=True,
            devices=("cuda",),
        )
    )
    return found


def cases() -> list[Case]:
    """All cases of the family."""
    found = gpu_cases()
    tokens, density = 2048, 0.03
    for dtype in (torch.float32, torch.bfloat16):
        full = dtype == torch.float32
        for n, m in ((1024, 1024), (2736, 1024)):
            shape = f"T={tokens} {m}→{n} {density:.0%}"
            spmm_goals = (Target(DENSE, 6.0), Target(CSR, 8.0)) if full else ()
            sddmm_goals = (Target(DENSE, 5.0),) if full else ()
            for name, make, goals in (
                ("spmm", spmm_problem, spmm_goals),
                ("spmm_t", spmm_t_problem, ()),
                ("sddmm", sddmm_problem, sddmm_goals),
            ):
                problem = make(tokens, n, m, density, dtype)
                quick = full or (n == m and name == "spmm")
                found.append(Case("sparse", name, shape, dtype, problem, targets=goals, quick=quick, devices=("cpu",)))
    for dtype in (torch.float32, torch.bfloat16):
        for n, m, r in ((1024, 1024, 256), (2736, 1024, 256), (4096, 4096, 1024)):
            shape = f"{m}→{n} r={r} {density:.0%}"
            make = compose_problem(n, m, r, density, dtype)
            quick = n == 2736 and dtype == torch.float32
            case = Case("sparse", "compose", shape, dtype, make, baseline=SLTRAIN, quick=quick, devices=("cpu",))
            found.append(case)
    for n, m in ((2736, 1024), (11008, 4096)):
        found.append(
            Case(
                "sparse",
                "random_support",
                f"{m}→{n} {density:.0%}",
                torch.float32,
                random_support_problem(n, m, density),
                baseline="torch.randperm",
                items=int(density * n * m),
                item="nonzero",
                quick=m == 1024,
            )
        )
    return found
