"""BlockRows: every builder against a dense definition, transposition, validation, zero-copy, torch's own rules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from slkernels.attention import BlockRows
from torch import Tensor

ops = torch.ops.slkernels
SIZES = [(1, 1), (63, 63), (127, 129), (129, 127), (248, 248), (320, 64), (1, 521), (521, 320)]
BLOCKS = [(64, 64), (128, 128), (64, 128), (128, 64)]
INT32 = torch.int32


def decode(layout: BlockRows) -> Tensor:
    """The mask of a layout, entry by entry from the format's definition; no pair may be listed twice."""
    L = layout.to("cpu")
    batches, heads, blocks = L.shape[0], *L.row_ptr.shape[1:]
    listed = torch.zeros(batches, heads, L.sq, L.sk, dtype=torch.int32)
    keep = torch.zeros(batches, heads, L.sq, L.sk, dtype=torch.bool)
    for r in range(batches * heads * blocks):
        b, h, iq = r // (heads * blocks), r // blocks % heads, r % blocks
        queries = range(iq * L.block_m, min((iq + 1) * L.block_m, L.sq))
        rows = slice(queries.start, queries.stop)

        def bound(t: Tensor, b=b, h=h, rows=rows) -> Tensor:
            return t[b if t.shape[0] > 1 else 0, h if t.shape[1] > 1 else 0, rows, None]

        row_b = b if L.row_ptr.shape[0] > 1 else 0
        first, count, partial = (int(t[row_b, h, iq]) for t in (L.row_ptr, L.row_cnt, L.row_nmask))
        for n in range(count):
            start = int(L.idx[first + n]) * L.unit
            keys = slice(start, min(start + L.block_n, L.sk))
            j = torch.arange(keys.start, keys.stop)
            tile = torch.ones(len(queries), len(j), dtype=torch.bool)
            if n < partial:
                if L.hi is not None:
                    tile &= j < bound(L.hi)
                if L.lo is not None:
                    tile &= (j >= bound(L.lo)) | (j < L.sink)
                if L.bits is not None and L.bit_id[first + n] >= 0:
                    words = L.bits[L.bit_id[first + n]].long() % 2**32
                    for jj in range(len(j)):
                        tile[:, jj] &= (words[: len(queries), jj // 32] >> (jj % 32)) % 2 == 1
            keep[b, h, rows, keys] |= tile
            listed[b, h, rows, keys] += 1
        if L.col_ptr is not None:
            own = (row_b * heads + h) * blocks + iq
            for c in L.col_idx[L.col_ptr[own] : L.col_ptr[own + 1]].tolist():
                keep[b, h, rows, c] = True
                listed[b, h, rows, c] += 1
    assert listed.max() <= 1 if listed.numel() else True
    return keep


def assert_is(layout: BlockRows, mask: Tensor, tight: bool = True) -> None:
    """The layout is sound, means ``mask``, and, if ``tight``, lists exactly the tiles that hold a kept pair, the full
    ones among them as full, both classes ascending."""
    layout.check()
    mask = mask.cpu()
    assert torch.equal(decode(layout), mask)
    assert torch.equal(layout.to_dense().cpu(), mask)
    if not tight:
        return
    L = layout.to("cpu")
    for b, h, iq in torch.cartesian_prod(*(torch.arange(n) for n in L.row_ptr.shape)).tolist():
        rows = mask[b, h, iq * L.block_m : (iq + 1) * L.block_m]
        tiles = rows.split(L.block_n, 1)
        full = [j for j, t in enumerate(tiles) if t.all()]
        partial = [j for j, t in enumerate(tiles) if t.any() and not t.all()]
        first, count, nmask = (int(t[b, h, iq]) for t in (L.row_ptr, L.row_cnt, L.row_nmask))
        assert L.idx[first : first + count].tolist() == partial + full and nmask == len(partial)


def causal_mask(sq: int, sk: int) -> Tensor:
    return torch.arange(sk) <= torch.arange(sq)[:, None] + sk - sq


def tiles_as_mask(grid: Tensor, block_m: int, block_n: int, sq: int, sk: int) -> Tensor:
    return grid.repeat_interleave(block_m, 2).repeat_interleave(block_n, 3)[:, :, :sq, :sk]


def blocks_of(size: int, block: int) -> int:
    return -(-size // block)


# ---- builders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block_m", "block_n"), BLOCKS)
@pytest.mark.parametrize(("sq", "sk"), SIZES)
def test_from_dense_mask(sq, sk, block_m, block_n, device, poison_memory) -> None:
    mask = torch.rand(2, 3, sq, sk) < 0.5
    mask[0, 0, :block_m] = True
    mask[0, 1] = False
    mask[1, 2, :, :block_n] = True
    mask[1, 1, -1] = False
    poison_memory()
    assert_is(BlockRows.from_dense_mask(mask.to(device), block_m, block_n), mask)
    strided = mask.to(device).transpose(2, 3).contiguous().transpose(2, 3)
    assert_is(BlockRows.from_dense_mask(strided, block_m, block_n), mask)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("block_m", "block_n"), BLOCKS)
@pytest.mark.parametrize(("sq", "sk"), SIZES)
def test_from_block_mask_and_topk(sq, sk, block_m, block_n, causal, device, poison_memory) -> None:
    q_blocks, k_blocks = blocks_of(sq, block_m), blocks_of(sk, block_n)
    grid = torch.rand(2, 2, q_blocks, k_blocks) < 0.6
    grid[0, 1] = False
    mask = tiles_as_mask(grid, block_m, block_n, sq, sk)
    mask = mask & causal_mask(sq, sk) if causal else mask
    # the same blocks as lists: in any order, with -1 and repetitions among them
    order = torch.rand(grid.shape).argsort(-1)
    chosen = torch.where(grid.gather(-1, order), order, -1)
    indices = torch.cat((chosen, chosen[..., :1]), -1)
    poison_memory()
    sizes = (block_m, block_n, sq, sk, causal)
    assert_is(BlockRows.from_block_mask(grid.to(device), *sizes), mask)
    assert_is(BlockRows.from_topk(indices.to(device), *sizes), mask)
    assert_is(BlockRows.from_topk(indices.to(device, INT32), *sizes), mask)


@pytest.mark.parametrize("sink", [0, 1, 70, 200])
@pytest.mark.parametrize(("block_m", "block_n"), BLOCKS)
@pytest.mark.parametrize(("sq", "sk"), SIZES)
def test_from_interval(sq, sk, block_m, block_n, sink, device, poison_memory) -> None:
    """Any bounds: empty, negative, beyond the keys, different for every query."""
    lo = torch.randint(-20, sk + 20, (2, 2, sq), dtype=INT32)
    hi = lo + torch.randint(-5, 200, (2, 2, sq), dtype=INT32)
    lo[0, 1], hi[0, 1] = 0, sk  # full tiles
    lo[1, 0] = torch.where(torch.arange(sq) % 3 == 0, 0, lo[1, 0])
    hi[1, 1] = 0  # nothing
    j = torch.arange(sk)
    mask = (j < hi[..., None]) & ((j >= lo[..., None]) | (j < sink))
    poison_memory()
    layout = BlockRows.from_interval(lo.to(device), hi.to(device), block_m, block_n, sk, sink)
    assert_is(layout, mask)
    if sink == 0:
        mask = (j < hi[..., None]) & (j >= 0)
        assert_is(BlockRows.from_interval(None, hi.to(device).long(), block_m, block_n, sk), mask)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("block_m", "block_n"), BLOCKS)
def test_from_cu_seqlens(block_m, block_n, causal, device, poison_memory) -> None:
    lengths_q, lengths_k = [100, 0, 1, 130, 37], [150, 20, 1, 90, 37]
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0) for n in (lengths_q, lengths_k))
    sq, sk = int(cu_q[-1]) + 9, int(cu_k[-1]) + 70
    mask = torch.zeros(1, 1, sq, sk, dtype=torch.bool)
    for d in range(len(lengths_q)):
        block = torch.ones(lengths_q[d], lengths_k[d], dtype=torch.bool)
        block = causal_mask(lengths_q[d], lengths_k[d]) if causal else block
        mask[0, 0, cu_q[d] : cu_q[d + 1], cu_k[d] : cu_k[d + 1]] = block
    poison_memory()
    layout = BlockRows.from_cu_seqlens(cu_q.to(device), block_m, block_n, sq, sk, cu_k.to(device), causal)
    assert_is(layout, mask)


