"""block_sparse_attention, forward and backward, over layouts that are written out here."""

from __future__ import annotations

import math

import pytest
import slkernels
import torch
from attention_cases import (
    GARBAGE,
    AttentionCase,
    assert_attention,
    assert_bounded,
    bounded_results,
    layout_of,
    make_cases,
    mask_arguments,
)
from harness import FLOATS, LAYOUTS, Inputs, assert_bitwise_equal, is_float, with_grad
from op_tests import ErrorCase, OpTests, assert_compiled_equals_eager
from slkernels import reference
from torch import Tensor

ops = torch.ops.slkernels
attention = ops.block_sparse_attention
NAMES = [argument.name for argument in attention.default._schema.arguments]


def arguments(**changes) -> tuple:
    """A valid call with some arguments changed: 2 batches, 4 heads on 2, 70 queries, 130 keys."""
    q, k, v = torch.ones(2, 4, 70, 8), torch.ones(2, 2, 130, 8), torch.ones(2, 2, 130, 16)
    given = dict(zip(NAMES, (q, k, v, *mask_arguments("random", 1, 2, 70, 130, 64, 64), None, 0.0), strict=True))
    return tuple({**given, **changes}.values())


def changed(name: str, position: tuple, value: int, **others) -> tuple:
    """A valid call with one number of the layout changed."""
    given = dict(zip(NAMES, arguments(**others), strict=True))
    tensor = given[name].clone()
    tensor[position] = value
    return arguments(**{**others, name: tensor})


def error(id: str, message: str, *args) -> ErrorCase:
    return ErrorCase("block_sparse_attention", id, lambda: attention(*(args or arguments())), message)


def change(id: str, message: str, **changes) -> ErrorCase:
    return error(id, message, *arguments(**changes))


def corrupt(id: str, message: str, name: str, position: tuple, value: int, **others) -> ErrorCase:
    return error(id, message, *changed(name, position, value, **others))


COLUMNS = dict(col_ptr=torch.tensor([0, 1, 1, 3, 3], dtype=torch.int32), col_idx=torch.tensor([5, 0, 129]).int())


