"""lowrank_linear."""

from __future__ import annotations

import pytest
import slkernels
import torch
import torch.nn.functional as F
from harness import FLOATS, Inputs, OpCase, assert_bitwise_equal, assert_matches_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from op_tests import ErrorCase, OpTests
from slkernels import reference
from torch import Tensor

ops = torch.ops.slkernels

# id: leading shape of x, n, m, rank, activation, gate, bias, small; those named base_* have a base
CASES = {
    "small": ((3,), 5, 4, 2, "none", False, False, True),
    "small_all": ((3,), 5, 4, 3, "silu", True, True, True),
    "small_relu_gate": ((4,), 5, 7, 4, "relu", True, False, True),
    "small_gelu_bias": ((4,), 5, 6, 3, "gelu", False, True, True),
    "vector": ((), 5, 4, 2, "none", True, True, True),
    "batched": ((2, 3), 4, 5, 2, "silu", False, False, True),
    "ones": ((1,), 1, 1, 1, "none", False, True, True),
    "no_tokens": ((0,), 5, 4, 2, "silu", True, True, True),
    "no_tokens_batched": ((2, 0, 3), 5, 4, 2, "none", False, True, True),
    "no_features": ((3,), 5, 0, 2, "none", False, True, True),
    "no_outputs": ((3,), 0, 4, 2, "none", False, False, True),
    "primes": ((37,), 61, 53, 13, "silu", True, True, False),
    "one_token": ((1,), 131, 257, 17, "gelu", False, True, False),
    "few_tokens": ((7,), 131, 257, 31, "none", True, False, False),
    "tokens_16": ((16,), 33, 65, 8, "none", False, True, False),
    "tokens_17": ((17,), 33, 65, 8, "relu", False, True, False),
    "rows_5461": ((5,), 5461, 19, 11, "none", False, True, False),
    "columns_2736": ((18,), 23, 2736, 11, "none", False, False, False),
    "base_small": ((3,), 5, 4, 2, "none", False, False, True),
    "base_small_all": ((4,), 5, 4, 3, "gelu", True, True, True),
    "base_no_features": ((3,), 5, 0, 2, "none", False, True, True),
    "base_few_tokens": ((7,), 131, 257, 31, "none", False, True, False),
    "base_primes": ((37,), 61, 53, 13, "silu", True, True, False),
    "many_tokens": ((1031,), 29, 31, 7, "silu", False, False, False),
}


def magnitude(x, A, B, alpha=1.0, gate=None, activation="none", bias=None, base=None) -> Tensor:
    """On absolute values. z (1 + z) bounds each activation, and, with its slope 1 + 2 z, what an error of z does to the
    activation's slope (|act''| < 2)."""
    z = F.linear(x, A)
    if activation != "none":
        z = z * (1 + z)
    y = F.linear((z if gate is None else z * gate) * abs(alpha), B, bias)
    return y if base is None else y + F.linear(x, base)


def make_cases() -> list[OpCase]:
    cases = []
    for name, (lead, n, m, rank, activation, gate, bias, small) in CASES.items():
        with_base = name.startswith("base")

        def make(
            inputs: Inputs, lead=lead, n=n, m=m, rank=rank, activation=activation, gate=gate, bias=bias, base=with_base
        ) -> tuple:
            x, A, B = inputs.tensor(*lead, m), inputs.tensor(rank, m, scale=max(m, 1) ** -0.5), inputs.tensor(n, rank)
            if (activation, gate, bias, base) == ("none", False, False, False):
                return x, A, B  # the default arguments
            args = (x, A, B, 0.5, inputs.tensor(rank) if gate else None, activation, inputs.tensor(n) if bias else None)
            return (*args, inputs.tensor(n, m)) if base else args

        tokens = int(torch.tensor(lead).prod())
        cases.append(
            OpCase(
                op="lowrank_linear",
                id=name,
                make=make,
                reference=reference.lowrank_linear,
                magnitude=magnitude,
                terms=max(n, m, rank, tokens),
                roundings=4 + with_base,  # z, act(z), times gate; the gradients of each; the base's product
                small=small,
                dense=True,
                exact=activation in ("none", "relu") and bool(tokens and n and m),
            )
        )
    return cases


def call(**changes) -> Tensor:
    a = dict(x=torch.ones(3, 4), A=torch.ones(2, 4), B=torch.ones(5, 2), alpha=1.0, gate=torch.ones(2))
    a |= dict(activation="none", bias=torch.ones(5), base=torch.ones(5, 4))
    return ops.lowrank_linear(*{**a, **changes}.values())


def error(id: str, message: str, **changes) -> ErrorCase:
    return ErrorCase("lowrank_linear", id, lambda: call(**changes), message)