def vertical_slash_mask(vertical: list[int], slash: list[int], s: int, block: int) -> Tensor:
    """From the paper's description: each diagonal is a band of block x block tiles; bands less than a block apart join,
    in whole blocks; single columns outside; all causal."""
    mask = torch.zeros(s, s, dtype=torch.bool)
    for first in range(0, s, block):
        end = first + block
        ranges: list[list[int]] = []
        for d in sorted({d for d in slash if d < end} | {0}, reverse=True):
            stop = max(end - d, block)
            if not ranges or stop > ranges[-1][1] + block:
                ranges.append([stop - block, stop])
            elif stop > ranges[-1][1]:
                ranges[-1][1] += block
        keys = {j for a, b in ranges for j in range(a, b)} | {v for v in vertical if v < ranges[-1][0]}
        for i in range(first, min(end, s)):
            mask[i, [j for j in keys if j <= i]] = True
    return mask


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("s", [1, 63, 65, 248, 521])
def test_from_vertical_slash(s, block, device, poison_memory) -> None:
    vertical = torch.stack([torch.randperm(s)[: min(s, 40)].sort().values for _ in range(4)]).view(2, 2, -1)
    slash = torch.stack([torch.randperm(s)[: min(s, 5)].sort(descending=True).values for _ in range(4)]).view(2, 2, -1)
    want = [
        vertical_slash_mask(v.tolist(), d.tolist(), s, block)
        for v, d in zip(vertical.flatten(0, 1), slash.flatten(0, 1), strict=True)
    ]
    poison_memory()
    layout = BlockRows.from_vertical_slash(vertical.to(device), slash.to(device), s, block)
    assert_is(layout, torch.stack(want).view(2, 2, s, s), tight=False)
    assert layout.unit == 1 and not layout.trainable
    none = torch.empty(1, 1, 0, dtype=INT32, device=device)  # the diagonal alone
    assert_is(
        BlockRows.from_vertical_slash(none, none, s, block), vertical_slash_mask([], [], s, block)[None, None], False
    )


