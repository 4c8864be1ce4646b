"""spmm, spmm_t, sddmm, check_support."""

from __future__ import annotations

import pytest
import slkernels
import torch
from harness import FLOATS, Inputs, OpCase, assert_bitwise_equal, assert_matches_reference, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from op_tests import ErrorCase, OpTests, assert_compiled_equals_eager
from slkernels import reference
from supports import FAULT_SHAPE, FAULTS, Fault, from_rows, shapes_and_supports

ops = torch.ops.slkernels

# id: leading shape of x, n, m, density, small
SHAPES = {
    "small": ((3,), 8, 5, 0.4, True),
    "one_token": ((1,), 12, 19, 0.4, True),
    "vector": ((), 7, 5, 0.5, True),
    "batched": ((2, 3), 6, 7, 0.5, True),
    "one": ((1,), 1, 1, 1.0, True),
    "no_tokens": ((0,), 4, 5, 0.5, True),
    "no_tokens_batched": ((3, 0, 2), 4, 5, 0.5, True),
    "no_nonzeros": ((3,), 4, 5, 0.0, True),
    "no_rows": ((3,), 0, 5, 0.5, True),
    "no_columns": ((3,), 4, 0, 0.5, True),
    "nothing": ((3,), 0, 0, 0.5, True),
    "dense": ((9,), 8, 33, 1.0, False),
    "primes": ((37,), 61, 53, 0.2, False),
    "two_tokens": ((2,), 131, 257, 0.2, False),
    "token_tiles_16": ((16,), 33, 64, 0.2, False),
    "token_tiles_17": ((17,), 16, 31, 0.2, False),
    "token_tiles_65": ((65,), 17, 16, 0.2, False),
    "many_tokens": ((2051,), 47, 53, 0.2, False),
    "rows_5461": ((67,), 5461, 23, 0.05, False),
    "columns_2736": ((34,), 19, 2736, 0.05, False),
    "one_token_wide": ((1,), 101, 2736, 0.05, False),
    "columns_32768": ((3,), 5, 32768, 0.05, False),
    "columns_int32": ((3,), 5, 40009, 0.05, False),
    "rows_int32": ((3,), 32771, 3, 0.1, False),
    "several_chunks": ((181,), 7, 12301, 0.02, False),  # sddmm packs its tokens in more than one go
}


def make_cases() -> list[OpCase]:
    cases = []
    for name, (lead, n, m, density, small) in SHAPES.items():
        tokens = int(torch.tensor(lead).prod())
        fill = max(density * 2, 1 / max(n, m, 1))

        def make(inputs: Inputs, op: str, lead=lead, n=n, m=m, density=density) -> tuple:
            crow, col = inputs.support(n, m, density)
            x, dy = inputs.tensor(*lead, m), inputs.tensor(*lead, n)
            values = inputs.tensor(col.numel())
            return {
                "spmm": (x, values, crow, col, n),
                "spmm_t": (dy, values, crow, col, m),
                "sddmm": (dy, x, crow, col),
            }[op]

        terms = max(int(fill * max(n, m)), tokens, 1)
        for op in ("spmm", "spmm_t", "sddmm"):
            cases.append(
                OpCase(
                    op=op,
                    id=name,
                    make=lambda inputs, op=op, make=make: make(inputs, op),
                    reference=getattr(reference, op),
                    terms=terms,
                    small=small,
                    twice=True,
                    # a sum must stay below 256 to be exact in bfloat16, and a case of zeros proves nothing
                    exact=bool(tokens and n and m and density and tokens < 1000),
                )
            )
    return cases


def arguments(n: int = 12, m: int = 9, tokens: int = 5, dtype: torch.dtype = torch.float32) -> dict:
    inputs = Inputs(dtype)
    crow, col = inputs.support(n, m, 0.4)
    return {
        "x": inputs.tensor(tokens, m),
        "dy": inputs.tensor(tokens, n),
        "values": inputs.tensor(col.numel()),
        "crow": crow,
        "col": col,
        "n": n,
        "m": m,
    }


def call(op: str, validate: bool = True, **changes) -> torch.Tensor | None:
    a = {**arguments(), **changes}
    names = {
        "spmm": ("x", "values", "crow", "col", "n"),
        "spmm_t": ("dy", "values", "crow", "col", "m"),
        "sddmm": ("dy", "x", "crow", "col"),
        "check_support": ("crow", "col", "n", "m"),
    }[op]
    args = [a[name] for name in names]
    return getattr(ops, op)(*args) if op == "check_support" else getattr(ops, op)(*args, validate)


