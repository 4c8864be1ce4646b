"""linear24, linear24_train, dw_compress24 and the dx of linear24."""

from __future__ import annotations

import math

import pytest
import slkernels
import torch
import torch.nn.functional as F
from harness import FLOATS, Inputs, OpCase, assert_bitwise_equal, assert_matches_reference, map_floats
from hypothesis import given, settings
from hypothesis import strategies as st
from op_tests import ErrorCase, OpTests
from semi24_data import drawn_pack, pruned_pack, transposable_pack
from slkernels import reference
from torch import Tensor

ops = torch.ops.slkernels

EXACT = ("none", "relu", "relu2")

# id: leading shape of x, n, m, activation, bias, small
LINEAR = {
    "small": ((3,), 5, 4, "none", False, True),
    "small_bias": ((12,), 5, 7, "none", True, True),
    "small_relu": ((3,), 5, 9, "relu", True, True),
    "small_silu": ((3,), 6, 8, "silu", True, True),
    "small_gelu": ((10,), 6, 6, "gelu", False, True),
    "small_relu2": ((3,), 6, 6, "relu2", True, True),
    "vector": ((), 5, 12, "none", True, True),
    "batched": ((2, 3), 4, 5, "none", False, True),
    "ones": ((1,), 1, 1, "none", True, True),
    "no_tokens": ((0,), 5, 4, "silu", True, True),
    "no_tokens_batched": ((2, 0, 3), 5, 4, "none", True, True),
    "no_features": ((3,), 5, 0, "none", True, True),
    "no_features_panel": ((20,), 5, 0, "none", True, True),
    "no_outputs": ((3,), 0, 4, "none", False, True),
    "one_token": ((1,), 131, 1030, "gelu", True, False),
    "tokens_8": ((8,), 37, 65, "relu", True, False),
    "tokens_9": ((9,), 37, 64, "silu", False, False),
    "tokens_40": ((40,), 70, 66, "relu2", True, False),
    "tokens_72": ((72,), 35, 127, "none", False, False),
    "tokens_104": ((104,), 35, 129, "none", True, False),
    "tokens_300": ((300,), 83, 259, "gelu", True, False),
    "rows_5461": ((18,), 5461, 19, "none", True, False),
    "columns_2736": ((7,), 23, 2736, "none", False, False),
    "columns_5461": ((33,), 9, 5461, "none", False, False),
}

# id: tokens, n, m, small
GRADIENT = {
    "small": (3, 5, 4, True),
    "small_ragged": (5, 6, 7, True),
    "ones": (1, 1, 1, True),
    "no_tokens": (0, 5, 4, True),
    "no_features": (3, 5, 0, True),
    "no_outputs": (3, 0, 4, True),
    "tokens_1": (1, 67, 131, False),
    "tokens_40": (40, 70, 66, False),
    "tokens_200": (200, 131, 66, False),
    "rows_2736": (17, 2736, 21, False),
    "columns_2736": (33, 70, 2736, False),
}

# id: tokens, n, m, activation, bias, weight, transposable, small
TRAIN = {
    "small": (3, 5, 8, "none", False, False, True, True),
    "small_silu": (3, 8, 6, "silu", True, False, True, True),
    "small_relu": (3, 7, 9, "relu", True, False, True, True),
    "small_weight": (3, 5, 8, "none", True, True, False, True),
    "small_relu2_weight": (3, 5, 6, "relu2", False, True, False, True),
    "no_tokens": (0, 5, 8, "none", True, True, False, True),
    "double_pruned": (37, 61, 53, "gelu", True, False, False, False),
    "straight_through": (37, 61, 53, "none", False, True, False, False),
}


def magnitude(x, values, meta, n, bias=None, activation="none") -> Tensor:
    """On absolute values. z (1 + z) bounds each activation but relu2, and its slope; relu2 is within z^2."""
    z = reference.linear24(x, values, meta, n, bias)
    return z if activation == "none" else z * (1 + z)


def train_magnitude(x, values, meta, values_t, meta_t, n, bias=None, activation="none", weight=None, layout="plain"):
    z = reference.linear24_train(x, values, meta, values_t, meta_t, n, bias, "none", weight)
    return z if activation == "none" else z * (1 + z)


