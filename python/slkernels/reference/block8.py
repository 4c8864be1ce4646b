"""Definition of the ``block8`` family."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

_SIDE = 8


def _block_rows(crow: Tensor) -> Tensor:
    counts = crow.diff().long()
    return counts.new_tensor(range(len(counts))).repeat_interleave(counts)


def _grid(crow: Tensor, m: int) -> tuple[int, int]:
    return crow.shape[0] - 1, (m + _SIDE - 1) // _SIDE


def block8_to_dense(values: Tensor, crow: Tensor, col: Tensor, n: int, m: int) -> Tensor:
    """S [n, m] from values [blocks, 8, 8] and the CSR of its blocks; what lies beyond n or m is cut off."""
    rows, columns = _grid(crow, m)
    blocks = values.new_zeros(rows, columns, _SIDE, _SIDE)
    blocks = blocks.index_put((_block_rows(crow), col.long()), values)
    return blocks.transpose(1, 2).reshape(rows * _SIDE, columns * _SIDE)[:n, :m]


def block8_spmm(x: Tensor, values: Tensor, crow: Tensor, col: Tensor, n: int, validate: bool = True) -> Tensor:
    """y [..., n] = x S^T."""
    return F.linear(x, block8_to_dense(values, crow, col, n, x.shape[-1]))


def block8_spmm_t(dy: Tensor, values: Tensor, crow: Tensor, col: Tensor, m: int, validate: bool = True) -> Tensor:
    """dx [..., m] = dy S."""
    return dy @ block8_to_dense(values, crow, col, dy.shape[-1], m)


def block8_sddmm(dy: Tensor, x: Tensor, crow: Tensor, col: Tensor, validate: bool = True) -> Tensor:
    """dv [blocks, 8, 8] = (dy^T x) at the blocks, 0 beyond n or m."""
    n, m = dy.shape[-1], x.shape[-1]
    rows, columns = _grid(crow, m)
    tokens = math.prod(x.shape[:-1])
    dw = dy.reshape(tokens, n).t() @ x.reshape(tokens, m)
    dw = F.pad(dw, (0, columns * _SIDE - m, 0, rows * _SIDE - n))
    return dw.view(rows, _SIDE, columns, _SIDE).transpose(1, 2)[_block_rows(crow), col.long()]