def error(op: str, id: str, message: str, **changes) -> ErrorCase:
    return ErrorCase(op, f"{op}-{id}", lambda: call(op, **changes), message)


NNZ = arguments()["col"].numel()

ERRORS = [
    error("spmm", "x_scalar", "x must be [tokens, m], got []", x=torch.tensor(1.0)),
    error("spmm", "x_int", "x must be float32, bfloat16, float16 or float64, got int64", x=torch.ones(5, 9).long()),
    error("spmm", "x_complex", "x must be float32, bfloat16, float16 or float64", x=torch.ones(5, 9).cfloat()),
    error(
        "spmm", "values_dtype", "values must have x's dtype float32, got bfloat16", values=torch.ones(NNZ).bfloat16()
    ),
    error("spmm", "values_length", f"values must be [{NNZ}], got [3]", values=torch.ones(3)),
    error("spmm", "values_2d", f"values must be [{NNZ}], got [1, {NNZ}]", values=torch.ones(1, NNZ)),
    error("spmm", "n", "crow must be [12], got [13]", n=11),
    error("spmm", "n_negative", "n and m must not be negative, got -1 and 9", n=-1),
    error("spmm", "x_columns", "out of range [0, 4)", x=torch.ones(5, 4)),
    error("spmm_t", "dy_scalar", "dy must be [tokens, n], got []", dy=torch.tensor(1.0)),
    error(
        "spmm_t", "dy_int", "dy must be float32, bfloat16, float16 or float64, got int32", dy=torch.ones(5, 12).int()
    ),
    error("spmm_t", "dy_columns", "crow must be [12], got [13]", dy=torch.ones(5, 11)),
    error(
        "spmm_t", "values_dtype", "values must have dy's dtype float32, got float64", values=torch.ones(NNZ).double()
    ),
    error("spmm_t", "m_negative", "n and m must not be negative, got 12 and -3", m=-3),
    error("sddmm", "dy_scalar", "dy must be [tokens, n], got []", dy=torch.tensor(1.0)),
    error("sddmm", "x_scalar", "x must be [tokens, m], got []", x=torch.tensor(1.0)),
    error("sddmm", "dtypes", "dy must have x's dtype float32, got float16", dy=torch.ones(5, 12).half()),
    error("sddmm", "tokens", "dy and x must have the same tokens, got [4, 12] and [5, 9]", dy=torch.ones(4, 12)),
    error("sddmm", "x_uint8", "x must be float32, bfloat16, float16 or float64, got uint8", x=torch.ones(5, 9).byte()),
]


def faulty_call(op: str):
    n, m = FAULT_SHAPE

    def run(crow: torch.Tensor, col: torch.Tensor, validate: bool) -> torch.Tensor | None:
        changes = dict(crow=crow, col=col, n=n, m=m, values=torch.ones(col.numel()))
        return call(op, validate, x=torch.ones(3, m), dy=torch.ones(3, n), **changes)

    return run


class TestSparse(OpTests):
    cases = make_cases()
    errors = ERRORS
    fault_calls = {op: faulty_call(op) for op in ("check_support", "spmm", "spmm_t", "sddmm")}  # noqa: RUF012


# ---- numbers that the cases do not cover ----------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["spmm", "spmm_t", "sddmm"])
def test_numeric_full_size_layer(op: str) -> None:
    """5461 x 2736 at SLTrain's density, against torch's CSR product (a dense S would take 120 MB in float64)."""
    n, m, tokens = 5461, 2736, 19
    inputs = Inputs(torch.float32)
    crow, col = inputs.support(n, m, 0.03)
    values, x, dy = inputs.tensor(col.numel()), inputs.tensor(tokens, m), inputs.tensor(tokens, n)
    rows = reference.support_rows(crow)
    if op == "sddmm":
        want = torch.stack([(dy[:, r] * x[:, c]).double().sum(0) for r, c in ((rows, col.long()),)])[0]
        torch.testing.assert_close(ops.sddmm(dy, x, crow, col).double(), want, rtol=1e-5, atol=1e-5)
        return
    S = torch.sparse_csr_tensor(crow.long(), col.long(), values.double(), size=(n, m))
    if op == "spmm":
        got, want = ops.spmm(x, values, crow, col, n), (S @ x.double().t()).t()
    else:
        got, want = ops.spmm_t(dy, values, crow, col, m), (S.to_sparse_coo().t() @ dy.double().t()).t()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


