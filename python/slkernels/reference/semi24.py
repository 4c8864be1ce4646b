"""Definitions of the ``semi24`` family's packing ops: 2:4 masks and packed weights, by dense indexing.

Names, arguments and results are those of the ops in :mod:`slkernels.semi24`. The packed layouts are written from their
vendors' descriptions, not from the kernels' offsets.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- patterns -------------------------------------------------------------------------------------------------------

# Two rows u, v share four columns, two each, as pairs (column of u, column of v).
_TWO_EACH = [[(a, 1 - a), (b, 5 - b)] for a in (0, 1) for b in (2, 3)] + [[(0, 2), (1, 3)], [(2, 0), (3, 1)]]


def _patterns() -> list[list[tuple[int, int]]]:
    """The 90 patterns in the order that decides between equal sums. A pattern is its eight elements (row, column) as
    the leaves of a balanced tree of additions."""
    patterns = []
    for top, bottom in product(_TWO_EACH, _TWO_EACH):
        leaves = [[(0, a), (1, b)] for a, b in top] + [[(2, a), (3, b)] for a, b in bottom]
        patterns.append([e for pair in leaves for e in pair])
    for both in _TWO_EACH:
        patterns.append([e for a, b in both for e in ((0, a), (1, a), (2, b), (3, b))])
    for x, y in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]:
        s, z = (c for c in range(4) if c not in (x, y))
        for (a, b), (c, d), (t, w) in product([(x, y), (y, x)], [(x, y), (y, x)], [(s, z), (z, s)]):
            patterns.append([(0, a), (1, b), (2, c), (3, d), (0, t), (1, t), (2, w), (3, w)])
    return patterns


LEAVES = torch.tensor([[4 * r + c for r, c in p] for p in _patterns()])  # [90, 8], positions in a tile
PATTERNS = torch.zeros(90, 16, dtype=torch.bool).scatter_(1, LEAVES, True)


def _tiles(x: Tensor) -> Tensor:
    """x [n, m], zero-padded, as [ceil(n / 4), ceil(m / 4), 16]."""
    n, m = x.shape
    x = F.pad(x, (0, -m % 4, 0, -n % 4))
    return x.view(x.shape[0] // 4, 4, x.shape[1] // 4, 4).transpose(1, 2).reshape(x.shape[0] // 4, x.shape[1] // 4, 16)


def _untile(tiles: Tensor, n: int, m: int) -> Tensor:
    rows, columns, _ = tiles.shape
    return tiles.view(rows, columns, 4, 4).transpose(1, 2).reshape(4 * rows, 4 * columns)[:n, :m].contiguous()


def pattern_sums(x: Tensor) -> Tensor:
    """[.., .., 90]: the sums of |x| over the patterns of each tile, in x's accumulation dtype and the ops' order."""
    wide = x if x.dtype == torch.float64 else x.float()
    most = 2.0**1020 if x.dtype == torch.float64 else 2.0**124
    sums = _tiles(torch.where(wide.isnan(), most, wide.abs().clamp(max=most)))[..., LEAVES.to(x.device)]
    while sums.shape[-1] > 1:
        sums = sums[..., 0::2] + sums[..., 1::2]
    return sums[..., 0]


def _groups(x: Tensor, padding: float = 0) -> Tensor:
    """x [n, m] as [n, ceil(m / 4), 4]."""
    n, m = x.shape
    return F.pad(x, (0, -m % 4), value=padding).reshape(n, (m + 3) // 4, 4)


def _rank(x: Tensor) -> Tensor:
    """|x| in float64, NaN above infinity."""
    wide = x.double().abs()
    return torch.where(wide.isnan(), torch.inf, wide.clamp(max=torch.finfo(torch.float64).max))


def _top2(key: Tensor) -> Tensor:
    """The first two positions of four by key, lower positions first among equals; ascending."""
    return key.sort(dim=-1, descending=True, stable=True).indices[..., :2].sort(-1).values


def prune24(W: Tensor, by: str = "row", score: Tensor | None = None) -> Tensor:
    """bool [n, m]: two of every four of a row, or the best pattern of every tile, by |score| (default: |W|)."""
    x = W if score is None else score
    n, m = W.shape
    if by == "row":
        groups = _groups(_rank(x))
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, _top2(groups), True)
        return mask.flatten(1)[:, :m].contiguous()
    sums = pattern_sums(x)
    index = torch.arange(90, device=x.device)
    best = torch.where(sums == sums.amax(-1, keepdim=True), index, 90).amin(-1)
    return _untile(PATTERNS.to(x.device)[best], n, m)


# ---- packs ----------------------------------------------------------------------------------------------------------


def _slots(mask: Tensor) -> Tensor:
    """[n, G, 2]: the positions of a group's slots: kept columns, then padding, then columns not kept."""
    return _top2(_groups(2 * mask.int(), 1))