def linear_cases() -> list[OpCase]:
    cases = []
    for name, (lead, n, m, activation, bias, small) in LINEAR.items():

        def make(inputs: Inputs, lead=lead, n=n, m=m, activation=activation, bias=bias) -> tuple:
            args = inputs.tensor(*lead, m), *drawn_pack(inputs, n, m, scale=max(m, 1) ** -0.5), n
            if (activation, bias) == ("none", False):
                return args  # the default arguments
            return *args, inputs.tensor(n) if bias else None, activation

        tokens = math.prod(lead)
        cases.append(
            OpCase(
                op="linear24",
                id=name,
                make=make,
                reference=reference.linear24,
                magnitude=magnitude,
                terms=max(n, m, tokens),
                roundings=0 if activation in ("none", "relu") else 4,  # z, and what its gradient makes of it
                small=small,
                twice=activation == "none",
                exact=activation in EXACT and tokens * n * m > 1,
            )
        )
    return cases


def gradient_cases() -> list[OpCase]:
    cases = []
    for name, (tokens, n, m, small) in GRADIENT.items():

        def make_dx(inputs: Inputs, tokens=tokens, n=n, m=m) -> tuple:
            return inputs.tensor(tokens, n), *drawn_pack(inputs, n, m), m

        def make_dw(inputs: Inputs, tokens=tokens, n=n, m=m) -> tuple:
            return inputs.tensor(tokens, n), inputs.tensor(tokens, m), drawn_pack(inputs, n, m)[1]

        common = dict(terms=max(tokens, n, m), small=small, twice=True, exact=tokens * n * m > 1)
        cases.append(
            OpCase(op="_linear24_dx", id=name, make=make_dx, reference=reference.linear24_dx, **common),
        )
        cases.append(
            OpCase(op="dw_compress24", id=name, make=make_dw, reference=reference.dw_compress24, **common),
        )
    return cases


def train_cases() -> list[OpCase]:
    cases = []
    for name, (tokens, n, m, activation, bias, weight, transposable, small) in TRAIN.items():

        def make(
            inputs: Inputs,
            tokens=tokens,
            n=n,
            m=m,
            activation=activation,
            bias=bias,
            weight=weight,
            transposable=transposable,
        ) -> tuple:
            if transposable:
                packs = transposable_pack(inputs, n, m)
            else:
                values, meta = drawn_pack(inputs, n, m)
                packs = values, meta, *pruned_pack(reference.dense24(values, meta, m).t())
            args = inputs.tensor(tokens, m), *packs, n
            return *args, inputs.tensor(n) if bias else None, activation, inputs.tensor(n, m) if weight else None

        cases.append(
            OpCase(
                op="linear24_train",
                id=name,
                make=make,
                reference=reference.linear24_train,
                magnitude=train_magnitude,
                terms=max(tokens, n, m),
                roundings=4,
                small=small,
                dense=weight,  # the dense gradient is torch's product
                exact=activation in EXACT and bool(tokens),
            )
        )
    return cases


def call_linear(**changes) -> Tensor:
    a = dict(x=torch.ones(3, 8), values=torch.ones(5, 4), meta=torch.full((5, 1), 0x44).byte(), n=5)
    a |= dict(bias=torch.ones(5), activation="none")
    return ops.linear24(*{**a, **changes}.values())


def call_train(**changes) -> Tensor:
    a = dict(x=torch.ones(3, 8), values=torch.ones(5, 4), meta=torch.full((5, 1), 0x44).byte())
    a |= dict(values_t=torch.ones(8, 4), meta_t=torch.full((8, 1), 0x44).byte(), n=5, bias=None, activation="none")
    a |= dict(weight=torch.ones(5, 8), layout="plain")
    return ops.linear24_train(*{**a, **changes}.values())


def call_dw(**changes) -> Tensor:
    a = dict(dy=torch.ones(3, 5), x=torch.ones(3, 8), meta=torch.full((5, 1), 0x44).byte(), layout="plain")
    return ops.dw_compress24(*{**a, **changes}.values())


def linear_error(id: str, message: str, **changes) -> ErrorCase:
    return ErrorCase("linear24", id, lambda: call_linear(**changes), message)


def train_error(id: str, message: str, **changes) -> ErrorCase:
    return ErrorCase("linear24_train", id, lambda: call_train(**changes), message)


