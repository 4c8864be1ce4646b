"""The layout of block-sparse attention, as a dataclass of tensors. The format is described in docs/attention.md."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .builders import Builders

_ops = torch.ops.slkernels


class Density(NamedTuple):
    """What a layout keeps, as shares of the whole mask: of the pairs in listed tiles and columns, and of the pairs that
    the mask keeps. Their ratio is the share of the kernels' work that is used."""

    tiles: float
    tokens: float


class BlockCols(NamedTuple):
    """The transpose of a layout, for the backward: for every (batch, mask head, kv block) the q blocks that list it,
    partial first, both classes ascending. ptr, cnt, nmask int32 [B', Hm, ceil(Sk / block_n)]; idx, bit_id int32."""

    ptr: Tensor
    cnt: Tensor
    nmask: Tensor
    idx: Tensor
    bit_id: Tensor | None


@dataclass(frozen=True, eq=False)
class BlockRows(Builders):
    """Which (query, key) pairs attention keeps, as lists of kv tiles.

    Row (b, hm, iq) stands for the queries ``[iq * block_m, (iq + 1) * block_m)``. Its entries are
    ``t = row_ptr + n, n < row_cnt``; entry t covers the keys ``[idx[t] * unit, idx[t] * unit + block_n)``. The first
    ``row_nmask`` entries are partial, and keep (i, j) where::

        j < hi[i]  and  (j >= lo[i] or j < sink)  and  bit (i, j) of bits[bit_id[t]] is set, where bit_id[t] >= 0

    the others are full. Entries of ``idx`` and ``bit_id`` that no row counts may hold anything. Nothing is copied:
    CSR (:meth:`from_csr`) and padded lists (:meth:`from_padded`) are taken as they are.

    B' is 1 (one mask for the whole batch) or B; Hm is 1 (shared by all heads), Hkv (by the query heads of a kv head) or
    Hq. A shared mask is stored once and never expanded.

    Attributes:
        row_ptr, row_cnt, row_nmask: int32 [B', Hm, ceil(sq / block_m)]. idx: int32 [entries].
        block_m, block_n: 64 or 128 queries and keys a tile. sq, sk: queries and keys.
        unit: keys that one step of idx means: block_n (block ids), or 1 (any first key; forward only).
        lo, hi: int32 [B' or 1, Hm or 1, sq] or None (no bound). sink: keys below it are exempt from lo.
        bits, bit_id: int32 [tiles, block_m, block_n / 32] and [entries]; bit j % 32 of word j / 32; -1: no bitmap.
        col_ptr, col_idx: int32 [rows + 1] and [columns]: single keys that all queries of a row keep, outside of its
            tiles (forward only).
    """

    row_ptr: Tensor
    row_cnt: Tensor
    row_nmask: Tensor
    idx: Tensor
    block_m: int
    block_n: int
    sq: int
    sk: int
    unit: int
    lo: Tensor | None = None
    hi: Tensor | None = None
    sink: int = 0
    bits: Tensor | None = None
    bit_id: Tensor | None = None
    col_ptr: Tensor | None = None
    col_idx: Tensor | None = None
    _cache: dict = field(default_factory=dict, init=False, repr=False)

    @property
    def device(self) -> torch.device:
        return self.row_ptr.device

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B', Hm, sq, sk): the shape of :meth:`to_dense`; B' of the bounds, if that of the lists is 1."""
        wide = max(self.row_ptr.shape[0], *(t.shape[0] for t in (self.lo, self.hi) if t is not None), 0)
        return wide, self.row_ptr.shape[1], self.sq, self.sk

    @property
    def trainable(self) -> bool:
        """Whether the backward can run: tiles aligned to block_n, no single columns."""
        return self.unit == self.block_n and self.col_ptr is None

    def to(self, device: torch.device | str) -> BlockRows:
        """The layout on another device; itself where it is there already."""
        if torch.device(device) == self.device:
            return self
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        return replace(self, **{name: t.to(device) for name, t in tensors.items() if isinstance(t, Tensor)})

    def transpose(self) -> BlockCols:
        """The lists of the backward, built on the device and kept: layers and steps that share a layout share them.

        Raises:
            ValueError: a layout with unit 1 or with columns, which has no transpose.
        """
        if not self.trainable:
            what = "single columns" if self.col_ptr is not None else f"unit {self.unit}"
            raise ValueError(f"a layout with {what} is forward only: it has no transpose")
        if "transpose" not in self._cache:
            *lists, bit_id = _ops.layout_transpose(
                self.row_ptr, self.row_cnt, self.row_nmask, self.idx, self.block_n, self.sk, self.bit_id
            )
            self._cache["transpose"] = BlockCols(*lists, bit_id if self.bit_id is not None else None)
        return self._cache["transpose"]

    def arguments(self, backward: bool = False) -> tuple:
        """The layout's part of the ops' arguments, with the transposed lists if ``backward``."""
        own = (self.row_ptr, self.row_cnt, self.row_nmask, self.idx, self.block_m, self.block_n, self.unit)
        own += (self.lo, self.hi, self.sink, self.bits, self.bit_id, self.col_ptr, self.col_idx)
        return own + (tuple(self.transpose()) if backward else (None,) * 5)

    def check(self) -> BlockRows:
        """Raise RuntimeError that names the first fault (row, entry, value), if there is one. Copies the lists to the
        host, so it is for tests and debugging; the ops themselves never read outside, whatever a layout holds."""
        host = self.to("cpu")
        lists = (host.row_ptr, host.row_cnt, host.row_nmask, host.idx)
        sizes = (host.block_m, host.block_n, host.unit, host.sq, host.sk)
        rest = (host.lo, host.hi, host.sink, host.bits, host.bit_id, host.col_ptr, host.col_idx)
        _ops.layout_check(*lists, *sizes, *rest)
        return self

    def _per_row(self, t: Tensor) -> Tensor:
        """A row tensor as int64 [rows of :attr:`shape`]."""
        return t.expand(self.shape[0], -1, -1).reshape(-1).long()

    def _entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of all counted entries: their row, their number in the row, their position in idx."""
        count = self._per_row(self.row_cnt)
        n = torch.arange(int(count.max()) if count.numel() else 0, device=self.device)
        row, number = (n < count[:, None]).nonzero(as_tuple=True)
        return row, number, self._per_row(self.row_ptr)[row] + number

    def _columns(self) -> tuple[Tensor, Tensor]:
        """Of all single columns: their row and their key."""
        first, count = self.col_ptr[:-1].long(), self.col_ptr.diff().long()
        copies = self.shape[0] // max(self.row_ptr.shape[0], 1)
        first, count = first.repeat(copies), count.repeat(copies)
        row = torch.repeat_interleave(torch.arange(len(count), device=self.device), count)
        number = torch.arange(len(row), device=self.device) - (count.cumsum(0) - count)[row]
        return row, self.col_idx[first[row] + number].long()

    def to_dense(self) -> Tensor:
        """The mask itself: bool [B', Hm, sq, sk]. For tests, plots and small sizes."""
        batches, heads, *_ = self.shape
        M, N, blocks, device = self.block_m, self.block_n, self.row_ptr.shape[2], self.device
        kept = torch.zeros(batches * heads * blocks, M, self.sk + N, dtype=torch.bool, device=device)
        row, number, entry = self._entries()
        i, j = torch.arange(M, device=device), torch.arange(N, device=device)
        query = (row % blocks * M)[:, None] + i  # [entries, M]
        key = (self.idx[entry].long() * self.unit)[:, None] + j  # [entries, N]
        keep = torch.ones(len(row), M, N, dtype=torch.bool, device=device)
        group = (row // blocks)[:, None].expand_as(query), query.clamp(max=max(self.sq - 1, 0))
        if self.hi is not None:
            keep &= key[:, None] < self._per_query(self.hi)[group][..., None]
        if self.lo is not None:
            keep &= (key[:, None] >= self._per_query(self.lo)[group][..., None]) | (key[:, None] < self.sink)
        if self.bits is not None:
            bit_id = self.bit_id[entry].long()
            words = self.bits[bit_id.clamp(min=0)] if len(self.bits) else self.bits.new_zeros(len(row), M, N // 32)
            bits = (words[..., None] >> torch.arange(32, device=device)) & 1
            keep &= bits.view(len(row), M, N).bool() | (bit_id < 0)[:, None, None]
        keep |= (number >= self._per_row(self.row_nmask)[row])[:, None, None]
        found = keep.nonzero(as_tuple=True)
        kept[row[found[0]], found[1], key[found[0], found[2]]] = True
        if self.col_ptr is not None:
            of_row, column = self._columns()
            kept[of_row, :, column] = True
        return kept.view(batches, heads, blocks * M, self.sk + N)[:, :, : self.sq, : self.sk].contiguous()

    def _per_query(self, bound: Tensor) -> Tensor:
        """lo or hi as [B' * Hm, sq]."""
        return bound.expand(*self.shape[:2], self.sq).reshape(-1, self.sq)

    @property
    def density(self) -> Density:
        """Kept tiles and kept tokens, as shares of the whole; see :class:`Density`. Builds the dense mask."""
        dense = self.to_dense()
        pairs = max(dense.numel(), 1)
        row, _, entry = self._entries()
        blocks = self.row_ptr.shape[2]
        queries = (self.sq - row % blocks * self.block_m).clamp(max=self.block_m)
        keys = (self.sk - self.idx[entry].long() * self.unit).clamp(max=self.block_n)
        listed = int((queries * keys).sum())
        if self.col_ptr is not None:
            row, _ = self._columns()
            listed += int((self.sq - row % blocks * self.block_m).clamp(max=self.block_m).sum())
        return Density(listed / pairs, int(dense.sum()) / pairs)

    def plot(self, batch: int = 0, head: int = 0, ax=None):
        """Draw one mask: full tiles, the kept pairs of partial tiles, columns, each in a colour of its own.

        Args:
            batch, head: which mask, below B' and Hm. ax: a matplotlib Axes; default a new figure.

        Returns:
            The Axes. ImportError without matplotlib.
        """
        from .plot import plot_layout

        return plot_layout(self, batch, head, ax)