@pytest.mark.parametrize(("block_m", "block_n"), BLOCKS)
@pytest.mark.parametrize("prefix", [0, 1, 63, 128, 300])
@pytest.mark.parametrize("nodes", [1, 40, 150])
def test_from_tree(nodes, prefix, block_m, block_n, device, poison_memory) -> None:
    parent = torch.stack([(torch.rand(nodes) * (torch.arange(nodes) + 1)).long() - 1 for _ in range(2)])
    prefixes = torch.tensor([prefix, prefix // 2])
    sk = prefix + nodes + 11
    mask = torch.zeros(2, 1, nodes, sk, dtype=torch.bool)
    for b in range(2):
        for i in range(nodes):
            mask[b, 0, i, : prefixes[b]] = True
            node = i
            while node >= 0:
                mask[b, 0, i, prefixes[b] + node] = True
                node = int(parent[b, node])
    poison_memory()
    layout = BlockRows.from_tree(parent.to(device), prefixes.to(device), block_m, block_n, sk)
    assert_is(layout, mask, tight=False)
    assert (layout.row_cnt - layout.row_nmask).min() >= prefix // 2 // block_n  # the prefix has no bitmaps
    assert_is(BlockRows.from_tree(parent[:1].to(device), prefix, block_m, block_n, sk), mask[:1], tight=False)


@pytest.mark.parametrize("batches", [0, 1])
def test_nothing_at_all(batches) -> None:
    for sq, sk in ((0, 0), (0, 5), (5, 0)):
        mask = torch.zeros(batches, 1, sq, sk, dtype=torch.bool)
        layout = BlockRows.from_dense_mask(mask, 64, 64).check()
        assert layout.to_dense().shape == mask.shape and layout.row_cnt.sum() == 0
        layout.transpose()


# ---- shared masks, zero-copy ----------------------------------------------------------------------------------------


def test_csr_and_padded_lists_are_taken_as_they_are() -> None:
    sq, sk = 300, 500
    grid = torch.rand(2, 3, 5, 4) < 0.5
    mask = tiles_as_mask(grid, 64, 128, sq, sk)
    crow = torch.cat((torch.zeros(1, dtype=torch.long), grid.sum(-1).flatten().cumsum(0))).to(INT32)
    col = grid.nonzero()[:, 3].to(INT32)
    layout = BlockRows.from_csr(crow, col, 2, 3, 64, 128, sq, sk)
    assert layout.row_ptr.data_ptr() == crow.data_ptr() and layout.idx.data_ptr() == col.data_ptr()
    assert_is(layout, mask)

    count = grid.sum(-1, dtype=INT32)
    padded = torch.full((2, 3, 5, 6), -(2**31), dtype=INT32)  # garbage behind every row's count
    for where in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)).tolist():
        padded[(*where, slice(0, int(count[tuple(where)])))] = grid[tuple(where)].nonzero()[:, 0].to(INT32)
    layout = BlockRows.from_padded(padded, count, 64, 128, sq, sk)
    assert layout.idx.data_ptr() == padded.data_ptr() and layout.row_cnt.data_ptr() == count.data_ptr()
    assert_is(layout, mask)

    hi = torch.arange(sq, dtype=INT32).view(1, 1, sq) + 1  # with a predicate, every entry obeys it
    layout = BlockRows.from_padded(padded, count, 64, 128, sq, sk, hi=hi)
    assert layout.hi.data_ptr() == hi.data_ptr()
    assert_is(layout, mask & (torch.arange(sk) < hi[..., None]), tight=False)


