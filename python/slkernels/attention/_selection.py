"""Patterns that queries and keys decide: the estimators of MInference and HiP. Inference only: a choice of keys has no
gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import BlockRows


def _repeat_heads(k: Tensor, heads: int) -> Tensor:
    return k if k.shape[1] == heads else k.repeat_interleave(heads // k.shape[1], 1)


def _need_square(name: str, q: Tensor, k: Tensor) -> int:
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"{name} is for prompts: as many queries as keys, got {q.shape[2]} and {k.shape[2]}")
    return q.shape[2]


@torch.no_grad()
def vertical_slash(
    q: Tensor,
    k: Tensor,
    vertical_size: int,
    slash_size: int,
    *,
    last_q: int = 64,
    first: int = 30,
    recent: int = 100,
    block: int = 64,
    scale: float | None = None,
) -> BlockRows:
    """MInference's vertical-slash heads (arXiv 2407.02490, section 3.3, algorithm 2): the softmax of the last
    ``last_q`` queries over all keys, summed down columns and along diagonals; the ``vertical_size`` largest columns and
    the ``slash_size`` largest diagonals of every head are kept.

    Args:
        q [B, Hq, S, D], k [B, Hkv, S, D]. first, recent: columns and diagonals that are always among the chosen.
        block: tiles are block x block. scale: default 1 / sqrt(D).

    Returns:
        A layout with a mask a query head, unit 1 and single columns: forward only.
    """
    s = _need_square("vertical_slash", q, k)
    heads, last_q = q.shape[1], min(last_q, s)
    scores = q[:, :, s - last_q :].float() @ _repeat_heads(k, heads).float().mT
    scores *= q.shape[-1] ** -0.5 if scale is None else scale
    distance = torch.arange(s - last_q, s, device=q.device)[:, None] - torch.arange(s, device=q.device)
    p = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
    column = p.sum(2)
    diagonal = torch.zeros_like(column)
    diagonal.scatter_add_(2, distance.clamp(min=0).flatten().expand(*p.shape[:2], -1), p.flatten(2))
    column[..., :first] = torch.inf
    diagonal[..., :recent] = torch.inf
    vertical = column.topk(min(vertical_size, s), -1).indices.sort(-1).values
    slash = diagonal.topk(min(slash_size, s), -1).indices.sort(-1, descending=True).values
    return BlockRows.from_vertical_slash(vertical, slash, s, block)


def _block_means(x: Tensor, block: int) -> Tensor:
    """[B, H, S, D] -> [B, H, ceil(S / block), D], the mean of each block's tokens."""
    s = x.shape[2]
    blocks = -(-s // block)
    padded = torch.nn.functional.pad(x.float(), (0, 0, 0, blocks * block - s))
    sums = padded.view(*x.shape[:2], blocks, block, -1).sum(3)
    count = (s - torch.arange(blocks, device=x.device) * block).clamp(max=block)
    return sums / count[:, None]


@torch.no_grad()
def block_sparse(q: Tensor, k: Tensor, topk: int = 100, *, block: int = 64) -> BlockRows:
    """MInference's block-sparse heads (arXiv 2407.02490, section 3.3, algorithm 3): queries and keys are averaged over
    blocks; every block of queries keeps the ``topk`` kv blocks, among those at or before it, whose mean key has the
    largest product with its mean query. Tiles are causal. One mask a query head; trainable."""
    s = _need_square("block_sparse", q, k)
    scores = _block_means(q, block) @ _block_means(_repeat_heads(k, q.shape[1]), block).mT
    blocks = scores.shape[-1]
    future = torch.ones(blocks, blocks, dtype=torch.bool, device=q.device).triu(1)
    best = scores.masked_fill(future, -torch.inf).topk(min(topk, blocks), -1)
    return BlockRows.from_topk(best.indices.masked_fill(best.values == -torch.inf, -1), block, block, s, s, causal=True)


@torch.no_grad()
def hip(
    q: Tensor,
    k: Tensor,
    topk: int,
    *,
    sink: int = 1,
    recent: int = 1,
    block_m: int = 64,
    block_n: int = 64,
) -> BlockRows:
    """HiP's hierarchical choice of keys (arXiv 2406.09827, section 3.1): a tree search in place of all scores.

    For every block of queries the kv blocks that it may see are cut into 2 topk equal ranges. A range's score is the
    largest product of its centre token's key with any query of the block; the ``topk`` best ranges are halved and
    scored again, until every range is one kv block. O(log S) scores of 2 topk keys a query block.

    Args:
        q [B, Hq, Sq, D], k [B, Hkv, Sk, D], causal with the ends aligned. topk: kv blocks a query block. sink, recent:
            kv blocks at the start and up to the diagonal that are kept besides.

    Returns:
        A trainable layout with a mask a query head.
    """
    batch, heads, sq, depth = q.shape
    sk, device = k.shape[2], q.device
    q_blocks, k_blocks = -(-sq // block_m), -(-sk // block_n)
    ends = torch.arange(1, q_blocks + 1, device=device) * block_m
    seen = (ends.clamp(max=sq) + sk - sq).clamp(min=0)  # keys
    blocks = (seen + block_n - 1) // block_n
    padded = torch.nn.functional.pad(q.float(), (0, 0, 0, q_blocks * block_m - sq))
    queries = padded.view(batch, heads, q_blocks, block_m, depth)
    real = (torch.arange(q_blocks * block_m, device=device) < sq).view(q_blocks, block_m, 1)
    keys = _repeat_heads(k, heads).float()

    def score(start: Tensor, stop: Tensor) -> Tensor:
        """[B, H, q blocks, ranges]; -inf for empty ranges."""
        centre = (start * block_n + torch.minimum(stop * block_n, seen[:, None])) // 2
        picked = keys.gather(2, centre.clamp(0, max(sk - 1, 0)).flatten(2)[..., None].expand(-1, -1, -1, depth))
        products = queries @ picked.view(*centre.shape, depth).mT
        best = products.masked_fill(~real, -torch.inf).amax(3)
        return best.masked_fill(start >= stop, -torch.inf)

    cut = torch.arange(2 * topk + 1, device=device) * blocks[:, None] // (2 * topk)
    start, stop = (c.expand(batch, heads, -1, -1) for c in (cut[:, :-1], cut[:, 1:]))
    for _ in range(max(k_blocks - 1, 1).bit_length() + 1):
        best = score(start, stop).topk(topk, -1).indices
        start, stop = start.gather(3, best), stop.gather(3, best)
        middle = (start + stop + 1) // 2
        start, stop = torch.cat((start, middle), 3), torch.cat((middle, stop), 3)
    best = score(start, stop).topk(topk, -1)
    chosen = start.gather(3, best.indices).masked_fill(best.values == -torch.inf, -1)
    last = blocks[:, None] - 1 - torch.arange(recent, device=device)
    always = torch.cat((torch.arange(sink, device=device).expand(q_blocks, -1), last), 1)
    always = torch.where((always >= 0) & (always < blocks[:, None]), always, -1).expand(batch, heads, -1, -1)
    indices = torch.cat((chosen, always), 3).to(torch.int32)
    return BlockRows.from_topk(indices, block_m, block_n, sq, sk, causal=True)