class TestAttention(OpTests):
    cases = make_cases()
    errors = [  # noqa: RUF012
        change("q_3d", "q must be [B, Hq, Sq, Dk], got [4, 70, 8]", q=torch.ones(4, 70, 8)),
        change("q_int", "q must be float32, bfloat16, float16 or float64, got int64", q=torch.ones(2, 4, 70, 8).long()),
        change("k_features", "k must be [2, Hkv, Sk, 8], got [2, 2, 130, 9]", k=torch.ones(2, 2, 130, 9)),
        change("v_keys", "v must be [2, 2, 130, Dv], got [2, 2, 131, 8]", v=torch.ones(2, 2, 131, 8)),
        change("heads", "q's heads must be a multiple of k's, got 5 and 2", q=torch.ones(2, 5, 70, 8)),
        change("k_dtype", "k must have q's dtype float32, got float16", k=torch.ones(2, 2, 130, 8).half()),
        change("block_m", "block_m must be 64 or 128, got 32", block_m=32),
        change("block_n", "block_n must be 64 or 128, got 96", block_n=96),
        change("unit", "unit must be 1 or block_n = 64, got 2", unit=2),
        change("sink", "sink must not be negative, got -1", sink=-1),
        change("scale", "scale must be finite, got inf", scale=math.inf),
        change("softcap", "softcap must be finite and not negative, got -1", softcap=-1.0),
        change(
            "rows", "row_ptr must be [1 or 2, one of 1, 2, 4, 2], got [1, 3, 2]", row_ptr=torch.zeros(1, 3, 2).int()
        ),
        change("row_cnt", "row_cnt must be [1, 2, 2], got [1, 1, 2]", row_cnt=torch.zeros(1, 1, 2).int()),
        change("row_nmask", "row_nmask must be int32, got int64", row_nmask=torch.zeros(1, 2, 2).long()),
        change("idx", "idx must be [entries], got [1, 4]", idx=torch.zeros(1, 4).int()),
        change("bits_alone", "bits and bit_id go together", bit_id=None),
        change("bits", "bits must be [1, 64, 2], got [1, 64, 4]", bits=torch.zeros(1, 64, 4).int()),
        change("lo", "lo must be [1 or 2, 1 or 2, 70], got [1, 4, 70]", lo=torch.zeros(1, 4, 70).int()),
        change("hi", "hi must be int32, got float32", hi=torch.zeros(1, 1, 70)),
        change("col_alone", "col_ptr and col_idx go together", col_ptr=COLUMNS["col_ptr"]),
        change("col_ptr", "col_ptr must be [5], got [4]", **COLUMNS | dict(col_ptr=torch.zeros(4).int())),
        corrupt("ptr_negative", "row_ptr[0] = -1 and row_cnt[0] = ", "row_ptr", (0, 0, 0), -1),
        corrupt("ptr_large", f"row_ptr[0] = {GARBAGE} and row_cnt[0]", "row_ptr", (0, 0, 0), GARBAGE),
        corrupt("cnt_large", "row_cnt[3] = 1000 must stay within the", "row_cnt", (0, 1, 1), 1000),
        corrupt("cnt_overflow", "row_cnt[3] = 2147483647 must stay within", "row_cnt", (0, 1, 1), 2**31 - 1),
        corrupt("cnt_negative", "row_cnt[1] = -1 must stay within", "row_cnt", (0, 0, 1), -1),
        corrupt("nmask", "row_nmask[0] must be in [0, 3], got 4", "row_nmask", (0, 0, 0), 4),
        corrupt("nmask_negative", "row_nmask[1] must be in [0, 3], got -1", "row_nmask", (0, 0, 1), -1),
        corrupt("idx_large", "idx[4] of list 0 must be in [0, 3), got 3", "idx", (4,), 3),
        corrupt("idx_overflow", f"idx[4] of list 0 must be in [0, 3), got {2**31 - 1}", "idx", (4,), 2**31 - 1),
        corrupt("idx_negative", "idx[3] of list 0 must be in [0, 3), got -1", "idx", (3,), -1),
        corrupt("bit_id", "bit_id[3] of list 0 must be below", "bit_id", (3,), GARBAGE),
        corrupt("col_ptr_0", "col_ptr[0] must not be negative, got -1", "col_ptr", (0,), -1, **COLUMNS),
        corrupt("col_ptr_falls", "col_ptr[3] must be in [1, 3], got 0", "col_ptr", (3,), 0, **COLUMNS),
        corrupt("col_ptr_large", "col_ptr[4] must be in [3, 3], got 4", "col_ptr", (4,), 4, **COLUMNS),
        corrupt("col_idx", "col_idx[2] must be in [0, 130), got 130", "col_idx", (2,), 130, **COLUMNS),
        corrupt("col_idx_negative", "col_idx[0] must be in [0, 130), got -1", "col_idx", (0,), -1, **COLUMNS),
    ]

    @pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
    def test_numeric_reference(self, case: AttentionCase, dtype: torch.dtype, device: torch.device) -> None:
        assert_attention(case, case.make(Inputs(dtype, device)))

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    def test_numeric_layout(self, case: AttentionCase, layout: str, dtype: torch.dtype, device: torch.device) -> None:
        args = case.make(Inputs(dtype, device))
        assert_attention(case, tuple(LAYOUTS[layout](a) if is_float(a) else a for a in args))

    def test_compile(self, case: AttentionCase, device: torch.device) -> None:
        args = with_grad(case.make(Inputs(torch.float32, device)))
        torch._dynamo.reset()
        compiled = torch.compile(lambda *a: case(*a) * 2, fullgraph=True, backend="aot_eager")
        assert_compiled_equals_eager(compiled, lambda *a: case(*a) * 2, args, str(case))


# ---- what a layout can be -------------------------------------------------------------------------------------------


def masked(args: tuple) -> tuple[Tensor, Tensor]:
    return reference.attention.block_sparse_attention(*args)


def forward_only_layout(sq: int, sk: int, generator: torch.Generator) -> tuple:
    """unit 1: tiles that start anywhere, the last one cut by the end of the keys; and single columns between them."""
    rows = -(-sq // 64)
    ptr, cnt, nmask, idx, col_ptr, col_idx = [], [], [], [], [0], []
    for _ in range(rows):
        third = 200 + int(torch.randint(19, (1,), generator=generator))
        starts = [3, 130, third, sk - 17] if third + 64 <= sk - 17 else [3, 130, sk - 17]
        ptr.append(len(idx))
        cnt.append(len(starts))
        nmask.append(1)
        idx += starts
        col_idx += [c for c in (1, 67, 99, 128, 199) if c < sk]
        col_ptr.append(len(col_idx))
    hi = torch.arange(sq, dtype=torch.int32) + 5

    def lists(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32).view(1, 1, rows)

    columns = (torch.tensor(col_ptr).int(), torch.tensor(col_idx).int())
    layout = (lists(ptr), lists(cnt), lists(nmask), torch.tensor(idx).int(), 64, 64, 1, None, hi.view(1, 1, sq), 0)
    return (*layout, None, None, *columns, *(None,) * 5)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(70, 300), (129, 521), (1, 260)], ids=str)