def test_bounds_of_each_batch_over_lists_of_all() -> None:
    """One list for the batch, an interval for each: lengths of padded rows, say."""
    full = torch.ones(1, 2, 3, 2, dtype=torch.bool)
    hi = torch.randint(0, 130, (3, 1, 150), dtype=INT32)
    layout = BlockRows.from_block_mask(full, 64, 128, 150, 130)
    layout = replace(layout, hi=hi, row_nmask=layout.row_cnt)
    assert layout.shape == (3, 2, 150, 130)
    assert_is(layout, (torch.arange(130) < hi[..., None]).expand(3, 2, -1, -1), tight=False)
    prompt = BlockRows.from_vertical_slash(torch.tensor([[[3, 5]]]), torch.tensor([[[0]]]), 128)
    lo = torch.tensor([0, 40], dtype=INT32).view(2, 1, 1).expand(2, 1, 128).contiguous()
    layout = replace(prompt, lo=lo)
    assert_is(layout, decode(layout), tight=False)
    assert layout.density.tiles == prompt.density.tiles


def test_to_keeps_everything_and_copies_nothing_in_place() -> None:
    layout = BlockRows.from_dense_mask(torch.rand(1, 1, 100, 100) < 0.5, 64, 64)
    assert layout.to("cpu") is layout
    assert layout.to("meta").bits.shape == layout.bits.shape and layout.to("meta").sq == 100


