"""Family ``attention``: the ops that build, transpose and check the lists of a :class:`BlockRows`.

A builder's lists have a static size: row r owns the slot ``idx[r * width : (r + 1) * width]`` and fills its first
``row_cnt[r]`` entries; the rest is uninitialized and never read. So nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import check, define


def _blocks(tokens, block: int):
    return (tokens + block - 1) // block


def _rows(like: Tensor, batches, heads, q_blocks, width) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """row_ptr, row_cnt, row_nmask [batches, heads, q_blocks]; idx [rows * width]. All int32."""

    def ints(*shape) -> Tensor:
        return like.new_empty(shape, dtype=torch.int32)

    lists = [ints(batches, heads, q_blocks) for _ in range(3)]
    return (*lists, ints(batches * heads * q_blocks * width))


def _from_block_mask_fake(block_mask, block_m, block_n, sq, sk, causal=False):
    batches, heads, q_blocks, k_blocks = block_mask.shape
    check(
        q_blocks == _blocks(sq, block_m),
        "layout_from_block_mask",
        lambda: f"block_mask must be [B', Hm, {_blocks(sq, block_m)}, ...], got {list(block_mask.shape)}",
    )
    return _rows(block_mask, batches, heads, q_blocks, k_blocks)


def _from_topk_fake(indices, block_m, block_n, sq, sk, causal=False):
    batches, heads, q_blocks, k = indices.shape
    return _rows(indices, batches, heads, q_blocks, torch.sym_min(k, _blocks(sk, block_n)))


def _from_interval_fake(lo, hi, sink, block_m, block_n, sk):
    batches, heads, sq = lo.shape
    return _rows(lo, batches, heads, _blocks(sq, block_m), _blocks(sk, block_n))


def _from_cu_seqlens_fake(cu_q, cu_k, block_m, block_n, sq, sk, causal=True):
    lists = _rows(cu_q, 1, 1, _blocks(sq, block_m), _blocks(sk, block_n))
    return (*lists, cu_q.new_empty((1, 1, sq)), cu_q.new_empty((1, 1, sq)))


def _from_vertical_slash_fake(vertical, slash, block, s):
    batches, heads, verticals = vertical.shape
    lists = _rows(vertical, batches, heads, _blocks(s, block), slash.shape[2] + 1)
    rows = lists[0].numel()
    return (*lists, vertical.new_empty((rows + 1,)), vertical.new_empty((rows * verticals,)))


def _with_bits(lists: tuple[Tensor, ...], block_m: int, block_n: int, per_row) -> tuple[Tensor, ...]:
    bits = lists[0].new_empty((lists[0].numel() * per_row, block_m, block_n // 32))
    return (*lists, bits, lists[3].new_empty(lists[3].shape))


def _from_dense_mask_fake(mask, block_m, block_n):
    batches, heads, sq, sk = mask.shape
    k_blocks = _blocks(sk, block_n)
    return _with_bits(_rows(mask, batches, heads, _blocks(sq, block_m), k_blocks), block_m, block_n, k_blocks)


def _from_tree_fake(parent, prefix, block_m, block_n, sk):
    batches, nodes = parent.shape
    lists = _rows(parent, batches, 1, _blocks(nodes, block_m), _blocks(sk, block_n))
    return _with_bits(lists, block_m, block_n, _blocks(nodes, block_n) + 1)


def _transpose_fake(row_ptr, row_cnt, row_nmask, idx, block_n, sk, bit_id=None):
    columns = [row_ptr.new_empty((*row_ptr.shape[:2], _blocks(sk, block_n))) for _ in range(3)]
    return (*columns, idx.new_empty(idx.shape), idx.new_empty((0,) if bit_id is None else idx.shape))


_LISTS = "Tensor row_ptr, Tensor row_cnt, Tensor row_nmask, Tensor idx"
_TILING = "int block_m, int block_n, SymInt sq, SymInt sk"
_FOUR = "(Tensor, Tensor, Tensor, Tensor)"
_SIX = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"

define(
    f"layout_from_block_mask(Tensor block_mask, {_TILING}, bool causal=False) -> {_FOUR}", fake=_from_block_mask_fake
)
define(f"layout_from_topk(Tensor indices, {_TILING}, bool causal=False) -> {_FOUR}", fake=_from_topk_fake)
define(
    f"layout_from_interval(Tensor lo, Tensor hi, int sink, int block_m, int block_n, SymInt sk) -> {_FOUR}",
    fake=_from_interval_fake,
)
define(
    f"layout_from_cu_seqlens(Tensor cu_q, Tensor cu_k, {_TILING}, bool causal=True) -> {_SIX}",
    fake=_from_cu_seqlens_fake,
)
define(
    f"layout_from_vertical_slash(Tensor vertical, Tensor slash, int block, SymInt s) -> {_SIX}",
    fake=_from_vertical_slash_fake,
)
define(f"layout_from_dense_mask(Tensor mask, int block_m, int block_n) -> {_SIX}", fake=_from_dense_mask_fake)
define(
    f"layout_from_tree(Tensor parent, Tensor prefix, int block_m, int block_n, SymInt sk) -> {_SIX}",
    fake=_from_tree_fake,
)
define(
    f"layout_transpose({_LISTS}, int block_n, SymInt sk, Tensor? bit_id=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_transpose_fake,
)
define(
    f"layout_check({_LISTS}, int block_m, int block_n, int unit, SymInt sq, SymInt sk, Tensor? lo=None, "
    "Tensor? hi=None, int sink=0, Tensor? bits=None, Tensor? bit_id=None, Tensor? col_ptr=None, "
    "Tensor? col_idx=None) -> ()",
    fake=lambda *args, **kwargs: None,
)
