"""Family ``block8``: products with a matrix S [n, m] made of 8x8 blocks at random places.

S is given by ``values`` [blocks, 8, 8], row-major within a block, and the CSR of its blocks over the grid of
ceil(n / 8) by ceil(m / 8): ``crow`` int32 [ceil(n / 8) + 1] and ``col`` [blocks], sorted and unique within a row, int16
for up to 32768 columns of blocks, else int32: what :func:`slkernels.random_blocks8` returns. The right and the bottom
edge may cut blocks; entries beyond S must be finite, take no part in any product, and have gradient zero.

At 1 to 10 % a support of single entries gives the tensor cores nothing to do: a product spends a load of x on every
entry. A block uses it for 8. On
CUDA the ops take bfloat16 and float16 (``mma.sync``, compute capability 8.0 and newer). Every op checks the indices
unless ``validate=False``, as in :mod:`slkernels.sparse`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import check, define

_ops = torch.ops.slkernels


def _check_blocks(op: str, values: Tensor | None, crow: Tensor, col: Tensor, n) -> None:
    rows = (n + 7) // 8
    check(crow.dim() == 1 and col.dim() == 1, op, lambda: "crow must be [block rows + 1] and col [blocks]")
    check(crow.shape[0] == rows + 1, op, lambda: f"crow must be [{rows + 1}], got {list(crow.shape)}")
    if values is not None:
        want = (col.shape[0], 8, 8)
        check(values.shape == want, op, lambda: f"values must be {list(want)}, got {list(values.shape)}")


# ---- block8_spmm -----------------------------------------------------------------------------------------------------


def _spmm_fake(x, values, crow, col, n, validate=True):
    _check_blocks("block8_spmm", values, crow, col, n)
    return x.new_empty((*x.shape[:-1], n))


def _save_four(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])


def _spmm_backward(ctx, dy):
    x, values, crow, col = ctx.saved_tensors
    need_x, need_values = ctx.needs_input_grad[:2]
    dx = _ops.block8_spmm_t(dy, values, crow, col, x.shape[-1], False) if need_x else None
    dv = _ops.block8_sddmm(dy, x, crow, col, False) if need_values else None
    return dx, dv, None, None, None, None


define(
    "block8_spmm(Tensor x, Tensor values, Tensor crow, Tensor col, SymInt n, bool validate=True) -> Tensor",
    fake=_spmm_fake,
    setup_context=_save_four,
    backward=_spmm_backward,
)

# ---- block8_spmm_t ---------------------------------------------------------------------------------------------------


def _spmm_t_fake(dy, values, crow, col, m, validate=True):
    _check_blocks("block8_spmm_t", values, crow, col, dy.shape[-1])
    return dy.new_empty((*dy.shape[:-1], m))


def _spmm_t_backward(ctx, g):
    dy, values, crow, col = ctx.saved_tensors
    need_dy, need_values = ctx.needs_input_grad[:2]
    ddy = _ops.block8_spmm(g, values, crow, col, dy.shape[-1], False) if need_dy else None
    dv = _ops.block8_sddmm(dy, g, crow, col, False) if need_values else None
    return ddy, dv, None, None, None, None


define(
    "block8_spmm_t(Tensor dy, Tensor values, Tensor crow, Tensor col, SymInt m, bool validate=True) -> Tensor",
    fake=_spmm_t_fake,
    setup_context=_save_four,
    backward=_spmm_t_backward,
)

# ---- block8_sddmm ----------------------------------------------------------------------------------------------------


def _sddmm_fake(dy, x, crow, col, validate=True):
    _check_blocks("block8_sddmm", None, crow, col, dy.shape[-1])
    return x.new_empty((col.shape[0], 8, 8))


def _sddmm_backward(ctx, g):
    dy, x, crow, col = ctx.saved_tensors
    need_dy, need_x = ctx.needs_input_grad[:2]
    ddy = _ops.block8_spmm(x, g, crow, col, dy.shape[-1], False) if need_dy else None
    dx = _ops.block8_spmm_t(dy, g, crow, col, x.shape[-1], False) if need_x else None
    return ddy, dx, None, None, None


define(
    "block8_sddmm(Tensor dy, Tensor x, Tensor crow, Tensor col, bool validate=True) -> Tensor",
    fake=_sddmm_fake,
    setup_context=_save_four,
    backward=_sddmm_backward,
)


def block8_spmm(x: Tensor, values: Tensor, crow: Tensor, col: Tensor, n: int, validate: bool = True) -> Tensor:
    """y = x S^T.

    Args:
        x: [..., m], float32, bfloat16, float16 or float64 (CUDA: bfloat16 or float16); all leading dimensions are
            tokens.
        values: [blocks, 8, 8], x's dtype. crow, col: the blocks of S [n, m]; see the module's docstring.
        n: rows of S.
        validate: check the indices first, O(blocks).

    Returns:
        [..., n], x's dtype; sums are in float32 (float64 for float64 inputs).

    Raises:
        RuntimeError: shapes or dtypes that do not fit; with ``validate``, the position of the first bad index.
    """
    return _ops.block8_spmm(x, values, crow, col, n, validate)


def block8_spmm_t(dy: Tensor, values: Tensor, crow: Tensor, col: Tensor, m: int, validate: bool = True) -> Tensor:
    """dx = dy S: the gradient of :func:`block8_spmm` with respect to x.

    Args:
        dy: [..., n]; values, crow, col, validate: as in :func:`block8_spmm`.
        m: columns of S.

    Returns:
        [..., m], dy's dtype. The list of blocks is transposed on the fly, 10 to 12 bytes a block; values stay in place.

    Raises:
        RuntimeError: as :func:`block8_spmm`.
    """
    return _ops.block8_spmm_t(dy, values, crow, col, m, validate)


def block8_sddmm(dy: Tensor, x: Tensor, crow: Tensor, col: Tensor, validate: bool = True) -> Tensor:
    """dv = (dy^T x) at the blocks: the gradient of :func:`block8_spmm` with respect to values, without the dense dW.

    Args:
        dy: [..., n]; x: [..., m], the same tokens and dtype; crow, col, validate: as in :func:`block8_spmm`.

    Returns:
        [blocks, 8, 8], x's dtype.

    Raises:
        RuntimeError: as :func:`block8_spmm`.
    """
    return _ops.block8_sddmm(dy, x, crow, col, validate)