def test_density_counts_listed_and_kept_pairs() -> None:
    mask = torch.zeros(1, 1, 128, 192, dtype=torch.bool)
    mask[0, 0, :64, :64] = True
    mask[0, 0, 100, 150] = True
    tiles, tokens = BlockRows.from_dense_mask(mask, 64, 64).density
    assert tiles == 2 / 6 and tokens == pytest.approx((64 * 64 + 1) / (128 * 192))
    columns = BlockRows.from_vertical_slash(torch.tensor([[[3]]]), torch.tensor([[[0]]]), 128)
    assert columns.density.tiles == (2 * 64 * 64 + 64) / 128**2
    assert columns.density.tokens == pytest.approx((2 * 64 * 65 / 2 + 64) / 128**2)


# ---- transposition --------------------------------------------------------------------------------------------------


def entries(ptr, cnt, nmask, idx, bit_id) -> list[tuple]:
    """(group, block, listed block, partial, bitmap) of every entry, in the order of the lists."""
    found = []
    for at in range(ptr.numel()):
        first, count, partial = (int(t.flatten()[at]) for t in (ptr, cnt, nmask))
        for n in range(count):
            bitmap = int(bit_id[first + n]) if bit_id is not None and n < partial else -1
            found.append((at // ptr.shape[2], at % ptr.shape[2], int(idx[first + n]), n < partial, bitmap))
    return found


@pytest.mark.parametrize(("block_m", "block_n"), BLOCKS)
@pytest.mark.parametrize(("sq", "sk"), SIZES)
def test_transpose(sq, sk, block_m, block_n, device, poison_memory) -> None:
    mask = torch.rand(2, 3, sq, sk) < 0.02
    mask |= tiles_as_mask(
        torch.rand(2, 3, blocks_of(sq, block_m), blocks_of(sk, block_n)) < 0.4, block_m, block_n, sq, sk
    )
    poison_memory()
    for layout in (
        BlockRows.from_dense_mask(mask.to(device), block_m, block_n),
        BlockRows.from_interval(None, torch.randint(0, sk + 1, (1, 2, sq), device=device), block_m, block_n, sk),
    ):
        cols = layout.transpose()
        assert layout.transpose() is cols
        assert (cols.bit_id is None) == (layout.bit_id is None)
        rows = entries(layout.row_ptr, layout.row_cnt, layout.row_nmask, layout.idx, layout.bit_id)
        got = entries(*cols)
        # by column, partial first, then by row: the order is part of the contract, so that sums are reproducible
        assert got == sorted(((g, j, i, p, b) for g, i, j, p, b in rows), key=lambda e: (e[0], e[1], not e[3], e[2]))
        # and back
        again = ops.layout_transpose(*cols[:4], block_m, sq, cols.bit_id)
        assert entries(*again[:4], again[4] if cols.bit_id is not None else None) == rows


def test_transpose_refuses_what_has_none() -> None:
    layout = BlockRows.from_vertical_slash(torch.tensor([[[3]]]), torch.tensor([[[0]]]), 128)
    with pytest.raises(ValueError, match="single columns is forward only"):
        layout.transpose()


# ---- validation -----------------------------------------------------------------------------------------------------


def sound() -> BlockRows:
    """Two heads, 2 x 3 tiles; row 0 lists tiles 0 (bitmap 0) and 1, row 3 tile 2 (bitmap 1)."""
    mask = torch.zeros(1, 2, 128, 192, dtype=torch.bool)
    mask[0, 0, :64, 64:128] = True
    mask[0, 0, 5, 7] = True
    mask[0, 1, 100, 150] = True
    return BlockRows.from_dense_mask(mask, 64, 64)


def columns() -> BlockRows:
    return BlockRows.from_vertical_slash(torch.tensor([[[3, 5]]]), torch.tensor([[[0]]]), 128)


def changed(layout: BlockRows, name: str, at: int, value: int) -> BlockRows:
    t = getattr(layout, name).clone()
    t.view(-1)[at] = value
    return replace(layout, **{name: t})


FAULTS = [
    (sound, "row_cnt", 0, -1, "row 0 (batch 0, head 0, block 0): row_cnt is -1"),
    (sound, "row_nmask", 0, 3, "row 0 (batch 0, head 0, block 0): row_nmask is 3, outside [0, row_cnt = 2]"),
    (sound, "row_nmask", 3, -1, "row 3 (batch 0, head 1, block 1): row_nmask is -1, outside [0, row_cnt = 1]"),
    (sound, "row_ptr", 3, 12, "row 3 (batch 0, head 1, block 1): row_ptr 12 + row_cnt 1 is outside the 12 entries"),
    (sound, "row_ptr", 3, -1, "row 3 (batch 0, head 1, block 1): row_ptr -1 + row_cnt 1 is outside the 12 entries"),
    (sound, "row_ptr", 3, 2**31 - 1, "row_ptr 2147483647 + row_cnt 1 is outside the 12 entries"),
    (sound, "row_ptr", 3, 1, "rows 0 and 3 share entries of idx"),
    (sound, "idx", 1, 3, "row 0 (batch 0, head 0, block 0): entry 1: idx[1] = 3 is out of range [0, 3)"),
    (sound, "idx", 0, -1, "row 0 (batch 0, head 0, block 0): entry 0: idx[0] = -1 is out of range [0, 3)"),
    (sound, "idx", 1, 0, "row 0 (batch 0, head 0, block 0): the tile at key 0 is listed twice"),
    (sound, "bit_id", 0, 12, "row 0 (batch 0, head 0, block 0): entry 0: bit_id[0] = 12 is out of range [-1, 12)"),
    (sound, "bit_id", 9, -2, "row 3 (batch 0, head 1, block 1): entry 0: bit_id[9] = -2 is out of range [-1, 12)"),
    (columns, "idx", 0, 128, "row 0 (batch 0, head 0, block 0): entry 0: idx[0] = 128 is out of range [0, 128)"),
    (columns, "col_ptr", 1, -1, "row 0 (batch 0, head 0, block 0): col_ptr 0 to -1 decreases or leaves"),
    (columns, "col_ptr", 2, 5, "row 1 (batch 0, head 0, block 1): col_ptr 0 to 5 decreases or leaves the 4 entries"),
    (columns, "col_idx", 0, 128, "row 1 (batch 0, head 0, block 1): column 128 is out of range [0, 128)"),
    (columns, "col_idx", 0, 5, "row 1 (batch 0, head 0, block 1): column 5 is listed twice"),
    (columns, "col_idx", 0, 70, "row 1 (batch 0, head 0, block 1): column 70 lies in the tile at key 64"),
]


@pytest.mark.parametrize(("make", "name", "at", "value", "message"), FAULTS, ids=[f"{f[1]}-{f[3]}" for f in FAULTS])
def test_check_names_the_first_fault(make, name, at, value, message) -> None:
    make().check()
    with pytest.raises(RuntimeError) as caught:
        changed(make(), name, at, value).check()
    assert "slkernels::layout_check: " in str(caught.value) and message in str(caught.value)


def test_check_finds_overlapping_tiles() -> None:
    layout = BlockRows.from_padded(
        torch.tensor([[[[0, 63]]]], dtype=INT32), torch.tensor([[[2]]], dtype=INT32), 64, 64, 64, 200, unit=1
    )
    with pytest.raises(RuntimeError, match="the tiles at keys 0 and 63 overlap"):
        layout.check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_m": 96}, "block_m must be 64 or 128, got 96"),
        ({"unit": 2}, "unit must be 1 or block_n = 64, got 2"),
        ({"sq": 200}, r"row_ptr must be \[B', Hm, 4\]"),
        ({"sink": -1}, "sink must not be negative"),
        ({"bit_id": None}, "bits and bit_id go together"),
        ({"bits": torch.zeros(2, 64, 4, dtype=INT32)}, r"bits must be \[tiles, 64, 2\]"),
        ({"bit_id": torch.zeros(3, dtype=INT32)}, r"bit_id must be a contiguous \[12\]"),
        ({"idx": torch.zeros(12)}, "idx must be int32, got float32"),
        ({"row_cnt": torch.zeros(1, 2, 3, dtype=INT32)}, "must have one shape"),
        ({"lo": torch.zeros(1, 1, 100, dtype=INT32)}, r"lo must be \[1 or 1, 2 or 1, 128\]"),
        ({"hi": torch.zeros(1, 3, 128, dtype=INT32)}, r"hi must be \[1 or 1, 2 or 1, 128\]"),
        ({"col_ptr": torch.zeros(5, dtype=INT32)}, "col_ptr and col_idx go together"),
    ],
)
def test_check_of_shapes(change, message) -> None:
    with pytest.raises(RuntimeError, match=message):
        replace(sound(), **change).check()