@settings(max_examples=25)
@given(shapes_and_supports(), st.integers(0, 70), st.sampled_from([*FLOATS, torch.float64]), st.integers(0, 99))
def test_numeric_any_shape_and_support(shape, tokens: int, dtype: torch.dtype, seed: int) -> None:
    n, m, (crow, col) = shape
    inputs = Inputs(dtype, seed=seed)
    x, dy, values = inputs.tensor(tokens, m), inputs.tensor(tokens, n), inputs.tensor(col.numel())
    for op, args in {
        "spmm": (x, values, crow, col, n),
        "spmm_t": (dy, values, crow, col, m),
        "sddmm": (dy, x, crow, col),
    }.items():
        case = OpCase(op, "drawn", lambda _: (), getattr(reference, op), terms=max(n, m, tokens, 1))
        assert_matches_reference(case, args)


def test_numeric_infinities_and_nans_stay_in_their_row() -> None:
    a = arguments(n=40, m=50, tokens=70)
    x = a["x"].clone()
    x[3], x[66, 4] = torch.nan, torch.inf
    y = ops.spmm(x, a["values"], a["crow"], a["col"], 40)
    clean = ops.spmm(a["x"], a["values"], a["crow"], a["col"], 40)
    others = [t for t in range(70) if t not in (3, 66)]
    assert_bitwise_equal(y[others], clean[others], "tokens without a NaN")
    occupied = a["crow"].diff() > 0
    assert y[3][occupied].isnan().all() and (y[3][~occupied] == 0).all()
    touched = reference.to_dense(torch.ones_like(a["values"]), a["crow"], a["col"], 50)[:, 4] > 0
    assert y[66][touched].isinf().all() and y[66][~touched].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_numeric_rounds_to_nearest_even(dtype: torch.dtype) -> None:
    """A sum that lies half way between two 16-bit numbers goes to the even one; overflow becomes infinity."""
    ulp = torch.finfo(dtype).eps
    crow, col = from_rows([[0, 1]], 2)
    for base in (1.0, 1.0 + ulp, -1.0, -(1.0 + ulp)):
        for tokens in (1, 2, 17, 64):
            x = torch.tensor([[base, ulp / 2 * (1 if base > 0 else -1)]], dtype=dtype).expand(tokens, 2)
            want = x.double().sum(1, keepdim=True).to(dtype)
            assert_bitwise_equal(
                ops.spmm(x, torch.ones(2, dtype=dtype), crow, col, 1), want, f"{base}, {tokens} tokens"
            )
    top = torch.full((3, 2), torch.finfo(dtype).max, dtype=dtype)
    assert ops.spmm(top, torch.ones(2, dtype=dtype), crow, col, 1).isinf().all()


def test_numeric_half_subnormals() -> None:
    x = torch.arange(-1030, 1030).to(torch.float64).mul(2.0**-24).half()[:, None]
    crow, col = from_rows([[0]], 1)
    for tokens in (x, x[:1], x[:20]):
        assert_bitwise_equal(ops.spmm(tokens, torch.ones(1).half(), crow, col, 1), tokens, "identity")


def test_int32_columns_are_accepted_for_narrow_matrices() -> None:
    for op in ("spmm", "spmm_t", "sddmm"):
        assert_bitwise_equal(call(op, col=arguments()["col"].int()), call(op), op)
    call("check_support", col=arguments()["col"].int())


def test_batch_invariance() -> None:
    """A token's result does not depend on the tokens beside it; a call with one token sums in another order."""
    a = arguments(n=131, m=2736, tokens=200)
    x, dy = a["x"], a["dy"]
    y = ops.spmm(x, a["values"], a["crow"], a["col"], 131)
    dx = ops.spmm_t(dy, a["values"], a["crow"], a["col"], 2736)
    for begin, end in ((0, 2), (7, 23), (60, 70), (1, 200), (100, 165)):
        part = ops.spmm(x[begin:end], a["values"], a["crow"], a["col"], 131)
        assert_bitwise_equal(part, y[begin:end], f"spmm of tokens {begin}:{end}")
        part = ops.spmm_t(dy[begin:end], a["values"], a["crow"], a["col"], 2736)
        assert_bitwise_equal(part, dx[begin:end], f"spmm_t of tokens {begin}:{end}")
    alone = ops.spmm(x[:1], a["values"], a["crow"], a["col"], 131)
    torch.testing.assert_close(alone, y[:1], rtol=1e-4, atol=1e-3)


# ---- supports -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [f for f in FAULTS if not f.id.endswith("strided")], ids=lambda f: f.id)
def test_fault_of_reference(fault: Fault) -> None:
    with pytest.raises(RuntimeError) as by_reference:
        reference.check_support(*fault.support(), *FAULT_SHAPE)
    with pytest.raises(RuntimeError) as by_op:
        slkernels.check_support(*fault.support(), *FAULT_SHAPE)
    assert str(by_reference.value).splitlines()[0] in str(by_op.value)