def _pack(W: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    slots = _slots(mask)
    codes = F.pad(slots[..., 0] | slots[..., 1] << 2, (0, slots.shape[1] % 2), value=0x4)
    values = _groups(torch.where(mask, W, 0)).gather(-1, slots).flatten(1)
    return values, (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)


def _codes(meta: Tensor, m: int) -> Tensor:
    """[n, G]: the codes of a plain pack."""
    return torch.stack([meta & 15, meta >> 4], -1).flatten(1)[:, : (m + 3) // 4].long()


def compress24(W: Tensor, mask: Tensor, layout: str = "plain", validate: bool = True) -> tuple[Tensor, Tensor]:
    """(values, meta) of W * mask."""
    return convert24(*_pack(W, mask), *W.shape, "plain", layout)


def decompress24(values: Tensor, meta: Tensor, n: int, m: int, layout: str = "plain") -> Tensor:
    """[n, m], zero where nothing is kept."""
    values, meta = convert24(values, meta, n, m, layout, "plain")
    codes = _codes(meta, m)
    slots = torch.stack([codes & 3, codes >> 2], -1)
    groups = values.new_zeros(n, codes.shape[1], 4).scatter(-1, slots, values.reshape(slots.shape))
    return groups.flatten(1)[:, :m]


def mask_of24(meta: Tensor, n: int, m: int, layout: str = "plain") -> Tensor:
    """bool [n, m]: the slots that meta names."""
    if layout != "plain":
        meta = meta_to_plain(meta, n, m, layout)
    return decompress24(torch.ones(n, (m + 3) // 4 * 2, device=meta.device), meta, n, m).bool()


def prune_compress24(
    W: Tensor, by: str = "row", score: Tensor | None = None, layout: str = "plain"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The packs of W * mask and of its transpose, pruned again by rows among what the mask kept."""
    n, m = W.shape
    mask = prune24(W, by, score)
    rank = _rank(W if score is None else score)
    key = _groups(torch.where(mask, rank, -1).t(), -1)
    top = torch.zeros_like(key, dtype=torch.bool).scatter_(-1, _top2(key), True).flatten(1)[:, :n]
    mask_t = top & mask.t()
    return *compress24(W, mask, layout), *convert24(*_pack(W.t(), mask_t), m, n, "plain", layout)


# ---- layouts --------------------------------------------------------------------------------------------------------


def _padded(n: int, m: int, layout: str) -> tuple[int, int]:
    rows, columns = {"sm80": (32, 64), "sm90": (64, 128)}[layout]
    return -(-n // rows) * rows, -(-m // columns) * columns


def meta_offsets(N: int, M: int, layout: str) -> Tensor:
    """Where the metadata of a padded [N, M] weight lie: int64, the offsets of int16 words [N, M / 16] for sm80, of
    bytes [N, M / 8] for sm90.

    sm80: ``reorder_meta`` of CUTLASS 2.x (tools/util/include/cutlass/util/host_reorder.h), stored as
    ``ColumnMajorInterleaved<2>``. sm90: ``TensorEAtom_16bit`` of CUTLASS 3.x (sm90_sparse_config.inl) for tiles of 128
    along K: modes ((8, 2, 4), (16, 2, 4)) in the order ((3, 1, 5), (0, 4, 2)), fastest first, of 64 x 128 elements;
    atoms along rows first. A byte is eight elements.
    """
    if layout == "sm90":
        #                  atoms: K, M       r2 c1 r0 c2 r1 c0: slowest mode first
        order = torch.arange(N * M // 8).view(M // 128, N // 64, 4, 2, 8, 4, 2, 2)
        return order.permute(1, 2, 6, 4, 0, 5, 3, 7).reshape(N, M // 8)  # M atom, r2, r1, r0; K atom, c2, c1, c0
    row, column = torch.arange(N)[:, None], torch.arange(M // 16)[None]
    row = row // 32 * 32 + row % 8 * 4 + row % 32 // 8
    off_diagonal = (column % 2 - row % 2).expand(N, -1)  # of a 2 x 2 block: 1 top right, -1 bottom left
    row, column = row + off_diagonal, column - off_diagonal
    return column // 2 * 2 * N + row * 2 + column % 2


def meta_to_plain(meta: Tensor, n: int, m: int, layout: str) -> Tensor:
    """meta of a packed layout as the plain one's."""
    N, M = _padded(n, m, layout)
    words = meta.flatten()[meta_offsets(N, M, layout).flatten().to(meta.device)]
    return words.view(torch.uint8).view(N, M // 8)[:n, : (m + 7) // 8].contiguous()


def meta_from_plain(meta: Tensor, n: int, m: int, layout: str) -> Tensor:
    """The plain layout's meta in a packed one."""
    N, M = _padded(n, m, layout)
    plain = F.pad(meta, (0, M // 8 - meta.shape[1], 0, N - n), value=0x44).flatten()
    words = plain.view(torch.int16) if layout == "sm80" else plain
    out = torch.empty_like(words)
    out[meta_offsets(N, M, layout).flatten().to(meta.device)] = words
    return out.view(N, M // 16) if layout == "sm80" else out


def convert24(values: Tensor, meta: Tensor, n: int, m: int, source: str, target: str) -> tuple[Tensor, Tensor]:
    """The same weight in another layout."""
    if source != "plain":
        values = values[:n, : (m + 3) // 4 * 2]
        meta = meta_to_plain(meta, n, m, source)
    if target != "plain":
        N, M = _padded(n, m, target)
        values = F.pad(values, (0, M // 2 - values.shape[1], 0, N - n))
        meta = meta_from_plain(meta, n, m, target)
    return values, meta


# ---- from one pack to the other -------------------------------------------------------------------------------------


def repack24_perm(meta: Tensor, meta_t: Tensor, n: int, m: int) -> Tensor:
    """int32 [m, 2 ceil(n / 4)]: the position in values of every slot of the transposed pack, or -1."""
    shape, shape_t = (n, (m + 3) // 4 * 2), (m, (n + 3) // 4 * 2)
    numbers = torch.arange(1, shape[0] * shape[1] + 1, dtype=torch.float64, device=meta.device).view(shape)
    dense = _groups(decompress24(numbers, meta, n, m).t())
    codes = _codes(meta_t, n)
    return dense.gather(-1, torch.stack([codes & 3, codes >> 2], -1)).view(shape_t).int() - 1


def repack24_t_(values_t: Tensor, values: Tensor, perm: Tensor) -> None:
    """values_t <- values[perm], zero where perm is -1."""
    values_t.copy_(torch.where(perm < 0, 0, values.reshape(-1)[perm.clamp(min=0).long()]))