def test_transpose_of_a_corrupt_layout_is_an_error() -> None:
    for name, at, value in (("idx", 1, 3), ("row_ptr", 3, 12), ("row_cnt", 0, 2**31 - 1), ("row_ptr", 3, 1)):
        with pytest.raises(RuntimeError, match="slkernels::layout_transpose: "):
            changed(sound(), name, at, value).transpose()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BlockRows.from_block_mask(torch.ones(1, 1, 2, 2), 64, 64, 128, 128), "block_mask must be bool"),
        (
            lambda: BlockRows.from_block_mask(torch.ones(1, 1, 2, 3, dtype=torch.bool), 64, 64, 128, 128),
            r"block_mask must be \[B', Hm, 2, 2\], got \[1, 1, 2, 3\]",
        ),
        (lambda: BlockRows.from_block_mask(torch.ones(1, 1, 2, 2).bool(), 32, 64, 128, 128), "block_m must be 64 or"),
        (lambda: BlockRows.from_topk(torch.tensor([[[[0], [2]]]]), 64, 64, 128, 128), "row 1, entry 0 is 2, outside"),
        (lambda: BlockRows.from_topk(torch.tensor([[[[-2], [0]]]]), 64, 64, 128, 128), "row 0, entry 0 is -2, outside"),
        (lambda: BlockRows.from_interval(None, torch.zeros(3, 4), 64, 64, 4), r"lo must be \[B', Hm, Sq\]"),
        (lambda: BlockRows.from_interval(None, torch.zeros(1, 1, 4), 64, 64, 4, -1), "sink must not be negative"),
        (lambda: BlockRows.from_cu_seqlens(torch.tensor([1, 4]), 64, 64, 4), r"cu_q\[0\] must be 0, got 1"),
        (lambda: BlockRows.from_cu_seqlens(torch.tensor([0, 4, 3]), 64, 64, 4), "cu_q decreases at position 2"),
        (lambda: BlockRows.from_cu_seqlens(torch.tensor([0, 5]), 64, 64, 4), "cu_q ends at 5, behind the 4 tokens"),
        (
            lambda: BlockRows.from_vertical_slash(torch.tensor([[[3, 2]]]), torch.tensor([[[0]]]), 8),
            "vertical must ascend, got 3 before 2",
        ),
        (
            lambda: BlockRows.from_vertical_slash(torch.tensor([[[8]]]), torch.tensor([[[0]]]), 8),
            r"vertical has 8, outside \[0, 8\)",
        ),
        (
            lambda: BlockRows.from_vertical_slash(torch.tensor([[[1]]]), torch.tensor([[[0, 1]]]), 8),
            "slash must descend, got 0 before 1",
        ),
        (lambda: BlockRows.from_tree(torch.tensor([[-1, 1]]), 0, 64, 64, 2), "parent of node 1 is 1"),
        (
            lambda: BlockRows.from_tree(torch.tensor([[-1, 0]]), 3, 64, 64, 4),
            "prefix 3 and 2 nodes do not fit in sk = 4",
        ),
    ],
)
def test_error(call, message) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


