"""sl_linear."""

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

# id: leading shape of x, n, m, rank, density, bias, small
SHAPES = {
    "small": ((3,), 8, 5, 2, 0.4, True, True),
    "vector": ((), 5, 4, 2, 0.5, False, True),
    "batched": ((2, 3), 4, 5, 2, 0.5, True, True),
    "ones": ((1,), 1, 1, 1, 1.0, False, True),
    "no_tokens": ((0,), 5, 4, 2, 0.5, True, True),
    "no_nonzeros": ((3,), 5, 4, 2, 0.0, True, True),
    "no_rows": ((3,), 0, 4, 2, 0.5, False, True),
    "no_columns": ((3,), 5, 0, 2, 0.5, True, True),
    "primes": ((37,), 61, 53, 13, 0.2, True, False),
    "one_token": ((1,), 131, 257, 17, 0.1, True, False),
    "few_tokens": ((7,), 131, 257, 31, 0.05, False, False),
    "many_tokens": ((1031,), 29, 31, 7, 0.2, True, False),
    "rows_5461": ((19,), 5461, 23, 7, 0.05, True, False),
    "columns_2736": ((34,), 19, 2736, 11, 0.05, False, False),
    "columns_int32": ((3,), 3, 40009, 2, 0.05, True, False),
}


def make_cases() -> list[OpCase]:
    cases = []
    for name, (lead, n, m, rank, density, bias, small) in SHAPES.items():
        for path in ("chain", "compose", "auto"):
            if path == "auto" and not small:
                continue  # one of the other two

            def make(inputs: Inputs, lead=lead, n=n, m=m, rank=rank, density=density, bias=bias, path=path) -> tuple:
                crow, col = inputs.support(n, m, density)
                x, values = inputs.tensor(*lead, m), inputs.tensor(col.numel())
                A, B = inputs.tensor(rank, m), inputs.tensor(n, rank)
                args = (x, A, B, values, crow, col, 0.5)
                if path == "auto" and not bias:
                    return args  # the default arguments
                return *args, inputs.tensor(n) if bias else None, path

            tokens = int(torch.tensor(lead).prod())
            cases.append(
                OpCase(
                    op="sl_linear",
                    id=f"{name}-{path}",
                    make=make,
                    reference=reference.sl_linear,
                    terms=max(n, m, rank, tokens),
                    roundings=4,  # z, the low-rank part, W; the gradients of each
                    small=small,
                    dense=True,
                    exact=bool(tokens and n and m and tokens < 1000 and m < 1000),
                )
            )
    return cases


N, M, RANK = 8, 5, 2
CROW, COL = Inputs(torch.float32).support(N, M, 0.4)
NNZ = COL.numel()


def call(**changes) -> Tensor:
    a = dict(x=torch.ones(3, M), A=torch.ones(RANK, M), B=torch.ones(N, RANK), values=torch.ones(NNZ), crow=CROW)
    a |= dict(col=COL, alpha=0.5, bias=torch.ones(N), path="auto", validate=True, weight=None)
    return ops.sl_linear(*{**a, **changes}.values())


def error(id: str, message: str, **changes) -> ErrorCase:
    return ErrorCase("sl_linear", id, lambda: call(**changes), message)


def faulty_call(path: str):
    n, m = FAULT_SHAPE

    def run(crow: Tensor, col: Tensor, validate: bool) -> Tensor:
        values = torch.ones(col.numel())
        x, A, B = torch.ones(3, m), torch.ones(2, m), torch.ones(n, 2)
        return ops.sl_linear(x, A, B, values, crow, col, 1.0, None, path, validate)

    return run


class TestSl(OpTests):
    cases = make_cases()
    errors = [  # noqa: RUF012
        error("x_columns", "x must be [tokens, 5], got [3, 4]", x=torch.ones(3, 4)),
        error("x_scalar", "x must be [tokens, 5], got []", x=torch.tensor(1.0)),
        error("x_int", "x must be float32, bfloat16, float16 or float64, got int32", x=torch.ones(3, M).int()),
        error("A_vector", "A must be [rank, m], got [5]", A=torch.ones(5)),
        error("B_vector", "B must be [n, rank], got [8]", B=torch.ones(8)),
        error("ranks", "A and B must have the same rank, got A [2, 5] and B [8, 3]", B=torch.ones(N, 3)),
        error("rank_0", "rank must be at least 1", A=torch.ones(0, M), B=torch.ones(N, 0)),
        error("A_dtype", "A must have x's dtype float32, got float16", A=torch.ones(RANK, M).half()),
        error("values_length", f"values must be [{NNZ}], got [3]", values=torch.ones(3)),
        error("values_dtype", "values must have x's dtype float32, got bfloat16", values=torch.ones(NNZ).bfloat16()),
        error("bias_length", "bias must be [8], got [7]", bias=torch.ones(7)),
        error("bias_dtype", "bias must have x's dtype float32, got float64", bias=torch.ones(N).double()),
        error("weight_shape", "weight must be [8, 5], got [5, 8]", weight=torch.ones(M, N)),
        error("weight_dtype", "weight must have x's dtype float32, got float64", weight=torch.ones(N, M).double()),
        error("weight_chain", "path chain does not use weight", weight=torch.ones(N, M), path="chain"),
        error("path", "path must be auto, chain or compose, got dense", path="dense"),
    ]
    fault_calls = {"sl_linear": faulty_call("auto")}  # noqa: RUF012


