"""Family ``attention``: the ops that compute, over the tensors of a block-sparse layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .._library import check, define, needs_grad

if TYPE_CHECKING:
    from .layout import BlockRows

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

# ---- wrappers -------------------------------------------------------------------------------------------------------


class ColumnStatistics(NamedTuple):
    """Statistics of the softmax p [B, Hq, Sq, Sk] over a range of queries, float32.

    col_sum: [B, Hq, Sk], sum over queries. col_max: [B, Hq, Sk], maximum over queries, 0 for keys that none keeps.
    diag_sum: [B, Hq, Sk], sum over the pairs at distance d = i + Sk - Sq - j (the last query stands at the last key),
    for d in [0, Sk). block_sum: [B, Hq, ceil(Sq / block_m), ceil(Sk / block_n)], sum over a block.
    """

    col_sum: Tensor
    col_max: Tensor
    diag_sum: Tensor
    block_sum: Tensor


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_ptr: Tensor,
    row_cnt: Tensor,
    row_nmask: Tensor,
    idx: Tensor,
    block_m: int,
    block_n: int,
    unit: int,
    lo: Tensor | None = None,
    hi: Tensor | None = None,
    sink: int = 0,
    bits: Tensor | None = None,
    bit_id: Tensor | None = None,
    col_ptr: Tensor | None = None,
    col_idx: Tensor | None = None,
    t_ptr: Tensor | None = None,
    t_cnt: Tensor | None = None,
    t_nmask: Tensor | None = None,
    t_idx: Tensor | None = None,
    t_bit_id: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """o = softmax(scale q k^T) v over the tiles of a layout, and the softmax's logarithmic sums; the op behind
    :func:`attend`. FlashAttention's online softmax (arXiv 2205.14135) over a list of tiles.

    Args:
        q: [B, Hq, Sq, Dk], float32, bfloat16, float16 or (CPU) float64; k: [B, Hkv, Sk, Dk]; v: [B, Hkv, Sk, Dv]. Hq is
            a multiple of Hkv. Views of [B, S, H, D] are taken as they are; features are copied if not contiguous.
        row_ptr ... col_idx: the layout; :class:`BlockRows` describes them.
        t_ptr ... t_bit_id: its transpose (:class:`BlockCols`) for the backward, built when needed if left out.
        scale: default 1 / sqrt(Dk). softcap: c > 0 replaces the scaled logits s by c tanh(s / c).

    Returns:
        o [B, Hq, Sq, Dv], q's dtype, in memory in the order of q's dimensions; lse [B, Hq, Sq], float32 (float64 for
        float64). Both are differentiable. A query that keeps no key has o = 0, lse = -inf and zero gradients.

    Raises:
        RuntimeError: shapes or dtypes that do not fit; on a CPU, the position of the first entry that lies outside (on
            CUDA such entries are skipped); gradients of a layout with unit 1 or single columns.
    """
    layout = (row_ptr, row_cnt, row_nmask, idx, block_m, block_n, unit, lo, hi, sink, bits, bit_id, col_ptr, col_idx)
    transposed = (t_ptr, t_cnt, t_nmask, t_idx, t_bit_id)
    return _ops.block_sparse_attention(q, k, v, *layout, *transposed, scale, softcap)


def merge_attention_states(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each (FlashAttention, arXiv
    2205.14135, section 3.1; as in split-KV decoding, LM-Infinite, ring attention).

    Args:
        o1, o2: [B, H, S, D], float32, bfloat16, float16 or (CPU) float64. lse1, lse2: [B, H, S], float32 (float64).

    Returns:
        o in o1's dtype and lse. Differentiable in all four arguments. -inf stands for a set without keys; where both
        are empty o = 0, lse = -inf and the gradients are zero.

    Raises:
        RuntimeError: shapes or dtypes that do not fit.
    """
    return _ops.merge_attention_states(o1, lse1, o2, lse2)


def attention_colstats(
    q: Tensor,
    k: Tensor,
    layout: BlockRows | None = None,
    *,
    row_begin: int = 0,
    row_end: int | None = None,
    causal: bool = True,
    block_m: int = 64,
    block_n: int = 64,
    lse: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> ColumnStatistics:
    """Column sums, column maxima, diagonal sums and block sums of the softmax, without storing it.

    MInference's vertical-slash estimator (arXiv 2407.02490, section 3) is ``attention_colstats(q[:, :, -64:], k)``: its
    vertical lines are ``col_sum.topk``, its slashes ``diag_sum.topk``. MustDrop's filter (arXiv 2411.10803) takes the
    mean over heads of col_sum and col_max over the text's queries.

    Args:
        q: [B, Hq, Sq, Dk], float32, bfloat16 or float16; k: [B, Hkv, Sk, Dk]. The last query stands at the last key.
        layout: what is kept; without one everything, or with ``causal`` the keys up to the query's position.
        row_begin, row_end: the queries that are counted, default all.
        causal, block_m, block_n: without a layout; blocks of 64 or 128 for block_sum.
        lse: [B, Hq, Sq], float32, of the same attention if it is known: saves half of the work.
        scale, softcap: as in :func:`block_sparse_attention`.

    Returns:
        :class:`ColumnStatistics`. Not differentiable.

    Raises:
        RuntimeError: shapes, dtypes or a range that do not fit.
    """
    if layout is None:
        found = _ops.attention_colstats(q, k, row_begin, row_end, causal, block_m, block_n, lse, scale, softcap)
    else:
        arguments = layout.arguments()
        found = _ops.block_sparse_colstats(q, k, *arguments, row_begin, row_end, lse, scale, softcap)
    return ColumnStatistics(*found)
