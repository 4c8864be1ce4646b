"""Family ``sparse``: products with a sparse matrix S [n, m] on a fixed random support in CSR form.

S is given by ``values`` [nnz], ``crow`` int32 [n + 1] and ``col`` [nnz], sorted and unique within a row; ``col`` is int16
when m <= 32768, else int32. Every op checks the indices in O(nnz) unless ``validate=False``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import check, define

_ops = torch.ops.slkernels


def _check_csr(op: str, values: Tensor | None, crow: Tensor, col: Tensor, n, m) -> None:
    check(crow.dim() == 1 and col.dim() == 1, op, lambda: "crow must be [n + 1] and col [nnz]")
    check(crow.shape[0] == n + 1, op, lambda: f"crow must be [{n + 1}], got {list(crow.shape)}")
    if values is not None:
        check(
            values.dim() == 1 and values.shape[0] == col.shape[0],
            op,
            lambda: f"values must be [{col.shape[0]}], got {list(values.shape)}",
        )


# ---- spmm -----------------------------------------------------------------------------------------------------------


def _spmm_fake(x, values, crow, col, n, validate=True):
    _check_csr("spmm", values, crow, col, n, x.shape[-1])
    return x.new_empty((*x.shape[:-1], n))


def _spmm_setup(ctx, inputs, output):
    x, values, crow, col, n, validate = inputs
    ctx.save_for_backward(x, values, crow, col)
    ctx.validate = False  # the forward has checked them


def _spmm_backward(ctx, dy):
    x, values, crow, col = ctx.saved_tensors
    need_x, need_values = ctx.needs_input_grad[:2]
    dx = _ops.spmm_t(dy, values, crow, col, x.shape[-1], False) if need_x else None
    dv = _ops.sddmm(dy, x, crow, col, False) if need_values else None
    return dx, dv, None, None, None, None


define(
    "spmm(Tensor x, Tensor values, Tensor crow, Tensor col, SymInt n, bool validate=True) -> Tensor",
    fake=_spmm_fake,
    setup_context=_spmm_setup,
    backward=_spmm_backward,
)

# ---- spmm_t ---------------------------------------------------------------------------------------------------------


def _spmm_t_fake(dy, values, crow, col, m, validate=True):
    _check_csr("spmm_t", values, crow, col, dy.shape[-1], m)
    return dy.new_empty((*dy.shape[:-1], m))


def _spmm_t_setup(ctx, inputs, output):
    dy, values, crow, col, m, validate = inputs
    ctx.save_for_backward(dy, values, crow, col)


def _spmm_t_backward(ctx, g):
    dy, values, crow, col = ctx.saved_tensors
    need_dy, need_values = ctx.needs_input_grad[:2]
    ddy = _ops.spmm(g, values, crow, col, dy.shape[-1], False) if need_dy else None
    dv = _ops.sddmm(dy, g, crow, col, False) if need_values else None
    return ddy, dv, None, None, None, None


define(
    "spmm_t(Tensor dy, Tensor values, Tensor crow, Tensor col, SymInt m, bool validate=True) -> Tensor",
    fake=_spmm_t_fake,
    setup_context=_spmm_t_setup,
    backward=_spmm_t_backward,
)

# ---- sddmm ----------------------------------------------------------------------------------------------------------


def _sddmm_fake(dy, x, crow, col, validate=True):
    _check_csr("sddmm", None, crow, col, dy.shape[-1], x.shape[-1])
    return x.new_empty((col.shape[0],))


def _sddmm_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])


def _sddmm_backward(ctx, g):
    dy, x, crow, col = ctx.saved_tensors
    need_dy, need_x = ctx.needs_input_grad[:2]
    ddy = _ops.spmm(x, g, crow, col, dy.shape[-1], False) if need_dy else None
    dx = _ops.spmm_t(dy, g, crow, col, x.shape[-1], False) if need_x else None
    return ddy, dx, None, None, None


define(
    "sddmm(Tensor dy, Tensor x, Tensor crow, Tensor col, bool validate=True) -> Tensor",
    fake=_sddmm_fake,
    setup_context=_sddmm_setup,
    backward=_sddmm_backward,
)

define(
    "check_support(Tensor crow, Tensor col, SymInt n, SymInt m) -> ()",
    fake=lambda crow, col, n, m: _check_csr("check_support", None, crow, col, n, m),
)

# ---- wrappers -------------------------------------------------------------------------------------------------------


def spmm(x: Tensor, values: Tensor, crow: Tensor, col: Tensor, n: int, validate: bool = True) -> Tensor:
    """y = x S^T (SLTrain, arXiv 2406.02214, section 3).

    Args:
        x: [..., m], float32, bfloat16, float16 or float64; all leading dimensions are tokens. Rows may be strided.
        values: [nnz], x's dtype.
        crow, col: the support of S [n, m]; see the module's docstring.
        n: rows of S.
        validate: check the indices first, O(nnz).

    Returns:
        [..., n], x's dtype; sums are in float32 (float64 for float64 inputs).

    Raises:
        RuntimeError: shapes or dtypes that do not fit; with ``validate``, the position of the first bad index.
    """
    return _ops.spmm(x, values, crow, col, n, validate)


def spmm_t(dy: Tensor, values: Tensor, crow: Tensor, col: Tensor, m: int, validate: bool = True) -> Tensor:
    """dx = dy S: the gradient of :func:`spmm` with respect to x.

    Args:
        dy: [..., n]; values, crow, col, validate: as in :func:`spmm`.
        m: columns of S.

    Returns:
        [..., m], dy's dtype. S is transposed on the fly, O(nnz) time and 6 to 8 bytes a nonzero.

    Raises:
        RuntimeError: as :func:`spmm`.
    """
    return _ops.spmm_t(dy, values, crow, col, m, validate)


def sddmm(dy: Tensor, x: Tensor, crow: Tensor, col: Tensor, validate: bool = True) -> Tensor:
    """dv = (dy^T x) at the support: the gradient of :func:`spmm` with respect to values, without the dense dW.

    Args:
        dy: [..., n]; x: [..., m], the same tokens and dtype; crow, col, validate: as in :func:`spmm`.

    Returns:
        [nnz], x's dtype; sums over tokens are in float32, in an order that does not depend on the thread count.

    Raises:
        RuntimeError: as :func:`spmm`.
    """
    return _ops.sddmm(dy, x, crow, col, validate)


def check_support(crow: Tensor, col: Tensor, n: int, m: int) -> None:
    """Raise RuntimeError with the position of the first fault if (crow, col) is not a support of an [n, m] matrix:
    crow int32 [n + 1] from 0 to nnz without decreasing; col int16 (m <= 32768) or int32, in range, sorted, unique."""
    _ops.check_support(crow, col, n, m)