@settings(max_examples=25)
@given(
    shapes_and_supports(),
    st.integers(0, 40),
    st.integers(1, 20),
    st.sampled_from(["chain", "compose"]),
    st.sampled_from([*FLOATS, torch.float64]),
)
def test_numeric_any_shape_and_support(shape, tokens: int, rank: int, path: str, dtype: torch.dtype) -> None:
    n, m, (crow, col) = shape
    inputs = Inputs(dtype, seed=tokens)
    args = (inputs.tensor(tokens, m), inputs.tensor(rank, m), inputs.tensor(n, rank), inputs.tensor(col.numel()))
    case = OpCase("sl_linear", "drawn", lambda _: (), reference.sl_linear, max(n, m, rank, tokens), 4)
    assert_matches_reference(case, (*args, crow, col, 0.25, inputs.tensor(n), path))


@pytest.mark.parametrize("path", ["auto", "chain", "compose"])
def test_backward_keeps_only_inputs(path: str) -> None:
    saved: list[Tensor] = []
    inputs = Inputs(torch.float32)
    crow, col = inputs.support(24, 16, 0.3)
    args = [inputs.tensor(*s).requires_grad_() for s in ((40, 16), (3, 16), (24, 3), (col.numel(),))]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.sl_linear(*args, crow, col, 0.5, None, path)
    known = {t.data_ptr() for t in (*args, crow, col)}
    assert saved and all(t.data_ptr() in known for t in saved)


@pytest.mark.parametrize("path", ["chain", "compose"])
@pytest.mark.parametrize("index", range(4))
def test_gradient_of_one_input(path: str, index: int) -> None:
    inputs = Inputs(torch.float64)
    crow, col = inputs.support(24, 16, 0.3)
    args = [inputs.tensor(*s) for s in ((7, 16), (3, 16), (24, 3), (col.numel(),))]
    args[index].requires_grad_()
    got = torch.autograd.grad(ops.sl_linear(*args, crow, col, 0.5, None, path).sum(), args[index])
    want = torch.autograd.grad(reference.sl_linear(*args, crow, col, 0.5).sum(), args[index])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_numeric_weight_is_what_compose_builds(dtype: torch.dtype, device: torch.device) -> None:
    """A W that the caller composed gives the bits of the compose path, results and gradients, and is read by both."""
    inputs = Inputs(dtype, device)
    crow, col = inputs.support(24, 16, 0.3)
    tensors = [inputs.tensor(*s).requires_grad_() for s in ((2, 20, 16), (3, 16), (24, 3), (col.numel(),))]
    bias, dy = inputs.tensor(24).requires_grad_(), inputs.tensor(2, 20, 24)
    weight = ops.compose(tensors[3].detach(), crow, col, 16, tensors[1].detach(), tensors[2].detach(), 0.5)
    results = []
    for kept in (None, weight, 2 * weight):
        y = ops.sl_linear(*tensors, crow, col, 0.5, bias, "compose" if kept is None else "auto", True, kept)
        results.append([y, *torch.autograd.grad(y, [*tensors, bias], dy)])
    for index, (got, want) in enumerate(zip(results[1], results[0], strict=True)):
        assert_bitwise_equal(got, want, f"result {index}")
    assert_bitwise_equal(results[2][1], 2 * results[0][1], "dx of another W")


def test_weight_in_opcheck_and_compile() -> None:
    inputs = Inputs(torch.float32)
    args = [inputs.tensor(*s).requires_grad_() for s in ((3, M), (RANK, M), (N, RANK), (NNZ,))]
    weight = inputs.tensor(N, M)
    torch.library.opcheck(ops.sl_linear.default, (*args, CROW, COL, 0.5, None, "auto", True, weight))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: ops.sl_linear(x, *args[1:], CROW, COL, 0.5, weight=weight), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(args[0]), args[0] @ weight.t())


def test_wrapper_is_the_op() -> None:
    x, A, B, values = torch.randn(3, M), torch.randn(RANK, M), torch.randn(N, RANK), torch.randn(NNZ)
    got = slkernels.sl_linear(x, A, B, values, CROW, COL, 0.5, path="chain")
    assert_bitwise_equal(got, ops.sl_linear(x, A, B, values, CROW, COL, 0.5, None, "chain"), "sl_linear")