def dw_error(id: str, message: str, **changes) -> ErrorCase:
    return ErrorCase("dw_compress24", id, lambda: call_dw(**changes), message)


class TestSemi24Linear(OpTests):
    cases = [*linear_cases(), *gradient_cases(), *train_cases()]  # noqa: RUF012
    errors = [  # noqa: RUF012
        linear_error("x_columns", "meta must be [5, 2], got [5, 1]", x=torch.ones(3, 9)),
        linear_error("x_scalar", "x must have at least one dimension, got []", x=torch.tensor(1.0)),
        linear_error("x_int", "x must be float32, bfloat16, float16 or float64, got int64", x=torch.ones(3, 8).long()),
        linear_error("n", "meta must be [6, 1], got [5, 1]", n=6),
        linear_error("n_negative", "n and m must not be negative, got -1 and 8", n=-1),
        linear_error("values_shape", "values must be [5, 4], got [5, 8]", values=torch.ones(5, 8)),
        linear_error("values_dtype", "values must have x's dtype float32, got float16", values=torch.ones(5, 4).half()),
        linear_error("meta_shape", "meta must be [5, 1], got [5, 2]", meta=torch.ones(5, 2).byte()),
        linear_error("meta_dtype", "meta must be uint8, got int16", meta=torch.ones(5, 1).short()),
        linear_error("bias_length", "bias must be [5], got [4]", bias=torch.ones(4)),
        linear_error("bias_dtype", "bias must have x's dtype float32, got bfloat16", bias=torch.ones(5).bfloat16()),
        linear_error("activation", "activation must be none, relu, silu, gelu or relu2, got tanh", activation="tanh"),
        train_error("values_t", "values_t must be [8, 4], got [5, 4]", values_t=torch.ones(5, 4)),
        train_error("meta_t", "meta_t must be [8, 1], got [5, 1]", meta_t=torch.full((5, 1), 0x44).byte()),
        train_error("weight", "weight must be [5, 8], got [8, 5]", weight=torch.ones(8, 5)),
        train_error("layout", "layout must be plain, sm80 or sm90, got sm70", layout="sm70"),
        dw_error("tokens", "dy must have x's tokens, got dy [4, 5] and x [3, 8]", dy=torch.ones(4, 5)),
        dw_error("dy_dtype", "dy must have x's dtype float32, got float64", dy=torch.ones(3, 5).double()),
        dw_error("meta_shape", "meta must be [5, 1], got [6, 1]", meta=torch.ones(6, 1).byte()),
        dw_error("layout", "layout must be plain, sm80 or sm90, got dense", layout="dense"),
    ]

    @classmethod
    def selects(cls, test: str, case: OpCase) -> bool:
        if case.op == "linear24_train":
            # The straight-through gradient of a weight that is not read is not the derivative of y.
            if "gradcheck" in test and case.dense:
                return False
            if "each_input_alone" in test:  # values_t has none; see test_gradients_of_linear24_train_alone
                return False
        return super().selects(test, case)


@pytest.mark.parametrize("case", train_cases(), ids=str)
def test_gradients_of_linear24_train_alone(case: OpCase) -> None:
    """x, bias, and weight or else values: each gradient alone is the one computed with the others."""
    args = case.make(Inputs(torch.float32))
    together = dict(enumerate(map_floats(lambda t: t.clone().requires_grad_(), args)))
    y = case(*together.values())
    y.backward(torch.ones_like(y))
    weight = args[8] is not None
    for index, whole in together.items():
        if not isinstance(whole, Tensor) or not whole.is_floating_point():
            continue
        alone = list(args)
        alone[index] = args[index].clone().requires_grad_()
        case(*alone).backward(torch.ones_like(y))
        assert (whole.grad is None) == (index == 3 or (index == 1 and weight)), index
        if whole.grad is not None:
            torch.testing.assert_close(alone[index].grad, whole.grad)


