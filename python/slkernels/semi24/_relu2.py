"""2:4 activations: squared ReLU, pruned and packed both ways ("ELAS", arXiv 2605.03667)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import check, define
from ._pack import check_layout, new_packed

_ops = torch.ops.slkernels


def _relu2_fake(x, layout="plain"):
    op = "relu2_prune24"
    check(x.dim() == 2, op, lambda: f"x must be [tokens, m], got {list(x.shape)}")
    check_layout(op, layout, x)
    tokens, m = x.shape
    return *new_packed(x, tokens, m, layout), *new_packed(x, m, tokens, layout)


def _relu2_setup(ctx, inputs, output):
    values, meta, _values_t, meta_t = output
    ctx.save_for_backward(values, meta, meta_t)
    ctx.size, ctx.layout = tuple(inputs[0].shape), inputs[1] if len(inputs) > 1 else "plain"
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(meta, meta_t)


def _relu2_backward(ctx, dvalues, _dmeta, dvalues_t, _dmeta_t):
    values, meta, meta_t = ctx.saved_tensors
    tokens, m = ctx.size
    if dvalues_t is not None:  # to the slots of values: W_t's are among them, or hold a constant zero
        dense = _ops.decompress24(dvalues_t, meta_t, m, tokens, ctx.layout).t()
        mask = _ops.mask_of24(meta, tokens, m, ctx.layout)
        from_t = _ops.compress24(dense, mask, ctx.layout, False)[0]
        dvalues = from_t if dvalues is None else dvalues + from_t
    if dvalues is None:
        return None, None
    return _ops.decompress24(_ops.relu2_backward24(dvalues, values), meta, tokens, m, ctx.layout), None


def _relu2_backward24_fake(dvalues, values):
    check(
        dvalues.shape == values.shape,
        "relu2_backward24",
        lambda: f"dvalues must be {list(values.shape)}, got {list(dvalues.shape)}",
    )
    return values.new_empty(values.shape)


define(
    'relu2_prune24(Tensor x, str layout="plain") -> (Tensor, Tensor, Tensor, Tensor)',
    fake=_relu2_fake,
    setup_context=_relu2_setup,
    backward=_relu2_backward,
)
define("relu2_backward24(Tensor dvalues, Tensor values) -> Tensor", fake=_relu2_backward24_fake)


def relu2_prune24(x: Tensor, layout: str = "plain") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``prune_compress24(max(x, 0)^2, "row", layout=layout)`` in one pass over x: an activation for 2:4 products.

    Squared ReLU ("Primer", arXiv 2109.08668) leaves half of an activation at zero, so that two of four lose little;
    ELAS (arXiv 2605.03667) multiplies the result with sparse tensor cores, forward from ``values`` and for the next
    layer's weight gradient from ``values_t``. The backward keeps ``values`` and the metadata, not x: max(x, 0) is the
    root of a value. Where squares underflow, below 2^-63 in bfloat16 and float32 and below 2^-7 in float16, it loses
    digits; float16's squares overflow from 2^8 on.

    Args:
        x: [tokens, m], float32, bfloat16, float16, or float64 (on a CPU); bfloat16 or float16 for sm80 and sm90.
        layout: as in :func:`prune_compress24`.

    Returns:
        values, meta (of [tokens, m]), values_t, meta_t (of [m, tokens], pruned once more among what was kept), as
        :func:`prune_compress24` returns them. NaN ranks highest and stays NaN. The gradients of both values go to x.

    Raises:
        RuntimeError: shapes, dtypes or a layout that do not fit.
    """
    return _ops.relu2_prune24(x, layout)
