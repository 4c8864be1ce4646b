"""rand_matrix, rand_project, rand_project_back, randomized_range."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest
import slkernels
import torch
from harness import FLOATS, Inputs, OpCase, assert_bitwise_equal
from op_tests import ErrorCase, OpTests
from slkernels.reference import project as reference
from torch import Tensor

ops = torch.ops.slkernels
SEED = 0x1234_5678_9ABC


def seed_on(device: torch.device | str, seed: int = SEED) -> Tensor:
    return torch.tensor(seed, device=device)


# ---- rand_project, rand_project_back --------------------------------------------------------------------------------


def with_matrix(back: bool, absolute: bool = False):
    """The op's formula with the P that ``rand_matrix`` returns, which has tests of its own."""

    def formula(X: Tensor, seed: Tensor, count: int, side: str = "auto") -> Tensor:
        n, m = X.shape
        left = side == "left" or (side == "auto" and n < m)
        rank, size = ((n if left else m), count) if back else (count, n if left else m)
        P = ops.rand_matrix(seed, rank, size, X.dtype)
        P = P.abs() if absolute else P
        if back:
            return P.t() @ X if left else X @ P
        return P @ X if left else X @ P.t()

    return formula


# id: op, shape of the argument, rank or size, side, small
CASES = {
    "right": ("rand_project", (7, 5), 3, "right", True),
    "left": ("rand_project", (5, 7), 3, "left", True),
    "auto_tall": ("rand_project", (7, 5), 1, "auto", True),
    "auto_wide": ("rand_project", (4, 9), 9, "auto", True),
    "long_side": ("rand_project", (3, 11), 2, "right", True),
    "no_rows": ("rand_project", (0, 5), 2, "right", True),
    "no_columns": ("rand_project", (5, 0), 2, "right", True),
    "no_columns_left": ("rand_project", (5, 0), 2, "left", True),
    "mini_right": ("rand_project", (131, 2736), 1, "right", False),
    "mini_left": ("rand_project", (2736, 131), 1, "left", False),
    "eight_left": ("rand_project", (300, 5461), 8, "left", False),
    "eight_right": ("rand_project", (67, 5461), 8, "right", False),
    "nine": ("rand_project", (61, 257), 9, "right", False),
    "panels": ("rand_project", (19, 5461), 200, "right", False),
    "panels_left": ("rand_project", (5461, 19), 200, "left", False),
    "back_right": ("rand_project_back", (7, 3), 5, "right", True),
    "back_left": ("rand_project_back", (3, 7), 5, "left", True),
    "back_no_rows": ("rand_project_back", (0, 3), 5, "right", True),
    "back_size_0": ("rand_project_back", (4, 3), 0, "right", True),
    "back_ragged": ("rand_project_back", (37, 31), 5461, "right", False),
    "back_ragged_left": ("rand_project_back", (200, 19), 5461, "left", False),
}


def make_cases() -> list[OpCase]:
    return [
        OpCase(
            op=op,
            id=f"{op}_{name}",
            make=lambda inputs, shape=shape, count=count, side=side: (
                inputs.tensor(*shape),
                seed_on(inputs.device),
                count,
                side,
            ),
            reference=with_matrix(op == "rand_project_back"),
            magnitude=with_matrix(op == "rand_project_back", absolute=True),
            terms=max(*shape, count),
            roundings=1,  # of P
            small=small,
            twice=small,
            dense=True,
            exact=False,
        )
        for name, (op, shape, count, side, small) in CASES.items()
    ]


def error(op: str, id: str, message: str, *args) -> ErrorCase:
    return ErrorCase(op, f"{op}_{id}", lambda: getattr(ops, op)(*args), message)


G = torch.ones(4, 5)


