"""Family ``sl``: the SLTrain layer, y = x W^T + bias with W = alpha B A + S."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import check, define, needs_grad
from .lowrank import check_factors

_ops = torch.ops.slkernels

PATHS = ("auto", "chain", "compose")


def _fake(x, A, B, values, crow, col, alpha, bias=None, path="auto", validate=True, weight=None):
    check_factors("sl_linear", x, A, B, bias)
    n = B.shape[0]
    check(crow.dim() == 1 and crow.shape[0] == n + 1, "sl_linear", lambda: f"crow must be [{n + 1}]")
    check(
        values.dim() == 1 and values.shape[0] == col.shape[0], "sl_linear", lambda: f"values must be [{col.shape[0]}]"
    )
    check(path in PATHS, "sl_linear", lambda: f"path must be auto, chain or compose, got {path}")
    check(weight is None or weight.shape == (n, A.shape[1]), "sl_linear", lambda: f"weight must be [{n}, {A.shape[1]}]")
    return x.new_empty((*x.shape[:-1], n))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6], inputs[10])  # x, A, B, values, crow, col, weight: the inputs and nothing else
    ctx.alpha, ctx.path = inputs[6], inputs[8]


def _backward(ctx, dy):
    need_x, need_values = needs_grad(ctx, 0), needs_grad(ctx, 3)
    need_factors = needs_grad(ctx, 1) or needs_grad(ctx, 2)
    dx = da = db = dv = None
    if need_x or need_factors or need_values:
        *tensors, weight = ctx.saved_tensors
        dx, da, db, dv = _ops._sl_linear_backward(
            dy, *tensors, ctx.alpha, ctx.path, weight, need_x, need_factors, need_values
        )
    return (
        dx if need_x else None,
        da if needs_grad(ctx, 1) else None,
        db if needs_grad(ctx, 2) else None,
        dv if need_values else None,
        None,
        None,
        None,
        dy.sum_to_size(dy.shape[-1]) if needs_grad(ctx, 7) else None,
        None,
        None,
        None,
    )


def _backward_fake(dy, x, A, B, values, crow, col, alpha, path, weight, need_x, need_factors, need_values):
    needs = ((need_x, x), (need_factors, A), (need_factors, B), (need_values, values))
    return tuple(x.new_empty(t.shape if need else (0,)) for need, t in needs)


define(
    "sl_linear(Tensor x, Tensor A, Tensor B, Tensor values, Tensor crow, Tensor col, float alpha, Tensor? bias=None, "
    'str path="auto", bool validate=True, Tensor? weight=None) -> Tensor',
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
)
define(
    "_sl_linear_backward(Tensor dy, Tensor x, Tensor A, Tensor B, Tensor values, Tensor crow, Tensor col, float alpha, "
    "str path, Tensor? weight, bool need_x, bool need_factors, bool need_values) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
)


def sl_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    alpha: float,
    bias: Tensor | None = None,
    path: str = "auto",
    validate: bool = True,
    weight: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias with W = alpha B A + S: the SLTrain layer (arXiv 2406.02214, equation 1 and algorithm 1).

    Args:
        x: [..., m], float32, bfloat16, float16 or float64; all leading dimensions are tokens.
        A, B: [rank, m] and [n, rank]. values: [nnz]. bias: [n]. All of x's dtype.
        crow, col: the support of S: int32 [n + 1] and int16 (m <= 32768) or int32 [nnz].
        alpha: factor of B A (SLTrain's alpha / rank).
        path: ``"chain"`` = alpha (x A^T) B^T + x S^T; ``"compose"`` = build W, one dense product, drop W; ``"auto"``
            picks by a cost model (docs/paths.md).
        validate: check the indices first, O(nnz).
        weight: W [n, m] as :func:`slkernels.compose` gives it from these A, B and values, for a caller who uses it more
            than once; what the compose path would build, forward and backward, is read from it. It is taken as given,
            and has no gradient: A, B and values have theirs. ``slkernels.nn.cached_weights`` keeps such a W.

    Returns:
        [..., n], x's dtype. Backward keeps the inputs only: neither W nor a scaled copy of A.

    Raises:
        RuntimeError: shapes or dtypes that do not fit; with ``validate``, the position of the first bad index.
    """
    return _ops.sl_linear(x, A, B, values, crow, col, alpha, bias, path, validate, weight)
