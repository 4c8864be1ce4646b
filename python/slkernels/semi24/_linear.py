"""Products with 2:4 weights, and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import check, define, needs_grad

_ops = torch.ops.slkernels

ACTIVATIONS = ("none", "relu", "silu", "gelu", "relu2")
LAYOUTS = ("plain", "sm80", "sm90")

# include/slkernels/semi24.h: rows and columns that W is padded to.
_PADDED_ROWS = {"plain": 1, "sm80": 32, "sm90": 64}
_PADDED_COLUMNS = {"plain": 4, "sm80": 64, "sm90": 128}


def _up(a: int, b: int) -> int:
    return (a + b - 1) // b * b


def values_shape(layout: str, n: int, m: int) -> tuple[int, int]:
    return _up(n, _PADDED_ROWS[layout]), _up(m, _PADDED_COLUMNS[layout]) // 2


def meta_shape(layout: str, n: int, m: int) -> tuple[int, ...]:
    rows, kept = values_shape(layout, n, m)
    return {"plain": (rows, (kept + 3) // 4), "sm80": (rows, kept // 8), "sm90": (rows * kept // 4,)}[layout]


def _check_linear(op, x, values, n, bias, activation, layout="plain"):
    check(activation in ACTIVATIONS, op, lambda: f"activation must be one of {ACTIVATIONS}, got {activation}")
    check(layout in LAYOUTS, op, lambda: f"layout must be one of {LAYOUTS}, got {layout}")
    want = values_shape(layout, n, x.shape[-1])
    check(
        values.dim() == 2 and values.shape[0] == want[0] and values.shape[1] == want[1],
        op,
        lambda: f"values must be {list(want)} for W [{n}, {x.shape[-1]}], got {list(values.shape)}",
    )
    if bias is not None:
        check(bias.dim() == 1 and bias.shape[0] == n, op, lambda: f"bias must be [{n}], got {list(bias.shape)}")


def _linear(op, x, values, meta, n, bias, activation, layout="plain"):
    _check_linear(op, x, values, n, bias, activation, layout)
    return x.new_empty((*x.shape[:-1], n))


def _activation_backward(activation, dy, y, pre_activation):
    """d act(z)/dz * dy; ``y`` is kept for relu, z is computed again for the others."""
    if activation == "none":
        return dy
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dy, y, 0)
    z = pre_activation()
    if activation == "silu":
        return torch.ops.aten.silu_backward(dy, z)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(dy, z)
    return dy * (2 * torch.relu(z))


# ---- linear24 -------------------------------------------------------------------------------------------------------


def _linear24_fake(x, values, meta, n, bias=None, activation="none"):
    return _linear("linear24", x, values, meta, n, bias, activation)


def _linear24_setup(ctx, inputs, output):
    x, values, meta, n, bias, activation = inputs
    ctx.save_for_backward(x, values, meta, bias, output if activation == "relu" else None)
    ctx.n, ctx.activation = n, activation


def _linear24_backward(ctx, dy):
    x, values, meta, bias, y = ctx.saved_tensors
    dz = _activation_backward(ctx.activation, dy, y, lambda: _ops.linear24(x, values, meta, ctx.n, bias))
    dx = _ops._linear24_dx(dz, values, meta, x.shape[-1]) if needs_grad(ctx, 0) else None
    dvalues = _ops.dw_compress24(dz, x, meta) if needs_grad(ctx, 1) else None
    dbias = dz.sum_to_size(dz.shape[-1]) if needs_grad(ctx, 4) else None
    return dx, dvalues, None, None, dbias, None


define(
    'linear24(Tensor x, Tensor values, Tensor meta, SymInt n, Tensor? bias=None, str activation="none") -> Tensor',
    fake=_linear24_fake,
    setup_context=_linear24_setup,
    backward=_linear24_backward,
)


def linear24(
    x: Tensor, values: Tensor, meta: Tensor, n: int, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """y = act(x W^T + bias) with W 2:4, compressed in layout plain.

    Differentiable in x, values (:func:`dw_compress24`) and bias. Backward keeps x, values and meta, and y for "relu";
    for "silu", "gelu" and "relu2" it computes x W^T + bias again. dx = dz W is taken from the same pack; training
    steps are cheaper with the transposed pack of :func:`linear24_train`.

    Args:
        x: [..., m], float32, bfloat16, float16, and on a CPU float64; all leading dimensions are tokens.
        values: [n, 2 ceil(m / 4)], x's dtype. meta: uint8 [n, ceil(ceil(m / 4) / 2)].
        n: rows of W. bias: [n], x's dtype.
        activation: "none", "relu", "silu", "gelu" (with erf) or "relu2" (max(z, 0)^2, arXiv 2109.08668).

    Returns:
        [..., n], x's dtype: sums in fp32 (fp64 for float64), rounded once.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, or an unknown activation.
    """
    return _ops.linear24(x, values, meta, n, bias, activation)


# ---- gradients ------------------------------------------------------------------------------------------------------


def _dx_fake(dy, values, meta, m):
    op = "_linear24_dx"
    want = values_shape("plain", dy.shape[-1], m)
    check(values.dim() == 2 and values.shape[1] == want[1], op, lambda: f"values must be {list(want)}")
    return dy.new_empty((*dy.shape[:-1], m))


def _dx_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])


def _dx_backward(ctx, ddx):
    dy, values, meta = ctx.saved_tensors
    ddy = _ops.linear24(ddx, values, meta, dy.shape[-1]) if needs_grad(ctx, 0) else None
    dvalues = _ops.dw_compress24(dy, ddx, meta) if needs_grad(ctx, 1) else None
    return ddy, dvalues, None, None


define(
    "_linear24_dx(Tensor dy, Tensor values, Tensor meta, SymInt m) -> Tensor",
    fake=_dx_fake,
    setup_context=_dx_setup,
    backward=_dx_backward,
)


def _dw_fake(dy, x, meta, layout="plain"):
    check(layout in LAYOUTS, "dw_compress24", lambda: f"layout must be one of {LAYOUTS}, got {layout}")
    return x.new_empty(values_shape(layout, dy.shape[-1], x.shape[-1]))


def _dw_setup(ctx, inputs, output):
    dy, x, meta, layout = inputs
    if layout != "plain":
        raise RuntimeError(f"slkernels::dw_compress24: layout {layout} has no gradient; plain has")
    ctx.save_for_backward(dy, x, meta)


def _dw_backward(ctx, ddvalues):
    dy, x, meta = ctx.saved_tensors
    ddy = _ops.linear24(x, ddvalues, meta, dy.shape[-1]) if needs_grad(ctx, 0) else None
    ddx = _ops._linear24_dx(dy, ddvalues, meta, x.shape[-1]) if needs_grad(ctx, 1) else None
    return ddy, ddx, None, None


define(
    'dw_compress24(Tensor dy, Tensor x, Tensor meta, str layout="plain") -> Tensor',
    fake=_dw_fake,
    setup_context=_dw_setup,
    backward=_dw_backward,
)


def dw_compress24(dy: Tensor, x: Tensor, meta: Tensor, layout: str = "plain") -> Tensor:
    """dvalues = (dy^T x) at the kept slots of a 2:4 pack; the dense dW is never stored.

    Args:
        dy: [..., n], x: [..., m], the same tokens and dtype.
        meta: of W [n, m] in ``layout``.

    Returns:
        As W's values in ``layout``, x's dtype; 0 at kept padding columns. Differentiable in dy and x (plain).

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, or an unknown layout.
    """
    return _ops.dw_compress24(dy, x, meta, layout)