@settings(max_examples=40)
@given(
    st.integers(0, 40),
    st.integers(0, 40),
    st.integers(0, 140),
    st.sampled_from(["none", "relu", "silu", "gelu", "relu2"]),
    st.sampled_from([*FLOATS, torch.float64]),
)
def test_numeric_any_shape(tokens: int, n: int, m: int, activation: str, dtype: torch.dtype) -> None:
    inputs = Inputs(dtype, seed=tokens)
    args = inputs.tensor(tokens, m), *drawn_pack(inputs, n, m, max(m, 1) ** -0.5), n, inputs.tensor(n), activation
    case = OpCase("linear24", "drawn", lambda _: (), reference.linear24, max(tokens, n, m), 4, magnitude=magnitude)
    assert_matches_reference(case, args)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_numeric_tokens_do_not_depend_on_each_other(dtype: torch.dtype) -> None:
    """However the tokens and rows are cut into tiles and panels, each result is the same sum."""
    inputs = Inputs(dtype)
    x, (values, meta) = inputs.tensor(300, 333), drawn_pack(inputs, 1100, 333)
    whole = ops.linear24(x, values, meta, 1100)
    for first, last in ((0, 9), (5, 205), (130, 300)):
        assert_bitwise_equal(ops.linear24(x[first:last], values, meta, 1100), whole[first:last], f"{first}:{last}")
    few = ops.linear24(x[:8], values, meta, 1100)
    for first, last in ((0, 1), (1, 4), (3, 8)):
        assert_bitwise_equal(ops.linear24(x[first:last], values, meta, 1100), few[first:last], f"{first}:{last}")
    rows = ops.linear24(x, values[100:700], meta[100:700], 600)
    assert_bitwise_equal(rows, whole[:, 100:700], "rows")


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "relu2"])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_numeric_activation_over_its_range(activation: str, dtype: torch.dtype) -> None:
    """W = identity (two of four), bias = 0: the activation of every value, tails included."""
    z = torch.cat([torch.linspace(-30, 30, 1201), torch.tensor([0.0, -0.0, 1e-6, -1e-6, 100.0, -100.0])]).to(dtype)
    values, meta = torch.tensor([[1.0, 0.0]], dtype=dtype), torch.tensor([[0x44]], dtype=torch.uint8)
    x = F.pad(z[:, None], (0, 3))
    want = reference.linear24(x.double(), values.double(), meta, 1, None, activation)
    for tokens in (8, len(x)):
        got = ops.linear24(x[:tokens], values, meta, 1, None, activation)
        torch.testing.assert_close(got.double(), want[:tokens], rtol=2 * torch.finfo(dtype).eps, atol=3e-7)


def test_numeric_nan_and_infinity() -> None:
    """NaN reaches what it is multiplied by, and every activation; what is not kept multiplies nothing."""
    x = torch.zeros(20, 8)
    x[2, 0], x[3, 1], x[4, 7] = math.nan, math.inf, math.nan
    values, meta = torch.ones(1, 4), torch.tensor([[0x44]], dtype=torch.uint8)  # columns 0, 1, 4, 5
    for activation in ("none", "relu", "silu", "gelu", "relu2"):
        for tokens in (8, 20):
            y = ops.linear24(x[:tokens], values, meta, 1, None, activation)[:, 0]
            assert y[2].isnan() and y[3] == math.inf and (y[[0, 1, 4]] == 0).all(), activation


