"""block8_spmm, block8_spmm_t and block8_sddmm."""

from __future__ import annotations

import pytest
import slkernels
import torch
from harness import FLOATS, Inputs, OpCase, assert_bitwise_equal, assert_matches_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from op_tests import ErrorCase, OpTests
from slkernels import reference
from supports import FAULT_SHAPE, shapes_and_supports
from torch import Tensor

ops = torch.ops.slkernels

# id: leading shape of x, n, m, density of blocks, small. The edges cut blocks where 8 does not divide.
SHAPES = {
    "small": ((3,), 16, 8, 0.6, True),
    "small_cut": ((3,), 11, 13, 0.7, True),
    "vector": ((), 9, 8, 0.7, True),
    "batched": ((2, 3), 8, 17, 0.7, True),
    "ones": ((1,), 1, 1, 1.0, True),
    "no_tokens": ((0,), 9, 8, 0.7, True),
    "no_blocks": ((3,), 9, 8, 0.0, True),
    "no_rows": ((3,), 0, 8, 0.5, True),
    "no_columns": ((3,), 9, 0, 0.5, True),
    "full": ((37,), 61, 53, 1.0, False),
    "primes": ((37,), 211, 157, 0.2, False),
    "one_token": ((1,), 131, 257, 0.2, False),
    "tokens_17": ((17,), 131, 257, 0.2, False),
    "many_tokens": ((1031,), 65, 71, 0.2, False),
    "rows_5461": ((19,), 5461, 23, 0.2, False),
    "columns_2736": ((34,), 19, 2736, 0.1, False),
    "columns_int32": ((2,), 3, 262152, 0.005, False),
}


def needs_16_bits(inputs: Inputs) -> None:
    if torch.device(inputs.device).type == "cuda" and inputs.dtype not in (torch.bfloat16, torch.float16):
        pytest.skip("CUDA takes bfloat16 and float16, and refuses others")


def grid(n: int, m: int) -> tuple[int, int]:
    return (n + 7) // 8, (m + 7) // 8


def make_cases() -> list[OpCase]:
    cases = []
    for name, (lead, n, m, density, small) in SHAPES.items():

        def spmm(inputs: Inputs, lead=lead, n=n, m=m, density=density) -> tuple:
            needs_16_bits(inputs)
            crow, col = inputs.support(*grid(n, m), density)
            return inputs.tensor(*lead, m), inputs.tensor(col.numel(), 8, 8), crow, col, n

        def spmm_t(inputs: Inputs, lead=lead, n=n, m=m, density=density) -> tuple:
            needs_16_bits(inputs)
            crow, col = inputs.support(*grid(n, m), density)
            return inputs.tensor(*lead, n), inputs.tensor(col.numel(), 8, 8), crow, col, m

        def sddmm(inputs: Inputs, lead=lead, n=n, m=m, density=density) -> tuple:
            needs_16_bits(inputs)
            crow, col = inputs.support(*grid(n, m), density)
            return inputs.tensor(*lead, n), inputs.tensor(*lead, m), crow, col

        tokens = int(torch.tensor(lead).prod())
        for op, make in (("block8_spmm", spmm), ("block8_spmm_t", spmm_t), ("block8_sddmm", sddmm)):
            cases.append(
                OpCase(
                    op=op,
                    id=f"{op.removeprefix('block8_')}-{name}",
                    make=make,
                    reference=getattr(reference, op),
                    terms=max(n, m, tokens),
                    small=small,
                    twice=True,
                    exact=bool(tokens and n and m and density) and max(tokens, m, n) < 3000,
                )
            )
    return cases


N, M = 11, 13
CROW, COL = Inputs(torch.float32).support(*grid(N, M), 0.7)
BLOCKS = COL.numel()


def call(op: str, **changes) -> Tensor:
    a = dict(crow=CROW, col=COL) | changes
    if op == "block8_sddmm":
        return ops.block8_sddmm(a.get("dy", torch.ones(3, N)), a.get("x", torch.ones(3, M)), a["crow"], a["col"])
    given = a.get("x", torch.ones(3, M if op == "block8_spmm" else N))
    size = a.get("size", N if op == "block8_spmm" else M)
    return getattr(ops, op)(given, a.get("values", torch.ones(BLOCKS, 8, 8)), a["crow"], a["col"], size)


def errors() -> list[ErrorCase]:
    found = []
    for op, name in (("block8_spmm", "x"), ("block8_spmm_t", "dy")):
        for id, message, changes in (
            ("int", f"{name} must be float32, bfloat16, float16 or float64", dict(x=torch.ones(3, N).long())),
            ("scalar", f"{name} must be [tokens, ", dict(x=torch.tensor(1.0))),
            ("values_shape", f"values must be [{BLOCKS}, 8, 8], got [64]", dict(values=torch.ones(64))),
            ("values_dtype", f"values must have {name}'s dtype", dict(values=torch.ones(BLOCKS, 8, 8).half())),
        ):
            call_it = lambda op=op, changes=changes: call(op, **changes)  # noqa: E731
            found.append(ErrorCase(op, f"{op}-{id}", call_it, message))
    found.append(
        ErrorCase("block8_spmm", "rows", lambda: call("block8_spmm", size=17), "crow must be [4], got [3]"),
    )
    for id, message, changes in (
        ("tokens", "dy and x must have the same tokens, got [3, 11] and [4, 13]", dict(x=torch.ones(4, M))),
        ("dtype", "dy must have x's dtype float32, got float64", dict(dy=torch.ones(3, N).double())),
        ("rows", "crow must be [4], got [3]", dict(dy=torch.ones(3, 17))),
    ):
        call_it = lambda changes=changes: call("block8_sddmm", **changes)  # noqa: E731
        found.append(ErrorCase("block8_sddmm", f"sddmm-{id}", call_it, message))
    return found


