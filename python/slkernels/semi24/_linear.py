"""Products with 2:4 weights, and their gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._library import check, define, needs_grad
from ._pack import check_meta, check_packed, values_shape

_ops = torch.ops.slkernels

ACTIVATIONS = ("none", "relu", "silu", "gelu", "relu2")


def _check_linear(op, x, values, meta, n, bias, activation, layout="plain"):
    check(activation in ACTIVATIONS, op, lambda: f"activation must be one of {ACTIVATIONS}, got {activation}")
    check_packed(op, values, meta, n, x.shape[-1], layout)
    if bias is not None:
        check(bias.dim() == 1 and bias.shape[0] == n, op, lambda: f"bias must be [{n}], got {list(bias.shape)}")


def _linear(op, x, values, meta, n, bias, activation, layout="plain"):
    _check_linear(op, x, values, meta, n, bias, activation, layout)
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


# ---- linear24_packed ------------------------------------------------------------------------------------------------


def _packed_fake(x, values, meta, n, layout, bias=None, activation="none"):
    return _linear("linear24_packed", x, values, meta, n, bias, activation, layout)


def _packed_setup(ctx, inputs, output):
    raise RuntimeError("slkernels::linear24_packed: has no gradient; use linear24_train, or torch.no_grad()")


def _packed_backward(ctx, dy):
    raise AssertionError("linear24_packed raises in forward")


define(
    "linear24_packed(Tensor x, Tensor values, Tensor meta, SymInt n, str layout, Tensor? bias=None, "
    'str activation="none") -> Tensor',
    fake=_packed_fake,
    setup_context=_packed_setup,
    backward=_packed_backward,
)


def linear24_packed(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    n: int,
    layout: str,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """:func:`linear24` with W in the layout that the hardware reads; no gradient.

    Args:
        x: [..., m], bfloat16 or float16.
        values, meta: W [n, m] in ``layout``, "sm80" or "sm90" (include/slkernels/semi24.h). On a CPU they are converted
            to layout plain in every call. "plain" is :func:`linear24`.
        n, bias, activation: as there.

    Raises:
        RuntimeError: arguments that do not fit, or any that requires a gradient.
    """
    return _ops.linear24_packed(x, values, meta, n, layout, bias, activation)


# ---- linear24_train -------------------------------------------------------------------------------------------------


def _tokens(t: Tensor) -> Tensor:
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _train_fake(x, values, meta, values_t, meta_t, n, bias=None, activation="none", weight=None, layout="plain"):
    op, m = "linear24_train", x.shape[-1]
    y = _linear(op, x, values, meta, n, bias, activation, layout)
    check_packed(op, values_t, meta_t, m, n, layout)
    if weight is not None:
        check(
            weight.dim() == 2 and weight.shape[0] == n and weight.shape[1] == m,
            op,
            lambda: f"weight must be [{n}, {m}], got {list(weight.shape)}",
        )
    return y


def _train_setup(ctx, inputs, output):
    x, values, meta, values_t, meta_t, n, bias, activation, weight, layout = inputs
    again = activation not in ("none", "relu")
    y = output if activation == "relu" else None
    ctx.save_for_backward(x, values if again else None, meta, values_t, meta_t, bias if again else None, y)
    ctx.n, ctx.activation, ctx.layout = n, activation, layout
    ctx.weight_dtype = None if weight is None else weight.dtype


def _product(x, values, meta, n, layout, bias=None):
    if layout == "plain":
        return _ops.linear24(x, values, meta, n, bias)
    return _ops.linear24_packed(x, values, meta, n, layout, bias)


def _train_backward(ctx, dy):
    x, values, meta, values_t, meta_t, bias, y = ctx.saved_tensors
    dz = _activation_backward(ctx.activation, dy, y, lambda: _product(x, values, meta, ctx.n, ctx.layout, bias))
    dx = dvalues = dbias = dweight = None
    if needs_grad(ctx, 0):
        dx = _product(dz, values_t, meta_t, x.shape[-1], ctx.layout)
    if needs_grad(ctx, 1) and ctx.weight_dtype is None:
        dvalues = _ops.dw_compress24(dz, x, meta, ctx.layout)
    if needs_grad(ctx, 6):
        dbias = dz.sum_to_size(dz.shape[-1])
    if needs_grad(ctx, 8):
        dweight = (_tokens(dz).t() @ _tokens(x)).to(ctx.weight_dtype)
    return dx, dvalues, None, None, None, None, dbias, None, dweight, None


define(
    "linear24_train(Tensor x, Tensor values, Tensor meta, Tensor values_t, Tensor meta_t, SymInt n, Tensor? bias=None, "
    'str activation="none", Tensor? weight=None, str layout="plain") -> Tensor',
    fake=_train_fake,
    setup_context=_train_setup,
    backward=_train_backward,
)


def linear24_train(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    values_t: Tensor,
    meta_t: Tensor,
    n: int,
    bias: Tensor | None = None,
    activation: str = "none",
    weight: Tensor | None = None,
    layout: str = "plain",
) -> Tensor:
    """:func:`linear24` whose dx comes from the transposed pack: dx = dz W_t^T.

    The transposed pack is that of :func:`prune_compress24`: (W (*) mask)^T, pruned again by rows unless the mask is
    transposable. Then dx is not the exact gradient, but that of SLoPe's double-pruned backward (arXiv 2405.16325).

    Args:
        x: [..., m]. values, meta: W [n, m] in ``layout``. values_t, meta_t: W_t [m, n] in ``layout``.
        n, bias, activation: as in :func:`linear24`, and kept or computed again in backward as there.
        weight: [n, m], the dense parameter that W was pruned from, if it is to get the straight-through gradient dz^T x
            (in its own dtype); its elements are not read, and values get no gradient. Without it, values get
            :func:`dw_compress24`.
        layout: "plain", "sm80" or "sm90"; on a CPU the packed ones are converted to plain in every call.

    Returns:
        [..., n], x's dtype. values_t has no gradient.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, an unknown activation or layout.
    """
    return _ops.linear24_train(x, values, meta, values_t, meta_t, n, bias, activation, weight, layout)


# ---- gradients ------------------------------------------------------------------------------------------------------


def _dx_fake(dy, values, meta, m):
    check_packed("_linear24_dx", values, meta, dy.shape[-1], m, "plain")
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
    n, m = dy.shape[-1], x.shape[-1]
    check_meta("dw_compress24", meta, n, m, layout)
    return x.new_empty(values_shape(n, m, layout))


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