class TestLowrank(OpTests):
    cases = make_cases()
    errors = [  # noqa: RUF012
        error("x_columns", "x must be [tokens, 4], got [3, 5]", x=torch.ones(3, 5)),
        error("x_scalar", "x must be [tokens, 4], got []", x=torch.tensor(1.0)),
        error("x_int", "x must be float32, bfloat16, float16 or float64, got int64", x=torch.ones(3, 4).long()),
        error("A_vector", "A must be [rank, m], got [4]", A=torch.ones(4)),
        error("B_vector", "B must be [n, rank], got [2]", B=torch.ones(2)),
        error("ranks", "A and B must have the same rank, got A [2, 4] and B [5, 3]", B=torch.ones(5, 3)),
        error("rank_0", "rank must be at least 1", A=torch.ones(0, 4), B=torch.ones(5, 0), gate=None),
        error("A_dtype", "A must have x's dtype float32, got float16", A=torch.ones(2, 4).half()),
        error("B_dtype", "B must have x's dtype float32, got bfloat16", B=torch.ones(5, 2).bfloat16()),
        error("gate_length", "gate must be [2], got [3]", gate=torch.ones(3)),
        error("gate_dtype", "gate must have x's dtype float32, got float64", gate=torch.ones(2).double()),
        error("bias_length", "bias must be [5], got [4]", bias=torch.ones(4)),
        error("bias_dtype", "bias must have x's dtype float32, got float16", bias=torch.ones(5).half()),
        error("base_shape", "base must be [5, 4], got [4, 5]", base=torch.ones(4, 5)),
        error("base_dtype", "base must have x's dtype float32, got bfloat16", base=torch.ones(5, 4).bfloat16()),
        error("activation", "activation must be none, relu, silu or gelu, got tanh", activation="tanh"),
    ]


@settings(max_examples=40)
@given(
    st.integers(0, 40),
    st.integers(0, 40),
    st.integers(0, 40),
    st.integers(1, 20),
    st.sampled_from(["none", "relu", "silu", "gelu"]),
    st.sampled_from([*FLOATS, torch.float64]),
)
def test_numeric_any_shape(tokens: int, n: int, m: int, rank: int, activation: str, dtype: torch.dtype) -> None:
    inputs = Inputs(dtype, seed=tokens)
    args = (inputs.tensor(tokens, m), inputs.tensor(rank, m), inputs.tensor(n, rank), -0.7)
    args += (inputs.tensor(rank), activation, inputs.tensor(n))
    terms = max(tokens, n, m, rank)
    case = OpCase("lowrank_linear", "drawn", lambda _: (), reference.lowrank_linear, terms, 4, magnitude=magnitude)
    assert_matches_reference(case, args)


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numeric_sub_ranks_are_views(tokens: int, dtype: torch.dtype) -> None:
    """A[:b], B[:, :b] of larger factors (DyLoRA) give what copies of them give."""
    inputs = Inputs(dtype)
    x, A, B = inputs.tensor(tokens, 67), inputs.tensor(32, 67), inputs.tensor(45, 32)
    for b in (1, 7, 16, 31):
        got = ops.lowrank_linear(x, A[:b], B[:, :b])
        assert_matches_reference(
            OpCase("lowrank_linear", f"rank {b}", lambda _: (), reference.lowrank_linear, 67, 4, magnitude=magnitude),
            (x, A[:b], B[:, :b]),
        )
        want = ops.lowrank_linear(x, A[:b].clone(), B[:, :b].clone())
        torch.testing.assert_close(got, want)


def test_backward_keeps_only_inputs_and_z() -> None:
    saved: list[torch.Tensor] = []
    args = [torch.randn(s, requires_grad=True) for s in ((40, 16), (3, 16), (24, 3))]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.lowrank_linear(*args, 0.5, None, "silu")
    extra = [t for t in saved if all(t.data_ptr() != a.data_ptr() for a in args)]
    assert [list(t.shape) for t in extra] == [[40, 3]]


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)])
def test_gradients_of_some_inputs(needs: tuple[int, ...]) -> None:
    tensors = [torch.randn(s, dtype=torch.float64) for s in ((7, 16), (3, 16), (24, 3))]
    for tensor, need in zip(tensors, needs, strict=True):
        tensor.requires_grad_(bool(need))
    wanted = [t for t in tensors if t.requires_grad]
    got = torch.autograd.grad(ops.lowrank_linear(*tensors, 0.5, None, "gelu").sum(), wanted)
    want = torch.autograd.grad(reference.lowrank_linear(*tensors, 0.5, None, "gelu").sum(), wanted)
    torch.testing.assert_close(got, want)


def test_wrapper_is_the_op() -> None:
    x, A, B = torch.randn(3, 4), torch.randn(2, 4), torch.randn(5, 2)
    assert_bitwise_equal(
        slkernels.lowrank_linear(x, A, B, activation="silu"), ops.lowrank_linear(x, A, B, 1.0, None, "silu"), ""
    )