class TestRandom(OpTests):
    cases = make_cases()
    errors = [  # noqa: RUF012
        error("rand_project", "vector", "G must be [n, m], got [4]", torch.ones(4), seed_on("cpu"), 2),
        error("rand_project", "rank", "rank must be at least 1, got 0", G, seed_on("cpu"), 0),
        error("rand_project", "seed", "seed must be an int64 tensor with one element", G, torch.ones(2).long(), 2),
        error("rand_project", "seed_type", "seed must be an int64 tensor with one element", G, torch.ones(1), 2),
        error("rand_project", "side", "side must be auto, left or right, got up", G, seed_on("cpu"), 2, "up"),
        error("rand_project", "int", "G must be float32, bfloat16, float16 or float64", G.int(), seed_on("cpu"), 2),
        error("rand_project_back", "side", "side must be left or right, got auto", G, seed_on("cpu"), 2, "auto"),
        error("rand_project_back", "size", "size must not be negative, got -1", G, seed_on("cpu"), -1, "left"),
        error("rand_matrix", "rank", "rank and size must not be negative", seed_on("cpu"), -1, 2),
        error("randomized_range", "rank", "rank must be from 1 to min(n, m) = 4, got 5", G, 5, seed_on("cpu")),
        error("randomized_range", "rank_0", "rank must be from 1 to min(n, m) = 4, got 0", G, 0, seed_on("cpu")),
        error(
            "randomized_range",
            "dtype",
            "G must be float32, bfloat16 or float16, got float64",
            G.double(),
            2,
            seed_on("cpu"),
        ),
        error("randomized_range", "iters", "oversample and iters must not be negative", G, 2, seed_on("cpu"), 8, -1),
    ]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rank", [1, 8, 77])
def test_numeric_back_is_the_adjoint(side: str, rank: int, device: torch.device) -> None:
    """<rand_project(G), R> = <G, rand_project_back(R)>."""
    inputs = Inputs(torch.float64, device)
    G = inputs.tensor(130, 75)
    R = inputs.tensor(rank, 75) if side == "left" else inputs.tensor(130, rank)
    there = ops.rand_project(G, seed_on(device), rank, side)
    back = ops.rand_project_back(R, seed_on(device), 130 if side == "left" else 75, side)
    torch.testing.assert_close((there * R).sum(), (G * back).sum())


# ---- rand_matrix ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (2, 63), (5, 65), (4, 1000), (1, 5461)], ids=str)
@pytest.mark.parametrize("seed", [0, 1, SEED, -1, 2**63 - 1])
def test_numeric_normals_are_their_definition(shape, seed: int, device: torch.device) -> None:
    got = ops.rand_matrix(seed_on(device, seed), *shape).cpu().double()
    want = reference.rand_matrix(seed, *shape)
    assert ((got - want).abs() <= 4e-7 * want.abs() + 1e-6 * shape[0] ** -0.5).all()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert_bitwise_equal(ops.rand_matrix(seed_on(device, seed), *shape, dtype).cpu(), got.to(dtype), str(dtype))


def test_normals_are_normal() -> None:
    """Moments, tails and independence of 2 million; bounds are 5 standard deviations."""
    Z = slkernels.rand_matrix(3, 32, 65536).double() * 32**0.5
    n = Z.numel()
    for power, want, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((Z**power).mean()) - want) < 5 * (variance / n) ** 0.5
    for limit in (1.0, 2.0, 3.0, 4.0):
        p = float(torch.special.erfc(torch.tensor(limit / 2**0.5, dtype=torch.float64)))
        assert abs(float((Z.abs() > limit).double().mean()) - p) < 5 * (p / n) ** 0.5
    for step in (1, 16, 32, 48, 64):
        assert abs(float((Z[:, step:] * Z[:, :-step]).mean())) < 5 / n**0.5
        assert abs(float((Z[:, step:].square() * Z[:, :-step].square()).mean()) - 1) < 5 * 3 / n**0.5
    assert abs(float((Z[1:] * Z[:-1]).mean())) < 5 / n**0.5
    others = slkernels.rand_matrix(4, 32, 65536).double() * 32**0.5
    assert abs(float((Z * others).mean())) < 5 / n**0.5


