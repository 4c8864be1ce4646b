"""Definitions of the ``attention`` family: the layout is a dense mask here, and the softmax a dense matrix."""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUT_ARGUMENTS = 19  # row_ptr to t_bit_id

def keep_mask(
    queries: int,
    keys: int,
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
    *_transposed: Tensor | None,
) -> Tensor:
    """The mask bool [B', Hm, queries, keys] that a layout stands for; B' is that of lo and hi, if theirs is larger."""
    batches, heads, blocks = row_ptr.shape
    bounds = [bound for bound in (lo, hi) if bound is not None]
    wide = max([batches, *(bound.shape[0] for bound in bounds)])
    device = row_ptr.device
    j = torch.arange(keys, device=device)
    inside = torch.ones(wide, heads, queries, keys, dtype=torch.bool, device=device)
    if lo is not None:
        inside &= (j >= lo.expand(wide, heads, queries)[..., None]) | (j < sink)
    if hi is not None:
        inside &= j < hi.expand(wide, heads, queries)[..., None]
    keep = torch.zeros_like(inside)
    ptr, cnt, nmask = row_ptr.tolist(), row_cnt.tolist(), row_nmask.tolist()
    for b in range(wide):
        row_b = b if batches > 1 else 0
        for h in range(heads):
            for block in range(blocks):
                row = slice(block * block_m, min((block + 1) * block_m, queries))
                for n in range(cnt[row_b][h][block]):
                    t = ptr[row_b][h][block] + n
                    start = int(idx[t]) * unit
                    tile = slice(start, min(start + block_n, keys))
                    kept = torch.ones(row.stop - row.start, tile.stop - start, dtype=torch.bool, device=device)
                    if n < nmask[row_b][h][block]:
                        kept = inside[b, h, row, tile]
                        if bits is not None and bit_id is not None and bit_id[t] >= 0:
                            words = bits[bit_id[t]].long()[:, :, None] >> torch.arange(32, device=device)
                            kept = kept & ((words & 1) > 0).flatten(1)[: kept.shape[0], : kept.shape[1]]
                    keep[b, h, row, tile] |= kept
                if col_ptr is not None and col_idx is not None:
                    r = (row_b * heads + h) * blocks + block
                    columns = col_idx[int(col_ptr[r]) : int(col_ptr[r + 1])].long()
                    keep[b, h, row, columns] = True
    return keep


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float | None = None, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(o, lse) of attention under a mask bool [B or 1, Hm, Sq, Sk]; an empty row gives o = 0, lse = -inf."""
    heads = q.shape[1]
    sums = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    keep = keep.repeat_interleave(heads // keep.shape[1], 1)
    s = (q @ k.mT).to(sums) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~keep, -torch.inf)
    empty = ~keep.any(-1)
    lse = s.masked_fill(empty[..., None], 0).logsumexp(-1).masked_fill(empty, -torch.inf)
    p = (s - lse.masked_fill(empty, 0)[..., None]).exp()
    return p.to(v.dtype) @ v, lse


def block_sparse_attention(q: Tensor, k: Tensor, v: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """(o, lse); ``arguments`` are those of the op: the layout's, from row_ptr to t_bit_id, then scale and softcap."""
    layout, numbers = arguments[:LAYOUT_ARGUMENTS], arguments[LAYOUT_ARGUMENTS:]
    return masked_attention(q, k, v, keep_mask(q.shape[2], k.shape[2], *layout), *numbers)


def merge_attention_states(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """(o, lse) of attention over the union of two disjoint sets of keys (FlashAttention, arXiv 2205.14135, 3.1)."""
    top = torch.maximum(lse1, lse2).detach()
    top = top.masked_fill(top == -torch.inf, 0)
    w1, w2 = (lse1 - top).exp(), (lse2 - top).exp()
    total = w1 + w2
    empty = total == 0
    lse = top + total.masked_fill(empty, 1).log().masked_fill(empty, -torch.inf)
    total = total.masked_fill(empty, 1)
    o = (w1 / total)[..., None] * o1.to(lse.dtype) + (w2 / total)[..., None] * o2.to(lse.dtype)
    return o.to(o1.dtype), lse


def colstats(
    q: Tensor,
    k: Tensor,
    keep: Tensor,
    block_m: int,
    block_n: int,
    row_begin: int = 0,
    row_end: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(col_sum, col_max, diag_sum, block_sum) of the softmax p under a mask, over the queries of a range."""
    queries, keys = q.shape[2], k.shape[2]
    identity = torch.eye(keys, dtype=k.dtype, device=k.device).expand(*k.shape[:2], keys, keys)
    p, _ = masked_attention(q, k, identity, keep, scale, softcap)
    counted = torch.zeros_like(p)
    counted[:, :, row_begin:row_end] = p[:, :, row_begin:row_end]
    shift = keys - queries
    distance = torch.arange(queries, device=q.device)[:, None] + shift - torch.arange(keys, device=q.device)
    diagonal = [counted[:, :, distance == d].sum(-1) for d in range(keys)]
    blocks = (-(-queries // block_m), -(-keys // block_n))
    padded = counted.new_zeros(*p.shape[:2], blocks[0] * block_m, blocks[1] * block_n)
    padded[:, :, :queries, :keys] = counted
    block_sum = padded.unflatten(3, (blocks[1], block_n)).sum(-1).unflatten(2, (blocks[0], block_m)).sum(3)
    return counted.sum(2), counted.amax(2), torch.stack(diagonal, -1), block_sum
