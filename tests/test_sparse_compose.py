"""compose and gather_support."""

from __future__ import annotations

import math

import pytest
import slkernels
import torch
from harness import FLOATS, Inputs, OpCase, assert_bitwise_equal, assert_matches_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from op_tests import ErrorCase, OpTests
from slkernels import reference
from supports import FAULT_SHAPE, shapes_and_supports

ops = torch.ops.slkernels

# id: n, m, rank (None: no factors), alpha (None: default arguments are left out), base, density, small
COMPOSE = {
    "small": (8, 5, 3, 0.5, True, 0.4, True),
    "small_no_base": (6, 7, 2, -2.0, False, 0.4, True),
    "small_no_factors": (6, 7, None, 1.0, True, 0.4, True),
    "small_values_only": (6, 7, None, None, False, 0.4, True),
    "no_nonzeros": (4, 5, 2, 0.5, False, 0.0, True),
    "no_rows": (0, 5, 2, 0.5, True, 0.5, True),
    "no_columns": (4, 0, 2, 0.5, True, 0.5, True),
    "dense": (9, 33, 5, 0.25, True, 1.0, False),
    "primes": (61, 53, 13, 0.25, False, 0.2, False),
    "rows_5461": (5461, 23, 7, 0.25, True, 0.05, False),
    "columns_2736": (19, 2736, 11, 0.25, False, 0.05, False),
    "columns_int32": (3, 40009, 2, 0.25, True, 0.05, False),
}
GATHER = {
    "small": (8, 5, 0.4, True),
    "one": (1, 1, 1.0, True),
    "no_nonzeros": (4, 5, 0.0, True),
    "no_rows": (0, 5, 0.5, True),
    "no_columns": (4, 0, 0.5, True),
    "primes": (61, 53, 0.2, False),
    "rows_5461": (5461, 23, 0.05, False),
    "columns_int32": (3, 40009, 0.05, False),
}


def compose_magnitude(values, crow, col, m, A=None, B=None, alpha=1.0, base=None):
    return reference.compose(values, crow, col, m, A, B, abs(alpha), base)


def make_cases() -> list[OpCase]:
    cases = []
    for name, (n, m, rank, alpha, base, density, small) in COMPOSE.items():

        def compose(inputs: Inputs, n=n, m=m, rank=rank, alpha=alpha, base=base, density=density) -> tuple:
            crow, col = inputs.support(n, m, density)
            values = inputs.tensor(col.numel())
            if alpha is None:
                return values, crow, col, m
            factors = (inputs.tensor(rank, m), inputs.tensor(n, rank)) if rank else (None, None)
            return values, crow, col, m, *factors, alpha, inputs.tensor(n, m) if base else None

        exact = bool(n and m) and density > 0
        # The dense part is rounded before S is added; a backward product before it is scaled.
        shared = dict(terms=max(n, m), roundings=2, small=small, twice=True, exact=exact, dense=True)
        cases.append(OpCase("compose", name, compose, reference.compose, magnitude=compose_magnitude, **shared))
    for name, (n, m, density, small) in GATHER.items():

        def gather(inputs: Inputs, n=n, m=m, density=density) -> tuple:
            return inputs.tensor(n, m), *inputs.support(n, m, density)

        exact = bool(n and m) and density > 0
        shared = dict(terms=1, small=small, twice=True, exact=exact)
        cases.append(OpCase("gather_support", name, gather, reference.gather_support, **shared))
    return cases


N, M, RANK = 8, 5, 3
CROW, COL = Inputs(torch.float32).support(N, M, 0.4)
NNZ = COL.numel()


def compose(**changes) -> torch.Tensor:
    a = dict(values=torch.ones(NNZ), crow=CROW, col=COL, m=M, A=torch.ones(RANK, M), B=torch.ones(N, RANK))
    a |= dict(alpha=1.0, base=torch.ones(N, M), validate=True)
    return ops.compose(*{**a, **changes}.values())


def gather(w: torch.Tensor) -> torch.Tensor:
    return ops.gather_support(w, CROW, COL)


def error(id: str, message: str, **changes) -> ErrorCase:
    return ErrorCase("compose", id, lambda: compose(**changes), message)


