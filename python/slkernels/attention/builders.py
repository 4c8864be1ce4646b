"""The ways to make a :class:`~slkernels.attention.BlockRows`: one classmethod a source."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .layout import BlockRows

_ops = torch.ops.slkernels


def causal_bound(sq: int, sk: int, device: torch.device | str | None) -> Tensor:
    """hi [1, 1, sq] of a causal mask that is aligned at the end: query i sees the keys j <= i + sk - sq."""
    return torch.arange(1 + sk - sq, 1 + sk, dtype=torch.int32, device=device).view(1, 1, sq)


def _int32(t: Tensor) -> Tensor:
    return t if t.dtype == torch.int32 else t.to(torch.int32)


class Builders:
    """The classmethods of BlockRows.

    block_m and block_n are 64 or 128; queries and keys behind the last whole block form a smaller one. Lists have a
    static capacity and are filled on the device of the inputs, without waiting for it. On the CPU, indices that do not
    fit raise RuntimeError with their position.
    """

    @classmethod
    def from_block_mask(
        cls, block_mask: Tensor, block_m: int, block_n: int, sq: int, sk: int, causal: bool = False
    ) -> BlockRows:
        """Whole tiles: ``block_mask`` bool [B', Hm, ceil(sq / block_m), ceil(sk / block_n)]. With ``causal``, the tiles
        on the diagonal (query i sees j <= i + sk - sq) are cut by it and those behind it are dropped."""
        lists = _ops.layout_from_block_mask(block_mask, block_m, block_n, sq, sk, causal)
        hi = causal_bound(sq, sk, block_mask.device) if causal else None
        return cls(*lists, block_m, block_n, sq, sk, unit=block_n, hi=hi)

    @classmethod
    def from_topk(
        cls, indices: Tensor, block_m: int, block_n: int, sq: int, sk: int, causal: bool = False
    ) -> BlockRows:
        """Chosen kv blocks: ``indices`` int [B', Hm, ceil(sq / block_m), k], block ids in any order; -1 is none, an id
        given twice counts once. ``causal`` as in :meth:`from_block_mask`."""
        lists = _ops.layout_from_topk(_int32(indices), block_m, block_n, sq, sk, causal)
        hi = causal_bound(sq, sk, indices.device) if causal else None
        return cls(*lists, block_m, block_n, sq, sk, unit=block_n, hi=hi)

    @classmethod
    def from_interval(
        cls, lo: Tensor | None, hi: Tensor, block_m: int, block_n: int, sk: int, sink: int = 0
    ) -> BlockRows:
        """keep(i, j) = j < hi[i] and (j >= lo[i] or j < sink); lo and hi int [B', Hm, sq], lo None is 0. Exactly the
        tiles that hold a kept pair are listed."""
        hi = _int32(hi)
        low = torch.zeros_like(hi) if lo is None else _int32(lo)
        lists = _ops.layout_from_interval(low, hi, sink, block_m, block_n, sk)
        bound = None if lo is None else low
        return cls(*lists, block_m, block_n, hi.shape[2], sk, unit=block_n, lo=bound, hi=hi, sink=sink)

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_q: Tensor,
        block_m: int,
        block_n: int,
        sq: int,
        sk: int | None = None,
        cu_k: Tensor | None = None,
        causal: bool = True,
    ) -> BlockRows:
        """Documents laid end to end: document d's queries ``[cu_q[d], cu_q[d + 1])`` see the keys of
        ``[cu_k[d], cu_k[d + 1])`` only (``cu_k``: default ``cu_q``). ``causal`` is aligned at each document's end.
        Queries behind the last document see nothing: o = 0, lse = -inf."""
        sk = sq if sk is None else sk
        cu_q = _int32(cu_q)
        cu_k = cu_q if cu_k is None else _int32(cu_k)
        *lists, lo, hi = _ops.layout_from_cu_seqlens(cu_q, cu_k, block_m, block_n, sq, sk, causal)
        return cls(*lists, block_m, block_n, sq, sk, unit=block_n, lo=lo, hi=hi)

    @classmethod
    def from_vertical_slash(cls, vertical: Tensor, slash: Tensor, s: int, block: int = 64) -> BlockRows:
        """MInference's vertical-slash index (arXiv 2407.02490, appendix C.4.2) of a causal prompt of s tokens.

        Args:
            vertical: int [B', Hm, columns], kept keys, ascending. slash: int [B', Hm, diagonals], kept distances
                i - j, descending; distance 0 is always kept.
            block: the tiles' size in queries and keys.

        A diagonal crosses a block of queries as a band of tiles that need no alignment (unit 1); bands that touch
        join; columns outside of them are listed singly. Forward only.
        """
        *lists, col_ptr, col_idx = _ops.layout_from_vertical_slash(_int32(vertical), _int32(slash), block, s)
        hi = causal_bound(s, s, vertical.device)
        return cls(*lists, block, block, s, s, unit=1, hi=hi, col_ptr=col_ptr, col_idx=col_idx)

    @classmethod
    def from_dense_mask(cls, mask: Tensor, block_m: int, block_n: int) -> BlockRows:
        """Any mask: bool [B', Hm, sq, sk]. Tiles that are kept in part get a bitmap, 1 bit a pair; the room for bitmaps
        is an eighth of the mask's."""
        *lists, bits, bit_id = _ops.layout_from_dense_mask(mask, block_m, block_n)
        sq, sk = mask.shape[2:]
        return cls(*lists, block_m, block_n, sq, sk, unit=block_n, bits=bits, bit_id=bit_id)

    @classmethod
    def from_tree(cls, parent: Tensor, prefix: Tensor | int, block_m: int, block_n: int, sk: int) -> BlockRows:
        """Token trees behind a prefix: node i of batch b is the query i and the key ``prefix[b] + i``; it sees the
        prefix, its ancestors and itself.

        Args:
            parent: int [B', nodes]; a parent is an earlier node, or -1 for a root. prefix: keys before the first
                node's, int [B'] or one number. sk: keys, at least prefix + nodes.

        The prefix costs what dense attention costs: only the tiles that hold nodes have bitmaps.
        """
        parent = _int32(parent)
        if isinstance(prefix, int):
            prefix = torch.full(parent.shape[:1], prefix, dtype=torch.int32, device=parent.device)
        *lists, bits, bit_id = _ops.layout_from_tree(parent, _int32(prefix), block_m, block_n, sk)
        return cls(*lists, block_m, block_n, parent.shape[1], sk, unit=block_n, bits=bits, bit_id=bit_id)

    @classmethod
    def from_csr(
        cls, crow: Tensor, col: Tensor, batches: int, heads: int, block_m: int, block_n: int, sq: int, sk: int, **mask
    ) -> BlockRows:
        """Block lists in CSR form: crow int32 [rows + 1], col int32 [entries], rows = batches * heads *
        ceil(sq / block_m). Both are used in place.

        Args:
            mask: ``row_nmask``, ``lo``, ``hi``, ``sink``, ``bits``, ``bit_id``, ``unit`` as in BlockRows. Without
                row_nmask every entry is partial if there is a predicate, else full.
        """
        shape = (batches, heads, -(-sq // block_m))
        lists = crow[:-1].view(shape), crow.diff().view(shape)
        return cls._from_lists(*lists, col, block_m, block_n, sq, sk, mask)

    @classmethod
    def from_padded(cls, idx: Tensor, count: Tensor, block_m: int, block_n: int, sq: int, sk: int, **mask) -> BlockRows:
        """Padded lists: idx int32 [B', Hm, ceil(sq / block_m), width], count int32 [B', Hm, ceil(sq / block_m)]; what
        lies behind a row's count is never read. idx is used in place; ``mask`` as in :meth:`from_csr`."""
        width = idx.shape[3]
        row_ptr = torch.arange(0, count.numel() * width, max(width, 1), dtype=torch.int32, device=idx.device)
        row_ptr = row_ptr if width else torch.zeros(count.numel(), dtype=torch.int32, device=idx.device)
        return cls._from_lists(row_ptr.view(count.shape), count, idx.view(-1), block_m, block_n, sq, sk, mask)

    @classmethod
    def _from_lists(cls, row_ptr, row_cnt, idx, block_m, block_n, sq, sk, mask: dict) -> BlockRows:
        predicate = any(mask.get(name) is not None for name in ("lo", "hi", "bits"))
        row_nmask = mask.pop("row_nmask", None)
        if row_nmask is None:
            row_nmask = row_cnt if predicate else torch.zeros_like(row_cnt)
        mask.setdefault("unit", block_n)
        return cls(row_ptr, row_cnt, row_nmask, idx, block_m, block_n, sq, sk, **mask)