def test_corrupt_codes_read_nothing_outside() -> None:
    """Any byte is a legal position within its group, as the reference reads it."""
    generator = torch.Generator().manual_seed(0)
    meta = torch.randint(256, (33, 9), generator=generator, dtype=torch.uint8)
    x, values = torch.randn(20, 68, generator=generator), torch.randn(33, 34, generator=generator)
    for tokens in (5, 20):
        want = x[:tokens, reference.kept_columns24(meta, 68)].mul(values).sum(-1)
        torch.testing.assert_close(ops.linear24(x[:tokens], values, meta, 33), want)
        want = torch.zeros(tokens, 68)
        dy = torch.randn(tokens, 33, generator=generator)
        for i, columns in enumerate(reference.kept_columns24(meta, 68)):
            want.index_add_(1, columns, dy[:, i : i + 1] * values[i])
        torch.testing.assert_close(ops._linear24_dx(dy, values, meta, 68), want)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_backward_keeps_the_pack_and_no_pre_activation(activation: str) -> None:
    saved: list[Tensor] = []
    values, meta = drawn_pack(Inputs(torch.float32), 24, 16)
    x, bias = torch.randn(40, 16, requires_grad=True), torch.randn(24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ops.linear24(x, values.requires_grad_(), meta, 24, bias, activation)
    known = [x, values, meta, bias, *([y] if activation == "relu" else [])]
    assert all(any(t.data_ptr() == k.data_ptr() for k in known) for t in saved)


# ---- the packed layouts, converted on a CPU -------------------------------------------------------------------------

PACKED = pytest.mark.parametrize("layout", ["sm80", "sm90"])
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def packed(pack: tuple[Tensor, Tensor], n: int, m: int, layout: str) -> tuple[Tensor, Tensor]:
    return slkernels.convert24(*pack, n, m, "plain", layout)


@PACKED
@HALVES
@pytest.mark.parametrize("n, m", [(37, 70), (64, 128), (130, 61)])
def test_packed_layouts_give_the_bits_of_plain(layout: str, dtype: torch.dtype, n: int, m: int) -> None:
    inputs = Inputs(dtype)
    x, dy, bias = inputs.tensor(2, 9, m), inputs.tensor(2, 9, n), inputs.tensor(n)
    pack = drawn_pack(inputs, n, m)
    args = packed(pack, n, m, layout)
    want = slkernels.linear24(x, *pack, n, bias, "silu")
    assert_bitwise_equal(slkernels.linear24_packed(x, *args, n, layout, bias, "silu"), want, "linear24_packed")
    assert_bitwise_equal(slkernels.linear24_packed(x, *pack, n, "plain", bias, "silu"), want, "plain")
    dvalues = slkernels.dw_compress24(dy, x, pack[1])
    want = packed((dvalues, pack[1]), n, m, layout)[0]
    assert_bitwise_equal(slkernels.dw_compress24(dy, x, args[1], layout), want, "dw_compress24")


@PACKED
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("straight_through", [False, True])
def test_linear24_train_in_packed_layouts(layout: str, activation: str, straight_through: bool) -> None:
    inputs, n, m = Inputs(torch.bfloat16), 37, 70
    values, meta, values_t, meta_t = transposable_pack(inputs, n, m)
    x, bias, weight = inputs.tensor(12, m), inputs.tensor(n), inputs.tensor(n, m).float()
    dy = inputs.tensor(12, n)

    def run(values, meta, values_t, meta_t, layout) -> dict[str, Tensor | None]:
        leaves = [t.clone().requires_grad_() for t in (x, values, bias, weight)]
        y = slkernels.linear24_train(
            leaves[0],
            leaves[1],
            meta,
            values_t,
            meta_t,
            n,
            leaves[2],
            activation,
            leaves[3] if straight_through else None,
            layout,
        )
        y.backward(dy)
        return {"y": y.detach()} | {
            name: t.grad for name, t in zip(["x", "values", "bias", "weight"], leaves, strict=True)
        }

    want = run(values, meta, values_t, meta_t, "plain")
    got = run(*packed((values, meta), n, m, layout), *packed((values_t, meta_t), m, n, layout), layout)
    assert (want["values"] is None) == straight_through and (want["weight"] is None) != straight_through
    if not straight_through:
        want["values"] = packed((want["values"], meta), n, m, layout)[0]
    for name, value in want.items():
        assert (got[name] is None) == (value is None), name
        if value is not None:
            assert_bitwise_equal(got[name], value, name)
            assert value.dtype == (torch.float32 if name == "weight" else torch.bfloat16)


def test_linear24_packed_refuses_gradients() -> None:
    pack = packed(drawn_pack(Inputs(torch.bfloat16), 32, 64), 32, 64, "sm80")
    x = torch.ones(3, 64, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"slkernels::linear24_packed: .*linear24_train"):
        slkernels.linear24_packed(x, *pack, 32, "sm80")
    with torch.no_grad():
        assert slkernels.linear24_packed(x, *pack, 32, "sm80").shape == (3, 32)


def test_fakes_of_packed_layouts() -> None:
    pack = packed(drawn_pack(Inputs(torch.bfloat16), 33, 65), 33, 65, "sm90")
    args = torch.ones(3, 65, dtype=torch.bfloat16), *pack, 33, "sm90"
    torch.library.opcheck(ops.linear24_packed.default, args, test_utils=["test_schema", "test_faketensor"])
    args = torch.ones(3, 33, dtype=torch.bfloat16), torch.ones(3, 65, dtype=torch.bfloat16), pack[1], "sm90"
    torch.library.opcheck(ops.dw_compress24.default, args, test_utils=["test_schema", "test_faketensor"])