# ---- torch's own rules ----------------------------------------------------------------------------------------------


def example_calls() -> dict[str, tuple]:
    ints = torch.tensor([[[0, 3, 70]]], dtype=INT32)
    hi = torch.randint(0, 100, (2, 1, 130), dtype=INT32)
    layout = sound()
    lists = (layout.row_ptr, layout.row_cnt, layout.row_nmask, layout.idx)
    return {
        "layout_from_block_mask": (torch.rand(1, 2, 3, 2) < 0.5, 64, 64, 130, 100, True),
        "layout_from_topk": (torch.randint(-1, 2, (1, 2, 3, 5), dtype=INT32), 64, 64, 130, 100),
        "layout_from_interval": (hi - 30, hi, 4, 64, 128, 100),
        "layout_from_cu_seqlens": (torch.tensor([0, 50, 130], dtype=INT32),) * 2 + (64, 64, 130, 130),
        "layout_from_vertical_slash": (ints, ints.flip(-1), 64, 200),
        "layout_from_dense_mask": (torch.rand(1, 2, 130, 100) < 0.5, 64, 64),
        "layout_from_tree": (torch.tensor([[-1, 0, 0]], dtype=INT32), torch.tensor([70], dtype=INT32), 64, 64, 80),
        "layout_transpose": (*lists, 64, 192, layout.bit_id),
        "layout_check": (*lists, 64, 64, 64, 128, 192, None, None, 0, layout.bits, layout.bit_id),
    }


