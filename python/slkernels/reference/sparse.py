"""Definitions of the ``sparse`` family: S [n, m] is dense here, and every product is a dense product.

Shapes, dtypes and errors are those of the ops of the same names in :mod:`slkernels.sparse`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _tokens(x: Tensor) -> Tensor:
    """x [..., features] as [tokens, features]."""
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def support_rows(crow: Tensor) -> Tensor:
    """The row of every nonzero, int64 [nnz]."""
    rows = torch.arange(crow.numel() - 1, device=crow.device)
    return torch.repeat_interleave(rows, crow.diff().long())


def to_dense(values: Tensor, crow: Tensor, col: Tensor, m: int) -> Tensor:
    """S [n, m] in values' dtype."""
    zeros = values.new_zeros(crow.numel() - 1, m)
    return zeros.index_put((support_rows(crow), col.long()), values)


def check_support(crow: Tensor, col: Tensor, n: int, m: int, op: str = "check_support") -> None:
    """Raises RuntimeError, with the words of the op, for the first fault in this order: dtypes and shapes; crow[0];
    the first decrease of crow; crow[n]; then row by row the first column that is out of range, smaller than or equal to
    the one before it."""

    def require(ok: bool, message: str) -> None:
        if not ok:
            raise RuntimeError(f"slkernels::{op}: {message}")

    index = torch.int16 if m <= 32768 else torch.int32
    name = {torch.int8: "int8", torch.uint8: "uint8", torch.int16: "int16", torch.int32: "int32", torch.int64: "int64"}
    require(n >= 0 and m >= 0, f"n and m must not be negative, got {n} and {m}")
    require(crow.dim() == 1 and crow.numel() == n + 1, f"crow must be [{n + 1}], got {list(crow.shape)}")
    require(crow.dtype == torch.int32, f"crow must be int32, got {name.get(crow.dtype, 'another dtype')}")
    require(col.dim() == 1, f"col must be [nnz], got {list(col.shape)}")
    require(
        col.dtype in (index, torch.int32),
        f"col must be {name[index]} for {m} columns, got {name.get(col.dtype, 'another dtype')}",
    )
    starts, columns, nnz = crow.tolist(), col.tolist(), col.numel()
    require(starts[0] == 0, f"crow[0] must be 0, got {starts[0]}")
    for i in range(n):
        require(starts[i + 1] >= starts[i], f"crow decreases at position {i + 1} ({starts[i + 1]})")
    require(starts[n] == nnz, f"crow[{n}] must be nnz = {nnz}, got {starts[n]}")
    for i in range(n):
        for k in range(starts[i], starts[i + 1]):
            where = f"col[{k}] = {columns[k]} in row {i}"
            require(0 <= columns[k] < m, f"{where} is out of range [0, {m})")
            if k > starts[i]:
                require(columns[k] >= columns[k - 1], f"{where} is smaller than the one before it (unsorted)")
                require(columns[k] != columns[k - 1], f"{where} is a duplicate")


def spmm(x: Tensor, values: Tensor, crow: Tensor, col: Tensor, n: int, validate: bool = True) -> Tensor:
    """y [..., n] = x [..., m] S^T."""
    if validate:
        check_support(crow, col, n, x.shape[-1], "spmm")
    return F.linear(x, to_dense(values, crow, col, x.shape[-1]))


def spmm_t(dy: Tensor, values: Tensor, crow: Tensor, col: Tensor, m: int, validate: bool = True) -> Tensor:
    """dx [..., m] = dy [..., n] S."""
    if validate:
        check_support(crow, col, dy.shape[-1], m, "spmm_t")
    return F.linear(dy, to_dense(values, crow, col, m).t())


def sddmm(dy: Tensor, x: Tensor, crow: Tensor, col: Tensor, validate: bool = True) -> Tensor:
    """dv [nnz] = dy^T x at the support."""
    if validate:
        check_support(crow, col, dy.shape[-1], x.shape[-1], "sddmm")
    return (_tokens(dy).t() @ _tokens(x))[support_rows(crow), col.long()]


def gather_support(w: Tensor, crow: Tensor, col: Tensor, validate: bool = True) -> Tensor:
    """values [nnz] = w [n, m] at the support."""
    if validate:
        check_support(crow, col, *w.shape, "gather_support")
    return w[support_rows(crow), col.long()]


def compose(
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    m: int,
    A: Tensor | None = None,
    B: Tensor | None = None,
    alpha: float = 1.0,
    base: Tensor | None = None,
    validate: bool = True,
) -> Tensor:
    """W [n, m] = alpha B A + S + base (SLTrain, arXiv 2406.02214, equation 1)."""
    if validate:
        check_support(crow, col, crow.numel() - 1, m, "compose")
    W = to_dense(values, crow, col, m)
    if A is not None and B is not None:
        W = W + alpha * (B @ A)
    return W if base is None else W + base