def test_numeric_unaligned_tiles_and_columns(dtype, sizes, device) -> None:
    inputs, (sq, sk) = Inputs(dtype, device), sizes
    layout = forward_only_layout(sq, sk, torch.Generator().manual_seed(0))
    args = (inputs.tensor(2, 4, sq, 64), inputs.tensor(2, 2, sk, 64), inputs.tensor(2, 2, sk, 48))
    args += tuple(t.to(device) if isinstance(t, Tensor) else t for t in layout)
    want = bounded_results((*args, None, 0.0), None, None)
    for name, got, in_torch in zip(("o", "lse"), attention(*args), masked(args), strict=True):
        assert_bounded(got, want[name], in_torch, name)


@pytest.mark.parametrize("what", ["unit", "columns"])
def test_forward_only_layouts_have_no_gradients(what: str) -> None:
    layout = list(forward_only_layout(70, 300, torch.Generator().manual_seed(0)))
    if what == "unit":
        layout[12:14] = None, None
    else:
        layout[3:7] = torch.zeros_like(layout[3]), 64, 64, 64
        layout[1:3] = torch.ones_like(layout[1]), torch.zeros_like(layout[2])
    q, k, v = torch.ones(1, 1, 70, 8, requires_grad=True), torch.ones(1, 1, 300, 8), torch.ones(1, 1, 300, 8)
    for changed in ((q, k, v), (q.detach(), k.requires_grad_(), v)):
        o, _ = attention(*changed, *layout)
        with pytest.raises(RuntimeError, match=r"slkernels::block_sparse_attention\w*: no gradients for a layout with"):
            o.sum().backward()


def test_numeric_a_sparse_layout_is_not_dense(device) -> None:
    """What flash-attention's issue 2897 did: a kernel that ignores the list returns the dense result."""
    inputs = Inputs(torch.float32, device)
    q, k, v = inputs.tensor(1, 2, 256, 64), inputs.tensor(1, 2, 256, 64), inputs.tensor(1, 2, 256, 64)
    keep = torch.ones(1, 1, 4, 4).tril().bool().repeat_interleave(64, 2).repeat_interleave(64, 3)
    sparse = tuple(t.to(device) if isinstance(t, Tensor) else t for t in layout_of(keep, 64, 64))
    dense = tuple(t.to(device) if isinstance(t, Tensor) else t for t in layout_of(torch.ones_like(keep), 64, 64))
    assert (sparse[2] == 0).all() and (dense[2] == 0).all(), "full tiles only: lists are all that differs"
    o, o_dense = attention(q, k, v, *sparse)[0], attention(q, k, v, *dense)[0]
    assert (o - o_dense).abs().amax((0, 1, 3))[:192].min() > 1e-3
    torch.testing.assert_close(o_dense, torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_transposed_lists_are_built_where_they_are_missing() -> None:
    for case in make_cases():
        args = with_grad(case.make(Inputs(torch.float32)))
        if case.output or not case(*args).numel():
            continue
        without = (*args[:17], None, None, None, None, None, *args[22:])
        wants = torch.autograd.grad(case(*args).sum(), args[:3])
        for got, want in zip(torch.autograd.grad(case(*without).sum(), args[:3]), wants, strict=True):
            assert_bitwise_equal(got, want, str(case))


@pytest.mark.parametrize(
    ("name", "position", "value", "message"),
    [
        ("t_idx", (4,), 2, "t_idx[4] of list 0 must be in [0, 2), got 2"),
        ("t_cnt", (0, 0, 0), GARBAGE, "t_ptr[0] = 3 and t_cnt[0] = 1073741824 must stay within the"),
        ("t_nmask", (0, 0, 0), -1, "t_nmask[0] must be in [0, 2], got -1"),
        ("t_bit_id", (3,), GARBAGE, "t_bit_id[3] of list 0 must be below"),
    ],
)
def test_corrupt_transposed_lists(name: str, position: tuple, value: int, message: str) -> None:
    args = changed(name, position, value)
    o, _ = attention(*args[:2], args[2].requires_grad_(), *args[3:])
    with pytest.raises(RuntimeError) as caught:
        o.sum().backward()
    assert f"slkernels::block_sparse_attention_backward: {message}" in str(caught.value)


def test_both_gradients_at_once() -> None:
    """The gradient of (o, lse) is the sum of those of o alone and of lse alone."""
    args = with_grad(make_cases()[2].make(Inputs(torch.float64)))
    o, lse = attention(*args)
    lse = lse.masked_fill(lse == -math.inf, 0)
    do, dlse = torch.randn_like(o), torch.randn_like(lse)
    both = torch.autograd.grad((o, lse), args[:3], (do, dlse), retain_graph=True)
    of_o = torch.autograd.grad(o, args[:3], do, retain_graph=True)
    of_lse = torch.autograd.grad(lse, args[:3], dlse)
    for total, a, b in zip(both, of_o, of_lse, strict=True):
        torch.testing.assert_close(total, a + b)


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_token_major_inputs_are_views_and_so_are_results() -> None:
    """[B, S, H, D] tensors seen as [B, H, S, D]: no copies; results and gradients lie as their inputs do."""
    layout = mask_arguments("random", 1, 1, 70, 130, 64, 64)
    q, k, v = (torch.randn(2, s, h, d) for s, h, d in ((70, 4, 64), (130, 2, 64), (130, 2, 48)))
    views = [t.transpose(1, 2).requires_grad_() for t in (q, k, v)]
    o, lse = attention(*views, *layout)
    assert o.transpose(1, 2).is_contiguous() and lse.is_contiguous()
    grads = torch.autograd.grad(o.sum(), views)
    assert all(g.transpose(1, 2).is_contiguous() for g in grads)
    dense = [t.detach().contiguous().requires_grad_() for t in views]
    o_dense, lse_dense = attention(*dense, *layout)
    assert o_dense.is_contiguous()
    for got, want in zip(
        (o, lse, *grads), (o_dense, lse_dense, *torch.autograd.grad(o_dense.sum(), dense)), strict=True
    ):
        assert_bitwise_equal(got, want, "views")


def test_backward_keeps_inputs_results_and_the_layout() -> None:
    args = with_grad(arguments())
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        o, lse = attention(*args)
    known = {t.data_ptr() for t in (*args, o, lse) if isinstance(t, Tensor)}
    assert saved and all(t.data_ptr() in known for t in saved)


# ---- elementary functions -------------------------------------------------------------------------------------------
# One query of one feature against two keys: p of the second is exp(-x) / (1 + exp(-x)) for any x, and v picks it out.


def two_keys(x: Tensor, softcap: float = 0.0) -> tuple[Tensor, Tensor]:
    n = x.numel()
    q, k = torch.ones(n, 1, 1, 1), torch.stack([torch.zeros(n), x], 1).view(n, 1, 2, 1)
    v = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1).expand(n, 1, 2, 1)
    o, lse = attention(q, k, v, *mask_arguments("full", 1, 1, 1, 2, 64, 64), 1.0, softcap)
    return o.flatten(), lse.flatten()