@pytest.mark.parametrize("name", example_calls())
def test_opcheck(name) -> None:
    """Lists end in memory that nobody wrote, so results are compared by their shapes (here) and by what they mean."""
    args, op = example_calls()[name], getattr(ops, name).default
    torch.library.opcheck(op, args, test_utils=["test_schema", "test_faketensor", "test_autograd_registration"])
    results = op(*args)
    if results is None:
        return
    for shape_env in (None, torch.fx.experimental.symbolic_shapes.ShapeEnv()):
        with torch._subclasses.FakeTensorMode(shape_env=shape_env) as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
        for f, r in zip(fake, results, strict=True):
            assert tuple(int(n) for n in f.shape) == r.shape and f.dtype == r.dtype and f.stride() == r.stride()


def test_builders_compile_without_graph_breaks() -> None:
    def build(grid: Tensor, mask: Tensor, hi: Tensor):
        a = BlockRows.from_block_mask(grid, 64, 64, 130, 100, causal=True)
        b = BlockRows.from_dense_mask(mask, 64, 128)
        c = BlockRows.from_interval(None, hi, 128, 64, 100)
        return a.row_cnt, a.transpose().cnt, b.row_nmask, b.transpose().nmask, c.row_cnt

    args = (torch.rand(1, 2, 3, 2) < 0.5, torch.rand(1, 1, 130, 100) < 0.5, torch.randint(0, 100, (1, 1, 130)))
    torch._dynamo.reset()
    compiled = torch.compile(build, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*args), build(*args), strict=True):
        assert torch.equal(got, want)


def test_threads_do_not_change_the_lists(threads) -> None:
    mask = torch.rand(2, 4, 500, 700) < 0.3
    mask[:, :, 128:300, 64:400] = True

    def lists():
        layout = BlockRows.from_dense_mask(mask, 64, 64).check()
        return entries(layout.row_ptr, layout.row_cnt, layout.row_nmask, layout.idx, layout.bit_id), layout.to_dense()

    threads(1)
    want = lists()
    threads(4)
    got = lists()
    assert got[0] == want[0] and torch.equal(got[1], want[1])
    assert torch.equal(got[1], mask)


def test_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    layout = BlockRows.from_vertical_slash(torch.tensor([[[3, 5]]]), torch.tensor([[[100, 0]]]), 256)
    ax = layout.plot()
    picture = torch.from_numpy(ax.images[0].get_array().data)
    assert torch.equal(picture > 0, layout.to_dense()[0, 0])
    assert {t.get_text() for t in ax.get_legend().get_texts()} == {"full", "partial", "column"}
    assert (picture[200:, [3, 5]] == 3).all() and picture[255, 255] == 2 and picture[255, 150] == 1
