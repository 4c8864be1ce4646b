"""Supports for tests: random ones, and one for every way in which a support can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

Support = tuple[Tensor, Tensor]


def index_dtype(m: int) -> torch.dtype:
    return torch.int16 if m <= 32768 else torch.int32


def from_mask(mask: Tensor) -> Support:
    """(crow, col) of the nonzeros of a boolean [n, m] mask."""
    crow = torch.zeros(mask.shape[0] + 1, dtype=torch.int32)
    crow[1:] = mask.sum(1).cumsum(0)
    return crow, mask.nonzero()[:, 1].to(index_dtype(mask.shape[1])).contiguous()


def random(n: int, m: int, density: float, generator: torch.Generator) -> Support:
    """Every position with probability ``density``; some rows full and some empty when there are enough of them."""
    mask = torch.rand(n, m, generator=generator) < density
    if n >= 8 and 0 < density < 1:
        mask[n // 3] = False
        mask[n // 2] = True
        mask[-1] = False
    return from_mask(mask)


def from_rows(rows: list[list[int]], m: int) -> Support:
    crow = torch.tensor([0] + [len(r) for r in rows]).cumsum(0).to(torch.int32)
    return crow, torch.tensor([c for r in rows for c in r], dtype=index_dtype(m))


@st.composite
def shapes_and_supports(draw: st.DrawFn, max_size: int = 40) -> tuple[int, int, Support]:
    """(n, m, support) with rows of any fill, drawn row by row so that a failure shrinks to few nonzeros."""
    n = draw(st.integers(0, max_size))
    m = draw(st.integers(0, max_size))
    column = st.integers(0, max(m - 1, 0))
    row = st.sets(column, max_size=m).map(sorted) if m else st.just([])
    return n, m, from_rows(draw(st.lists(row, min_size=n, max_size=n)), m)


# ---- faults ---------------------------------------------------------------------------------------------------------
# All are faults of one support of a [5, 20] matrix.

FAULT_SHAPE = (5, 20)
_ROWS = [[1, 7, 19], [], [0, 2, 4, 18], [5], [3, 6]]


@dataclass(frozen=True)
class Fault:
    """A way to spoil a support, and what an op must say about it (after "slkernels::op: ")."""

    id: str
    spoil: Callable[[Tensor, Tensor], Support]
    message: str
    needs_validate: bool = True  # False: checked even with validate=False, because a kernel could not run at all

    def support(self) -> Support:
        crow, col = from_rows(_ROWS, FAULT_SHAPE[1])
        return self.spoil(crow, col)


def _set(which: int, position: int, value: int) -> Callable[[Tensor, Tensor], Support]:
    def spoil(*support: Tensor) -> Support:
        support[which][position] = value
        return support

    return spoil


def _crow(*starts: int) -> Callable[[Tensor, Tensor], Support]:
    return lambda crow, col: (torch.tensor(starts, dtype=torch.int32), col)


FAULTS = [
    Fault("crow_start", _set(0, 0, 1), "crow[0] must be 0, got 1"),
    Fault("crow_start_negative", _set(0, 0, -1), "crow[0] must be 0, got -1"),
    Fault("crow_end_short", _set(0, 5, 9), "crow[5] must be nnz = 10, got 9"),
    Fault("crow_end_long", _set(0, 5, 11), "crow[5] must be nnz = 10, got 11"),
    Fault("crow_decreasing", _crow(0, 3, 2, 7, 8, 10), "crow decreases at position 2 (2)"),
    Fault("crow_negative", _crow(0, -2, 3, 7, 8, 10), "crow decreases at position 1 (-2)"),
    Fault("crow_beyond_nnz", _crow(0, 3, 2**31 - 1, 7, 8, 10), "crow decreases at position 3 (7)"),
    Fault("crow_empty_row_beyond_nnz", _crow(0, 99, 99, 99, 99, 99), "crow[5] must be nnz = 10, got 99"),
    Fault("col_negative_first", _set(1, 0, -1), "col[0] = -1 in row 0 is out of range [0, 20)"),
    Fault("col_negative_inner", _set(1, 5, -3), "col[5] = -3 in row 2 is out of range [0, 20)"),
    Fault("col_m", _set(1, 9, 20), "col[9] = 20 in row 4 is out of range [0, 20)"),
    Fault("col_huge", _set(1, 6, 32767), "col[6] = 32767 in row 2 is out of range [0, 20)"),
    Fault("col_huge_inner", _set(1, 1, 32767), "col[1] = 32767 in row 0 is out of range [0, 20)"),
    Fault("col_unsorted", _set(1, 5, 1), "col[5] = 1 in row 2 is smaller than the one before it (unsorted)"),
    Fault("col_duplicate", _set(1, 9, 3), "col[9] = 3 in row 4 is a duplicate"),
    Fault("col_int32_range", lambda r, c: _set(1, 7, 1 << 20)(r, c.int()), "col[7] = 1048576 in row 3 is out of range"),
    Fault("first_of_two", lambda r, c: _set(1, 1, 0)(*_set(1, 9, 3)(r, c)), "col[1] = 0 in row 0 is smaller than"),
    Fault("crow_int64", lambda r, c: (r.long(), c), "crow must be int32, got int64", False),
    Fault("col_int64", lambda r, c: (r, c.long()), "col must be int16 for 20 columns, got int64", False),
    Fault("col_uint8", lambda r, c: (r, c.to(torch.uint8)), "col must be int16 for 20 columns, got uint8", False),
    Fault("crow_length", lambda r, c: (r[:-1].clone(), c), "crow must be [6], got [5]", False),
    Fault("crow_2d", lambda r, c: (r[None], c), "crow must be [6], got [1, 6]", False),
    Fault("col_2d", lambda r, c: (r, c[None]), "col must be [nnz], got [1, 10]", False),
    Fault("crow_strided", lambda r, c: (r.repeat_interleave(2)[::2], c), "crow and col must be contiguous", False),
    Fault("col_strided", lambda r, c: (r, c.repeat_interleave(2)[::2]), "crow and col must be contiguous", False),
]