def fault_call(op: str):
    n, m = (8 * size for size in FAULT_SHAPE)

    def run(crow: Tensor, col: Tensor, validate: bool) -> Tensor:
        values, x, dy = torch.ones(col.numel(), 8, 8), torch.ones(3, m), torch.ones(3, n)
        if op == "block8_sddmm":
            return ops.block8_sddmm(dy, x, crow, col, validate)
        return getattr(ops, op)(
            *((x, values, crow, col, n) if op == "block8_spmm" else (dy, values, crow, col, m)), validate
        )

    return run


class TestBlock8(OpTests):
    cases = make_cases()
    errors = errors()
    fault_calls = {op: fault_call(op) for op in ("block8_spmm", "block8_spmm_t", "block8_sddmm")}  # noqa: RUF012


@settings(max_examples=40)
@given(
    shapes_and_supports(max_size=9),
    st.integers(0, 7),
    st.integers(0, 7),
    st.integers(0, 70),
    st.sampled_from([*FLOATS, torch.float64]),
)
def test_numeric_any_shape_and_support(shape, cut_n: int, cut_m: int, tokens: int, dtype: torch.dtype) -> None:
    rows, columns, (crow, col) = shape
    n, m = max(8 * rows - cut_n, 0), max(8 * columns - cut_m, 0)
    inputs = Inputs(dtype, seed=tokens)
    case = OpCase("block8_spmm", "drawn", lambda _: (), reference.block8_spmm, max(n, m, tokens))
    assert_matches_reference(case, (inputs.tensor(tokens, m), inputs.tensor(col.numel(), 8, 8), crow, col, n))
    case = OpCase("block8_sddmm", "drawn", lambda _: (), reference.block8_sddmm, max(n, m, tokens))
    assert_matches_reference(case, (inputs.tensor(tokens, n), inputs.tensor(tokens, m), crow, col))


@pytest.mark.parametrize(("n", "m"), [(64, 80), (67, 83)])
def test_random_blocks_are_the_block8_support(n: int, m: int) -> None:
    """The list of random_blocks8 and the CSR of random_support(kind="block8") are one matrix."""
    inputs = Inputs(torch.float64)
    blocks = slkernels.random_blocks8(n, m, 0.3, 5)
    values = inputs.tensor(blocks[1].numel(), 8, 8)
    dense = reference.block8_to_dense(values, *blocks, n, m)
    crow, col = slkernels.random_support(n, m, 0.3, 5, "block8")
    x, dy = inputs.tensor(9, m), inputs.tensor(9, n)
    entries = slkernels.gather_support(dense, crow, col)
    got = slkernels.block8_spmm(x, values, *blocks, n)
    torch.testing.assert_close(got, slkernels.spmm(x, entries, crow, col, n))
    got = slkernels.block8_spmm_t(dy, values, *blocks, m)
    torch.testing.assert_close(got, slkernels.spmm_t(dy, entries, crow, col, m))
    got = reference.block8_to_dense(slkernels.block8_sddmm(dy, x, *blocks), *blocks, n, m)
    want = slkernels.sddmm(dy, x, crow, col)
    torch.testing.assert_close(slkernels.gather_support(got, crow, col), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_entries_beyond_the_edges_take_no_part(dtype: torch.dtype, device: torch.device) -> None:
    n, m = 13, 11
    crow, col = (t.to(device) for t in (torch.tensor([0, 2, 4], dtype=torch.int32), torch.tensor([0, 1, 0, 1]).short()))
    inputs = Inputs(dtype, device)
    needs_16_bits(inputs)
    values, x, dy = inputs.tensor(4, 8, 8), inputs.tensor(20, m), inputs.tensor(20, n)
    inside = reference.block8_to_dense(torch.ones_like(values), crow, col, 16, 16)
    inside[n:], inside[:, m:] = 0, 0
    inside = inside.view(2, 8, 2, 8).transpose(1, 2).reshape(4, 8, 8).bool()
    large = torch.where(inside, values, 1e30)
    assert_bitwise_equal(ops.block8_spmm(x, large, crow, col, n), ops.block8_spmm(x, values, crow, col, n), "spmm")
    assert_bitwise_equal(ops.block8_spmm_t(dy, large, crow, col, m), ops.block8_spmm_t(dy, values, crow, col, m), "t")
    assert not ops.block8_sddmm(dy, x, crow, col)[~inside].any()


def test_cuda_refuses_what_its_tensor_cores_do_not_take(gpu: torch.device) -> None:
    crow, col, x, dy = CROW.to(gpu), COL.to(gpu), torch.ones(3, M, device=gpu), torch.ones(3, N, device=gpu)
    values = torch.ones(BLOCKS, 8, 8, device=gpu)
    for call_it in (
        lambda: ops.block8_spmm(x, values, crow, col, N),
        lambda: ops.block8_spmm_t(dy, values, crow, col, M),
        lambda: ops.block8_sddmm(dy, x, crow, col),
    ):
        with pytest.raises(RuntimeError, match="CUDA tensors must be bfloat16 or float16, got float32"):
            call_it()


def test_wrappers_are_the_ops() -> None:
    x, dy, values = torch.randn(3, M), torch.randn(3, N), torch.randn(BLOCKS, 8, 8)
    for got, want in (
        (slkernels.block8_spmm(x, values, CROW, COL, N), ops.block8_spmm(x, values, CROW, COL, N)),
        (slkernels.block8_spmm_t(dy, values, CROW, COL, M), ops.block8_spmm_t(dy, values, CROW, COL, M)),
        (slkernels.block8_sddmm(dy, x, CROW, COL), ops.block8_sddmm(dy, x, CROW, COL)),
    ):
        assert_bitwise_equal(got, want, "block8")