class TestCompose(OpTests):
    cases = make_cases()
    errors = [  # noqa: RUF012
        error("values_length", f"values must be [{NNZ}], got [1]", values=torch.ones(1)),
        error(
            "values_int",
            "values must be float32, bfloat16, float16 or float64, got int32",
            values=torch.ones(NNZ).int(),
        ),
        error("A_alone", "A and B go together", B=None),
        error("B_alone", "A and B go together", A=None),
        error("A_columns", "A must be [rank, 5], got [3, 4]", A=torch.ones(3, 4)),
        error("A_vector", "A must be [rank, 5], got [5]", A=torch.ones(5)),
        error("B_rows", "B must be [8, rank], got [7, 3]", B=torch.ones(7, 3)),
        error("ranks", "A and B must have the same rank, got A [3, 5] and B [8, 2]", B=torch.ones(8, 2)),
        error("A_dtype", "A must have values's dtype float32, got bfloat16", A=torch.ones(RANK, M).bfloat16()),
        error("B_dtype", "B must have values's dtype float32, got float64", B=torch.ones(N, RANK).double()),
        error("base_shape", "base must be [8, 5], got [5, 8]", base=torch.ones(5, 8)),
        error("base_dtype", "base must have values's dtype float32, got float16", base=torch.ones(N, M).half()),
        error("m_negative", "n and m must not be negative, got 8 and -1", m=-1),
        error("crow_empty", "crow must be [n + 1], got [0]", crow=CROW[:0]),
        ErrorCase("gather_support", "w_vector", lambda: gather(torch.ones(5)), "w must be [n, m], got [5]"),
        ErrorCase("gather_support", "w_rows", lambda: gather(torch.ones(7, 5)), "crow must be [8], got [9]"),
        ErrorCase(
            "gather_support",
            "w_int",
            lambda: gather(torch.ones(8, 5).long()),
            "w must be float32, bfloat16, float16 or float64, got int64",
        ),
    ]
    fault_calls = {  # noqa: RUF012
        "compose": lambda crow, col, validate: ops.compose(
            torch.ones(col.numel()), crow, col, FAULT_SHAPE[1], validate=validate
        ),
        "gather_support": lambda crow, col, validate: ops.gather_support(torch.ones(FAULT_SHAPE), crow, col, validate),
    }

    def test_fault(self, faulty) -> None:
        op, fault = faulty
        if op == "compose" and fault.id in ("crow_length", "crow_2d"):
            pytest.skip("compose takes n from crow")
        super().test_fault(faulty)


@settings(max_examples=25)
@given(shapes_and_supports(), st.integers(1, 20), st.sampled_from([*FLOATS, torch.float64]), st.booleans())
def test_numeric_any_shape_and_support(shape, rank: int, dtype: torch.dtype, with_base: bool) -> None:
    n, m, (crow, col) = shape
    inputs = Inputs(dtype)
    args = [inputs.tensor(col.numel()), crow, col, m, inputs.tensor(rank, m), inputs.tensor(n, rank), 0.3]
    if with_base:
        args.append(inputs.tensor(n, m))
    terms = max(n, m, rank)
    case = OpCase("compose", "drawn", lambda _: (), reference.compose, terms, 2, magnitude=compose_magnitude)
    assert_matches_reference(case, tuple(args))
    case = OpCase("gather_support", "drawn", lambda _: (), reference.gather_support, 1)
    assert_matches_reference(case, (inputs.tensor(n, m), crow, col))


@given(shapes_and_supports())
def test_gather_undoes_compose(shape) -> None:
    _, m, (crow, col) = shape
    values = torch.randn(col.numel())
    w = ops.compose(values, crow, col, m)
    assert_bitwise_equal(ops.gather_support(w, crow, col), values, "values")
    assert int((w != 0).sum()) == int((values != 0).sum())


def test_numeric_nan_stays_at_its_position() -> None:
    values = torch.ones(NNZ)
    values[3] = math.nan
    w = compose(values=values)
    assert int(w.isnan().sum()) == 1
    assert ops.gather_support(w, CROW, COL).isnan().nonzero().tolist() == [[3]]


def test_base_is_not_written() -> None:
    base = torch.randn(N, M)
    before = base.clone()
    w = compose(base=base)
    assert_bitwise_equal(base, before, "base")
    assert w.data_ptr() != base.data_ptr()


def test_wrappers_are_the_ops() -> None:
    w = torch.randn(N, M)
    assert_bitwise_equal(slkernels.gather_support(w, CROW, COL), gather(w), "gather_support")
    got = slkernels.compose(torch.ones(NNZ), CROW, COL, M, torch.ones(RANK, M), torch.ones(N, RANK), base=w)
    assert_bitwise_equal(got, compose(base=w), "compose")


@pytest.mark.sanitize
@pytest.mark.parametrize("kernel", ["sm80", "sm90"])
@pytest.mark.parametrize(("n", "m", "rank"), [(130, 264, 40), (3, 8, 1), (257, 512, 100)])
def test_tile_kernel_adds_s_in_its_epilogue(gpu, n: int, m: int, rank: int, kernel: str) -> None:
    if kernel == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no GPU that runs sm90")
    inputs = Inputs(torch.bfloat16, gpu)
    crow, col = inputs.support(n, m, 0.1)
    args = (inputs.tensor(col.numel()), crow, col, m, inputs.tensor(rank, m), inputs.tensor(n, rank), 0.5, kernel)
    case = OpCase(
        "_compose_tile", "drawn", lambda _: (), lambda *a: reference.compose(*a[:7]), rank, magnitude=compose_magnitude
    )
    assert_matches_reference(case, args, backward=False)
    assert_bitwise_equal(ops._compose_tile(*args), ops._compose_tile(*args), "again")


def test_tile_kernel_needs_cuda() -> None:
    bf16 = torch.bfloat16
    with pytest.raises(NotImplementedError, match="_compose_tile"):
        ops._compose_tile(
            torch.ones(NNZ, dtype=bf16),
            CROW,
            COL,
            M,
            torch.ones(RANK, M, dtype=bf16),
            torch.ones(N, RANK, dtype=bf16),
            1.0,
        )
