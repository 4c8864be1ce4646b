"""Family ``lowrank``, products that share their input: q, k, v and gate, up. One product with the stacked A in place of
one each, forward (z = x A^T) and backward (dx = dz A, dA = dz^T x)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._library import check, define, needs_grad
from .lowrank import check_base, check_bias, count_tokens

_ops = torch.ops.slkernels


def _check_shared(op: str, x: Tensor, A: Tensor, B: Sequence[Tensor]) -> None:
    check(A.dim() == 2 and all(b.dim() == 2 for b in B), op, lambda: "A must be [sum of ranks, m], B [n, rank] each")
    check(x.shape[-1] == A.shape[1], op, lambda: f"x must be [tokens, {A.shape[1]}], got {list(x.shape)}")
    check(len(B) > 0 and A.shape[0] == sum(b.shape[1] for b in B), op, lambda: "A must have the sum of B's ranks")


# ---- lowrank_linear_multi --------------------------------------------------------------------------------------------


def _multi_fake(x, A, B, alpha=None, bias=None, base=None):
    op = "lowrank_linear_multi"
    _check_shared(op, x, A, B)
    for name, given in (("alpha", alpha), ("bias", bias), ("base", base)):
        check(not given or len(given) == len(B), op, lambda name=name: f"{name} must hold {len(B)}, one for each B")
    for i, b in enumerate(B):
        check_bias(op, bias[i] if bias else None, b.shape[0])
        check_base(op, base[i] if base else None, b.shape[0], A.shape[1])
    ys = [x.new_empty((*x.shape[:-1], b.shape[0])) for b in B]
    return ys, x.new_empty((count_tokens(x), A.shape[0]))


def _multi_setup(ctx, inputs, output):
    x, A, B, alpha, bias, base = inputs
    ctx.save_for_backward(x, A, output[1], *B, *(base or ()))
    ctx.count, ctx.alpha, ctx.has_bias = len(B), alpha, bool(bias)
    ctx.mark_non_differentiable(output[1])


def _multi_backward(ctx, dys, _dz):
    x, A, z, *rest = ctx.saved_tensors
    count = ctx.count
    B, base = rest[:count], rest[count:]

    def need_each(index: int) -> list[bool]:
        return list(ctx.needs_input_grad[index]) if needs_grad(ctx, index) else [False] * count

    need_b, need_bias, need_base = need_each(2), need_each(4) if ctx.has_bias else [], need_each(5) if base else []
    need = [needs_grad(ctx, 0), needs_grad(ctx, 1), any(need_b), any(need_base)]
    dx = da = None
    db, dbase = [], []
    if any(need):
        dx, da, db, dbase = _ops._lowrank_linear_multi_backward(dys, x, A, B, z, ctx.alpha, base or None, *need)
    grads = (
        dx if need[0] else None,
        da if need[1] else None,
        [db[i] if wanted else None for i, wanted in enumerate(need_b)],
        None,
        [dy.sum_to_size(dy.shape[-1]) if wanted else None for dy, wanted in zip(dys, need_bias, strict=False)] or None,
        [dbase[i] if wanted else None for i, wanted in enumerate(need_base)] or None,
    )
    return grads[: len(ctx.needs_input_grad)]  # as many as there were arguments: the dispatcher drops default ones


def _multi_backward_fake(dy, x, A, B, z, alpha, base, need_x, need_a, need_b, need_base):
    def like(tensors, need):
        return [x.new_empty(t.shape) for t in tensors] if need else []

    dx, da = (x.new_empty(t.shape if need else (0,)) for t, need in ((x, need_x), (A, need_a)))
    return dx, da, like(B, need_b), like(base or (), need_base)


_MULTI = "Tensor x, Tensor A, Tensor[] B, float[]? alpha=None, Tensor[]? bias=None, Tensor[]? base=None"

# The second result is z, without a gradient: an op in C++ that calls this one and drops z, as lowrank_linear does,
# would pass a list of tensors to torch_call_dispatcher, which fails (torch 2.13).
define(
    f"lowrank_linear_multi({_MULTI}) -> (Tensor[], Tensor)",
    fake=_multi_fake,
    setup_context=_multi_setup,
    backward=_multi_backward,
)
define(
    "_lowrank_linear_multi_backward(Tensor[] dy, Tensor x, Tensor A, Tensor[] B, Tensor z, float[]? alpha, "
    "Tensor[]? base, bool need_x, bool need_a, bool need_b, bool need_base) -> (Tensor, Tensor, Tensor[], Tensor[])",
    fake=_multi_backward_fake,
)


def lowrank_linear_multi(
    x: Tensor,
    A: Tensor,
    B: Sequence[Tensor],
    alpha: float | Sequence[float] | None = None,
    bias: Sequence[Tensor] | None = None,
    base: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """y_i = alpha_i (x A_i^T) B_i^T + x base_i^T + bias_i for layers that share x, such as q, k, v or gate, up.

    One product with all A_i, whose result each B_i reads its columns of; backward has one product for dx and one for dA
    (LoRAFusion and unsloth run one each: arXiv 2510.00206).

    Args:
        x: [..., m], float32, bfloat16, float16 or float64; all leading dimensions are tokens.
        A: [sum of r_i, m], the A_i below each other (``torch.cat`` once, or one parameter).
        B: [n_i, r_i] each; sizes and ranks may differ.
        alpha: one factor for all, or one for each; default 1.
        bias: [n_i] each. base: [n_i, m] each, dense weights, frozen or trained; each low-rank product is added to its
            base's as part of the dense library's product. All tensors of x's dtype.

    Returns:
        A [..., n_i] for each B, x's dtype. Backward keeps the inputs and z = x A^T [tokens, sum of r_i], which the op
        itself (``torch.ops.slkernels.lowrank_linear_multi``) returns beside them.

    Raises:
        RuntimeError: shapes, dtypes or lengths that do not fit.
    """
    factors = [float(alpha)] * len(B) if isinstance(alpha, (int, float)) else alpha
    return _ops.lowrank_linear_multi(x, A, B, factors, bias, base)[0]


# ---- lowrank_swiglu --------------------------------------------------------------------------------------------------


def _swiglu_fake(x, A, B_gate, B_up, alpha=1.0):
    op = "lowrank_swiglu"
    _check_shared(op, x, A, (B_gate, B_up))
    check(B_gate.shape[0] == B_up.shape[0], op, lambda: "B_gate and B_up must have the same rows")
    return x.new_empty((*x.shape[:-1], B_gate.shape[0])), x.new_empty((count_tokens(x), A.shape[0]))


def _swiglu_setup(ctx, inputs, output):
    *tensors, ctx.alpha = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _swiglu_backward(ctx, dh, _dz):
    wanted = [needs_grad(ctx, i) for i in range(4)]
    need = (wanted[0], wanted[1], wanted[2] or wanted[3])
    found = _ops._lowrank_swiglu_backward(dh, *ctx.saved_tensors, ctx.alpha, *need) if any(need) else [None] * 4
    return (*(g if w else None for g, w in zip(found, wanted, strict=True)), None)


def _swiglu_backward_fake(dh, x, A, B_gate, B_up, z, alpha, need_x, need_a, need_b):
    needs = ((need_x, x), (need_a, A), (need_b, B_gate), (need_b, B_up))
    return tuple(x.new_empty(t.shape if need else (0,)) for need, t in needs)


_SWIGLU = "Tensor x, Tensor A, Tensor B_gate, Tensor B_up, float alpha=1.0"

define(f"lowrank_swiglu({_SWIGLU}) -> Tensor", fake=None)
define(
    f"_lowrank_swiglu({_SWIGLU}) -> (Tensor, Tensor)",
    fake=_swiglu_fake,
    setup_context=_swiglu_setup,
    backward=_swiglu_backward,
)
define(
    "_lowrank_swiglu_backward(Tensor dh, Tensor x, Tensor A, Tensor B_gate, Tensor B_up, Tensor z, float alpha, "
    "bool need_x, bool need_a, bool need_b) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_swiglu_backward_fake,
)


def lowrank_swiglu(x: Tensor, A: Tensor, B_gate: Tensor, B_up: Tensor, alpha: float = 1.0) -> Tensor:
    """h = silu(gate) up with gate = alpha (x A_gate^T) B_gate^T and up = alpha (x A_up^T) B_up^T: the first half of a
    SwiGLU block (arXiv 2002.05202) of low-rank layers.

    One product with the stacked A; one pass joins the two products, forward and backward.

    Args:
        x: [..., m], float32, bfloat16, float16 or float64; all leading dimensions are tokens.
        A: [r_gate + r_up, m], A_gate above A_up. B_gate, B_up: [n, r_gate] and [n, r_up]. All of x's dtype.
        alpha: factor of both.

    Returns:
        h [..., n], x's dtype. Backward keeps the inputs and z = x A^T [tokens, r_gate + r_up], and computes gate and up
        again from z: 2 n (r_gate + r_up) FLOPs a token in place of 2 n numbers.

    Raises:
        RuntimeError: shapes or dtypes that do not fit.
    """
    return _ops.lowrank_swiglu(x, A, B_gate, B_up, alpha)