def test_fault_in_the_last_of_many() -> None:
    """No position escapes the check: each single column of a support, moved out of range, is found where it is."""
    a = arguments(n=40, m=50)
    for position in range(a["col"].numel()):
        col = a["col"].clone()
        col[position] = 50
        with pytest.raises(RuntimeError, match=rf"col\[{position}\] = 50 in row \d+ is out of range \[0, 50\)"):
            ops.check_support(a["crow"], col, 40, 50)


def test_columns_over_32768_need_int32() -> None:
    crow, col = from_rows([[0]], 5)
    with pytest.raises(RuntimeError, match="col must be int32 for 32769 columns, got int16"):
        ops.check_support(crow, col, 1, 32769)
    ops.check_support(crow, col, 1, 32768)


@given(shapes_and_supports())
def test_every_valid_support_passes(shape) -> None:
    n, m, (crow, col) = shape
    ops.check_support(crow, col, n, m)
    reference.check_support(crow, col, n, m)


@given(shapes_and_supports(max_size=12), st.data())
def test_any_corruption_is_judged_as_by_the_reference(shape, data: st.DataObject) -> None:
    n, m, (crow, col) = shape
    target = crow if col.numel() == 0 or data.draw(st.booleans()) else col
    target[data.draw(st.integers(0, target.numel() - 1))] = data.draw(st.integers(-3, 40))

    def verdict(check) -> str | None:
        try:
            check(crow, col, n, m)
        except RuntimeError as e:
            return str(e).splitlines()[0]
        return None

    assert verdict(ops.check_support) == verdict(reference.check_support)


def test_validate_changes_nothing() -> None:
    for op in ("spmm", "spmm_t", "sddmm"):
        assert_bitwise_equal(call(op, validate=False), call(op), op)


# ---- wrappers and torch ---------------------------------------------------------------------------------------------


def test_wrappers_are_the_ops() -> None:
    a = arguments()
    x, dy, values, crow, col = (a[k] for k in ("x", "dy", "values", "crow", "col"))
    assert_bitwise_equal(slkernels.spmm(x, values, crow, col, 12), call("spmm"), "spmm")
    assert_bitwise_equal(slkernels.spmm_t(dy, values, crow, col, 9), call("spmm_t"), "spmm_t")
    assert_bitwise_equal(slkernels.sddmm(dy, x, crow, col), call("sddmm"), "sddmm")
    assert slkernels.check_support(crow, col, 12, 9) is None


def test_compile_inductor() -> None:
    a = arguments(dtype=torch.float32)

    def step(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return ops.spmm(x.relu(), values * 2, a["crow"], a["col"], 12).sin()

    torch._dynamo.reset()
    args = (a["x"].requires_grad_(), a["values"].requires_grad_())
    got, want = torch.compile(step, fullgraph=True)(*args), step(*args)
    torch.testing.assert_close(got, want)
    for g, w in zip(torch.autograd.grad(got.sum(), args), torch.autograd.grad(want.sum(), args), strict=True):
        torch.testing.assert_close(g, w)


def test_compile_dynamic_tokens_does_not_recompile() -> None:
    a = arguments()

    def eager(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return ops.spmm(x, values, a["crow"], a["col"], 12) * 2

    torch._dynamo.reset()
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager", dynamic=True)
    values = a["values"].requires_grad_()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (5, 9, 33):
            x = torch.randn(tokens, 9, requires_grad=True)
            assert_compiled_equals_eager(compiled, eager, (x, values), f"{tokens} tokens")


def test_gradient_of_mean_over_tokens() -> None:
    """mean(0) sends a row-expanded gradient backward: its rows share memory."""
    a = arguments(tokens=33)
    args = (a["x"], a["values"], a["crow"], a["col"], 12)
    got = gradients(lambda *args: ops.spmm(*args).mean(0), args, torch.arange(12.0))
    want = gradients(lambda *args: reference.spmm(*args).mean(0), args, torch.arange(12.0))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("op", ["spmm", "spmm_t", "sddmm"])
def test_meta_device_gives_shapes(op: str) -> None:
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments().items()}
    got, want = call(op, **meta), call(op)
    assert got.is_meta and got.shape == want.shape and got.dtype == want.dtype and got.stride() == want.stride()


@pytest.mark.parametrize("op", ["spmm", "spmm_t"])
def test_meta_device_checks_shapes(op: str) -> None:
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments().items()}
    with pytest.raises(RuntimeError, match=rf"slkernels::{op}: values must be \[{NNZ}\], got \[3\]"):
        call(op, **{**meta, "values": torch.ones(3, device="meta")})