def test_rows_do_not_depend_on_the_rank() -> None:
    small, large = slkernels.rand_matrix(SEED, 4, 100), slkernels.rand_matrix(SEED, 16, 100)
    assert_bitwise_equal(small / 2, large[:4], "rows")  # 1 / sqrt(4) against 1 / sqrt(16)


def test_normals_are_the_same_bits_on_every_instruction_set() -> None:
    code = (
        "import slkernels, torch, hashlib;"
        "Z = slkernels.rand_matrix(77, 64, 10007);"
        "print(hashlib.sha256(Z.numpy().tobytes()).hexdigest())"
    )
    mine = hashlib.sha256(slkernels.rand_matrix(77, 64, 10007).numpy().tobytes()).hexdigest()
    compared = 0
    for isa in slkernels.build_info()["cpu_isas"]:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "SLKERNELS_CPU_ISA": isa},
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            compared += 1
            assert done.stdout.strip() == mine, isa
    assert compared >= 1


def test_int_seeds_are_tensor_seeds() -> None:
    assert_bitwise_equal(slkernels.rand_project(G, 5, 2), ops.rand_project(G, seed_on("cpu", 5), 2), "project")
    assert_bitwise_equal(
        slkernels.rand_project_back(G, 5, 9, "right"), ops.rand_project_back(G, seed_on("cpu", 5), 9, "right"), "back"
    )
    assert_bitwise_equal(slkernels.rand_matrix(5, 2, 9), ops.rand_matrix(seed_on("cpu", 5), 2, 9), "matrix")
    assert not torch.equal(slkernels.rand_matrix(5, 2, 9), slkernels.rand_matrix(6, 2, 9))


# ---- randomized_range -----------------------------------------------------------------------------------------------


def spectrum(n: int, m: int, kind: str, seed: int = 0) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    k = min(n, m)
    U = torch.linalg.qr(torch.randn(n, k, generator=gen, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(m, k, generator=gen, dtype=torch.float64))[0]
    i = torch.arange(1, k + 1, dtype=torch.float64)
    values = {"power": i**-1.0, "fast": 0.8**i, "step": torch.where(i <= 10, 1.0, 1e-3), "flat": torch.ones(k).double()}
    return (U * values[kind]) @ V.t()


def as_rows(P: Tensor, side: str) -> Tensor:
    return P.t() if side == "left" else P


def captured(G: Tensor, rows: Tensor, side: str) -> float:
    """The part of |G|^2 that the subspace holds."""
    G = G.double().t() if side == "left" else G.double()
    return float((G @ rows.double().t()).square().sum())


RANGE_SHAPES = [(60, 40, 8), (40, 60, 8), (64, 64, 1), (128, 50, 30), (200, 333, 40), (31, 29, 29), (50, 20, 18)]


@pytest.mark.parametrize("kind", ["power", "fast", "step", "flat"])
@pytest.mark.parametrize("shape", RANGE_SHAPES, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_numeric_range_is_as_good_as_svd(kind: str, shape, side: str, device: torch.device) -> None:
    n, m, rank = shape
    G = spectrum(n, m, kind)
    P = ops.randomized_range(G.float().to(device), rank, seed_on(device), 8, 1, side).cpu()
    assert P.shape == ((n, rank) if side == "left" else (rank, m)) and P.dtype == torch.float32
    rows = as_rows(P, side).double()
    assert (rows @ rows.t() - torch.eye(rank)).abs().max() < 3e-6
    best = float(torch.linalg.svdvals(G)[:rank].square().sum())
    got = captured(G, rows, side)
    assert got <= best * (1 + 1e-5)
    assert got >= best * {"power": 0.98, "fast": 0.9999, "step": 0.99, "flat": 0.999}[kind], got / best
    by_reference = reference.randomized_range(G, rank, SEED, side=side)
    other = captured(G, as_rows(by_reference, side), side)
    assert best - got <= 1.5 * (best - other) + 1e-5 * best


@pytest.mark.parametrize("iters", [0, 1, 2, 4])
def test_range_power_iterations_help(iters: int) -> None:
    G = spectrum(120, 90, "power")
    best = float(torch.linalg.svdvals(G)[:10].square().sum())
    loss = [
        1 - captured(G, slkernels.randomized_range(G.float(), 10, SEED, oversample=2, iters=i), "right") / best
        for i in (iters, iters + 2)
    ]
    assert loss[1] + 1e-6 >= 0 and loss[1] <= loss[0] + 1e-6 and loss[1] < 0.01


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (300, 200), (33, 31)], ids=str)
def test_numeric_range_of_deficient_gradients(shape, side: str, device: torch.device) -> None:
    """Rank below what is asked for: still orthonormal, and the whole of G is in the subspace."""
    gen = torch.Generator().manual_seed(0)
    for true_rank in (0, 1, 3):
        G = torch.randn(shape[0], true_rank, generator=gen) @ torch.randn(true_rank, shape[1], generator=gen)
        for rank in (5, 20):
            P = ops.randomized_range(G.to(device), rank, seed_on(device), 8, 1, side).cpu()
            rows = as_rows(P, side)
            assert (rows @ rows.t() - torch.eye(rank)).abs().max() < 3e-6
            total = float(G.double().square().sum())
            assert captured(G, rows, side) >= total * (1 - 1e-5)
    constant = torch.full(shape, 0.5, device=device)
    rows = as_rows(ops.randomized_range(constant, 7, seed_on(device), 8, 1, side), side)
    assert (rows @ rows.t() - torch.eye(7, device=device)).abs().max() < 3e-6