def test_numeric_exp() -> None:
    """p to 4 units in the last place from 1 down to where exp is flushed, 0 below: no cliff, no wrong power of two."""
    x = -torch.cat([torch.linspace(0, 87, 20001), torch.arange(126) * math.log(2)]).float()
    o, _ = two_keys(x)
    e = x.double().exp()
    error = (o.double() - e / (1 + e)).abs() / (e / (1 + e))
    assert error.max() <= 4 * 2**-24, f"{error.max() / 2**-24} half units at {x[error.argmax()]}"
    for far in (-104.0, -1e4, -1e30, -math.inf):
        assert two_keys(torch.tensor([far]))[0] == 0
    assert two_keys(torch.tensor([math.nan]))[0].isnan()


def test_numeric_tanh() -> None:
    """softcap * tanh(x / softcap) to 5 half units, from 1e-30 to infinity; lse of one key is its logit."""
    x = torch.cat([torch.logspace(-30, 5, 5001), torch.linspace(0.5, 0.75, 5001), torch.tensor([math.inf])])
    x = torch.cat([x, -x])
    for softcap in (1.0, 30.0):
        q, k = torch.ones(len(x), 1, 1, 1), (x * softcap).view(-1, 1, 1, 1)
        lse = attention(q, k, k, *mask_arguments("full", 1, 1, 1, 1, 64, 64), 1.0, softcap)[1].flatten()
        want = softcap * torch.tanh((x * softcap).double() / softcap)
        error = ((lse.double() - want) / want).abs()
        assert error.max() <= 5 * 2**-24, f"{error.max() / 2**-24} half units at {x[error.argmax()]}"
        assert torch.equal(lse[: len(x) // 2], -lse[len(x) // 2 :])


def test_wrapper_is_the_op() -> None:
    args = arguments()
    for got, want in zip(slkernels.attention.block_sparse_attention(*args), attention(*args), strict=True):
        assert_bitwise_equal(got, want, "")
