"""Family ``attention``: the ops that compute, over the tensors of a block-sparse layout."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import check, define, needs_grad

_ops = torch.ops.slkernels

# The mask of a call; include/slkernels/attention.h says what it means. The t_ tensors are the transposed lists.
_LAYOUT = (
    "Tensor row_ptr, Tensor row_cnt, Tensor row_nmask, Tensor idx, int block_m, int block_n, int unit, "
    "Tensor? lo=None, Tensor? hi=None, int sink=0, Tensor? bits=None, Tensor? bit_id=None, "
    "Tensor? col_ptr=None, Tensor? col_idx=None, "
    "Tensor? t_ptr=None, Tensor? t_cnt=None, Tensor? t_nmask=None, Tensor? t_idx=None, Tensor? t_bit_id=None"
)
_LAYOUT_NAMES = [argument.split()[1].split("=")[0] for argument in _LAYOUT.split(", ")]
_BIT_ID, _T_PTR = _LAYOUT_NAMES.index("bit_id"), _LAYOUT_NAMES.index("t_ptr")
_FORWARD_ONLY = "no gradients for a layout with unit 1 or gathered columns (col_ptr, col_idx)"


def _check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    check(q.dim() == 4, op, lambda: f"q must be [B, Hq, Sq, Dk], got {list(q.shape)}")
    batch, heads, _, depth = q.shape
    check(
        k.dim() == 4 and k.shape[0] == batch and k.shape[3] == depth,
        op,
        lambda: f"k must be [{batch}, Hkv, Sk, {depth}], got {list(k.shape)}",
    )
    check(
        v.dim() == 4 and v.shape[:3] == k.shape[:3],
        op,
        lambda: f"v must be [{k.shape[0]}, {k.shape[1]}, {k.shape[2]}, Dv], got {list(v.shape)}",
    )
    check(
        k.shape[1] > 0 and heads % k.shape[1] == 0,
        op,
        lambda: f"q's heads must be a multiple of k's, got {heads} and {k.shape[1]}",
    )


def _empty_in_order_of(like: Tensor, features) -> Tensor:
    """[B, H, S, features] with heads and tokens in memory as in ``like``: [B, S, H, D] views give such results."""
    batch, heads, tokens, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty((batch, tokens, heads, features)).transpose(1, 2)
    return like.new_empty((batch, heads, tokens, features))


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


# ---- block_sparse_attention -----------------------------------------------------------------------------------------


def _attention_fake(q, k, v, *layout_scale_softcap):
    _check_qkv("block_sparse_attention", q, k, v)
    return _empty_in_order_of(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=_lse_dtype(q))


def _attention_setup(ctx, inputs, output):
    q, k, v, *layout, scale, softcap = inputs
    ctx.numbers = [None if isinstance(a, Tensor) else a for a in layout]
    ctx.present = [isinstance(a, Tensor) for a in layout]
    ctx.save_for_backward(q, k, v, *output, *(a for a in layout if isinstance(a, Tensor)))
    ctx.scale, ctx.softcap = scale, softcap
    ctx.set_materialize_grads(False)


def _attention_backward(ctx, do, dlse):
    none = [None] * (3 + len(_LAYOUT_NAMES) + 2)
    need_q, need_k, need_v = (needs_grad(ctx, i) for i in range(3))
    if (do is None and dlse is None) or not (need_q or need_k or need_v):
        return tuple(none)
    q, k, v, o, lse, *tensors = ctx.saved_tensors
    given = iter(tensors)
    layout = [next(given) if there else a for there, a in zip(ctx.present, ctx.numbers, strict=True)]
    if (need_k or need_v) and layout[_T_PTR] is None:
        row_ptr, row_cnt, row_nmask, idx, _, block_n, unit, *_ = layout
        bit_id, col_ptr = layout[_BIT_ID], layout[_BIT_ID + 1]
        check(unit == block_n and col_ptr is None, "block_sparse_attention", lambda: _FORWARD_ONLY)
        lists = _ops.layout_transpose(row_ptr, row_cnt, row_nmask, idx, block_n, k.shape[2], bit_id)
        layout[_T_PTR:] = [*lists[:4], None if bit_id is None else lists[4]]
    do = torch.zeros_like(o) if do is None else do
    found = _ops.block_sparse_attention_backward(
        do, dlse, q, k, v, o, lse, *layout, ctx.scale, ctx.softcap, need_q, need_k or need_v
    )
    grads = [g if need else None for g, need in zip(found, (need_q, need_k, need_v), strict=True)]
    return tuple(grads + none[3:])


def _attention_backward_fake(do, dlse, q, k, v, o, lse, *rest):
    asked = rest[len(_LAYOUT_NAMES) + 2 :]  # the dispatcher drops trailing arguments that equal their defaults
    need_q, need_kv = (*asked, True, True)[:2]
    return (
        _empty_in_order_of(q, q.shape[3]) if need_q else q.new_empty((0,)),
        _empty_in_order_of(k, k.shape[3]) if need_kv else k.new_empty((0,)),
        _empty_in_order_of(v, v.shape[3]) if need_kv else v.new_empty((0,)),
    )


define(
    f"block_sparse_attention(Tensor q, Tensor k, Tensor v, {_LAYOUT}, float? scale=None, float softcap=0.0) "
    "-> (Tensor, Tensor)",
    fake=_attention_fake,
    setup_context=_attention_setup,
    backward=_attention_backward,
)
define(
    "block_sparse_attention_backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    f"{_LAYOUT}, float? scale=None, float softcap=0.0, bool need_q=True, bool need_kv=True) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_attention_backward_fake,
)

# ---- merge_attention_states -----------------------------------------------------------------------------------------


def _merge_fake(o1, lse1, o2, lse2):
    check(o1.dim() == 4, "merge_attention_states", lambda: f"o1 must be [B, H, S, D], got {list(o1.shape)}")
    return _empty_in_order_of(o1, o1.shape[3]), lse1.new_empty(lse1.shape)


def _merge_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _merge_backward(ctx, do, dlse):
    if do is None and dlse is None:
        return None, None, None, None
    o1, lse1, o2, lse2 = ctx.saved_tensors
    do = torch.zeros_like(o1) if do is None else do
    return _ops.merge_attention_states_backward(do, dlse, o1, lse1, o2, lse2)


def _merge_backward_fake(do, dlse, o1, lse1, o2, lse2):
    return (
        _empty_in_order_of(o1, o1.shape[3]),
        lse1.new_empty(lse1.shape),
        _empty_in_order_of(o2, o2.shape[3]),
        lse2.new_empty(lse2.shape),
    )


define(
    "merge_attention_states(Tensor o1, Tensor lse1, Tensor o2, Tensor lse2) -> (Tensor, Tensor)",
    fake=_merge_fake,
    setup_context=_merge_setup,
    backward=_merge_backward,
)
define(
    "merge_attention_states_backward(Tensor do, Tensor? dlse, Tensor o1, Tensor lse1, Tensor o2, Tensor lse2) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_merge_backward_fake,
)

# ---- column statistics ----------------------------------------------------------------------------------------------


def _statistics(q, k, block_m, block_n):
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    blocks = ((queries + block_m - 1) // block_m, (keys + block_n - 1) // block_n)
    shapes = ((keys,), (keys,), (keys,), blocks)
    return tuple(q.new_empty((batch, heads, *shape), dtype=torch.float32) for shape in shapes)


def _colstats_fake(
    q, k, row_begin=0, row_end=None, causal=True, block_m=64, block_n=64, lse=None, scale=None, softcap=0.0
):
    _check_qkv("attention_colstats", q, k, k)
    return _statistics(q, k, block_m, block_n)


def _block_sparse_colstats_fake(q, k, row_ptr, row_cnt, row_nmask, idx, block_m, block_n, *_rest, **_options):
    _check_qkv("block_sparse_colstats", q, k, k)
    return _statistics(q, k, block_m, block_n)


_ROWS = "SymInt row_begin=0, SymInt? row_end=None"
_NUMBERS = "Tensor? lse=None, float? scale=None, float softcap=0.0"
_FOUR = "(Tensor, Tensor, Tensor, Tensor)"

define(
    f"attention_colstats(Tensor q, Tensor k, {_ROWS}, bool causal=True, int block_m=64, int block_n=64, {_NUMBERS}) "
    f"-> {_FOUR}",
    fake=_colstats_fake,
)
define(
    f"block_sparse_colstats(Tensor q, Tensor k, {_LAYOUT}, {_ROWS}, {_NUMBERS}) -> {_FOUR}",
    fake=_block_sparse_colstats_fake,
)