@pytest.mark.parametrize("factor", [1e-38, 1e-30, 1e-12, 1e12, 1e36])
def test_range_of_tiny_and_huge_gradients(factor: float) -> None:
    G = spectrum(70, 50, "fast").float()
    want = slkernels.randomized_range(G, 6, SEED)
    got = slkernels.randomized_range(G * factor, 6, SEED)
    assert (got @ got.t() - torch.eye(6)).abs().max() < 3e-6
    assert captured(G, got, "right") >= captured(G, want, "right") * (1 - 1e-3)


def test_range_singular_vectors_fall() -> None:
    G = spectrum(80, 60, "fast").float()
    P = slkernels.randomized_range(G, 6, SEED)
    singular = (G @ P.t()).norm(dim=0)
    torch.testing.assert_close(singular.double(), 0.8 ** torch.arange(1, 7).double(), rtol=1e-3, atol=0)


def test_range_is_nan_where_the_gradient_is() -> None:
    G = spectrum(40, 30, "power").float()
    for bad in (torch.nan, torch.inf):
        G[3, 4] = bad
        assert slkernels.randomized_range(G, 4, SEED).isnan().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_range_same_seed_same_bits(dtype: torch.dtype, device: torch.device) -> None:
    """What lets every rank of a job compute the projection by itself."""
    G = spectrum(150, 130, "power").to(device, dtype)
    P = slkernels.randomized_range(G, 16, SEED)
    assert P.dtype == torch.float32
    assert_bitwise_equal(slkernels.randomized_range(G.clone(), 16, SEED), P, "again")
    assert_bitwise_equal(slkernels.randomized_range(G.t().contiguous().t(), 16, SEED), P, "other strides")
    assert not torch.equal(slkernels.randomized_range(G, 16, SEED + 1), P)


def test_range_in_grad_mode_has_no_graph() -> None:
    G = torch.randn(40, 30, requires_grad=True)
    assert not slkernels.randomized_range(G, 4, SEED).requires_grad


@pytest.mark.parametrize(("op", "args"), [("randomized_range", (G, 2)), ("rand_matrix", (3, 5))])
def test_ops_without_gradient_opcheck(op: str, args: tuple) -> None:
    args = (*args, seed_on("cpu")) if op == "randomized_range" else (seed_on("cpu"), *args)
    torch.library.opcheck(getattr(ops, op).default, args)
    compiled = torch.compile(lambda *a: getattr(ops, op)(*a) * 2, fullgraph=True, backend="aot_eager")
    assert_bitwise_equal(compiled(*args), getattr(ops, op)(*args) * 2, op)
