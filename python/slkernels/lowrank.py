"""Family ``lowrank``: y = act(x A^T) * gate * alpha B^T + x base^T + bias. Products that share x: lowrank_shared.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import check, define, needs_grad

_ops = torch.ops.slkernels


def check_bias(op: str, bias: Tensor | None, n: int) -> None:
    check(bias is None or (bias.dim() == 1 and bias.shape[0] == n), op, lambda: f"bias must be [{n}]")


def check_base(op: str, base: Tensor | None, n: int, m: int) -> None:
    check(base is None or (base.dim() == 2 and base.shape == (n, m)), op, lambda: f"base must be [{n}, {m}]")


def count_tokens(x: Tensor) -> int:
    """Of x [..., m], as a product that stays symbolic."""
    tokens = 1
    for size in x.shape[:-1]:
        tokens = tokens * size
    return tokens


def check_factors(op: str, x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
    check(A.dim() == 2 and B.dim() == 2, op, lambda: "A must be [rank, m] and B [n, rank]")
    check(x.shape[-1] == A.shape[1], op, lambda: f"x must be [tokens, {A.shape[1]}], got {list(x.shape)}")
    check(A.shape[0] == B.shape[1], op, lambda: "A and B must have the same rank")
    check_bias(op, bias, B.shape[0])


def _forward_fake(x, A, B, alpha=1.0, gate=None, activation=0, bias=None, base=None):
    check_factors("lowrank_linear", x, A, B, bias)
    check_base("lowrank_linear", base, B.shape[0], A.shape[1])
    return x.new_empty((*x.shape[:-1], B.shape[0])), x.new_empty((count_tokens(x), A.shape[0]))


def _setup(ctx, inputs, output):
    x, A, B, alpha, gate, activation, _bias, base = inputs
    ctx.save_for_backward(x, A, B, output[1], gate, base)
    ctx.alpha, ctx.activation = alpha, activation
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dy, _dz):
    x, A, B, z, gate, base = ctx.saved_tensors
    need = [needs_grad(ctx, i) for i in (0, 1, 2, 4, 7)]
    grads = [None] * 5
    if any(need):
        found = _ops._lowrank_linear_backward(dy, x, A, B, z, ctx.alpha, gate, ctx.activation, base, *need)
        grads = [g if wanted else None for g, wanted in zip(found, need, strict=True)]
    dbias = dy.sum_to_size(dy.shape[-1]) if needs_grad(ctx, 6) else None
    return grads[0], grads[1], grads[2], None, grads[3], None, dbias, grads[4]


def _backward_fake(dy, x, A, B, z, alpha, gate, activation, base, need_x, need_a, need_b, need_gate, need_base):
    shapes = (x.shape, A.shape, B.shape, (A.shape[0],), (B.shape[0], A.shape[1]))
    needs = (need_x, need_a, need_b, need_gate, need_base)
    return tuple(x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


# The private ops take a number: of a string that C++ hands to the dispatcher, torch (2.10 to 2.14) leaves a copy.
_BY_NAME, _BY_NUMBER = 'str activation="none"', "int activation=0"
_ARGUMENTS = (
    f"Tensor x, Tensor A, Tensor B, float alpha=1.0, Tensor? gate=None, {_BY_NAME}, Tensor? bias=None, "
    "Tensor? base=None"
)

define(f"lowrank_linear({_ARGUMENTS}) -> Tensor", fake=None)
define(
    f"_lowrank_linear({_ARGUMENTS.replace(_BY_NAME, _BY_NUMBER)}) -> (Tensor, Tensor)",
    fake=_forward_fake,
    setup_context=_setup,
    backward=_backward,
)
define(
    "_lowrank_linear_backward(Tensor dy, Tensor x, Tensor A, Tensor B, Tensor z, float alpha, Tensor? gate, "
    "int activation, Tensor? base, bool need_x, bool need_a, bool need_b, bool need_gate, bool need_base) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
)


def lowrank_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    alpha: float = 1.0,
    gate: Tensor | None = None,
    activation: str = "none",
    bias: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """y = act(x A^T) * gate * alpha B^T + x base^T + bias: LoRA (arXiv 2106.09685), CoLA's activation between the
    factors (arXiv 2502.10940), SoRA's gate (arXiv 2311.11696), DyLoRA's nested ranks (arXiv 2210.07558).

    Args:
        x: [..., m], float32, bfloat16, float16 or float64; all leading dimensions are tokens.
        A, B: [rank, m] and [n, rank], any rank >= 1; row or column slices such as ``A[:b], B[:, :b]`` are not copied.
        alpha: factor. gate: [rank]. bias: [n]. All tensors of x's dtype.
        base: [n, m], a dense weight, frozen or trained. The low-rank product is added to its product as part of the
            dense library's product (beta = 1): no pass over y of its own.
        activation: "none", "relu", "silu" or "gelu" (with erf, as ``torch.nn.functional.gelu``'s default).

    Returns:
        [..., n], x's dtype. Backward keeps x, A, B, gate, base and z = x A^T [tokens, rank].

    Raises:
        RuntimeError: shapes or dtypes that do not fit, or an unknown activation.
    """
    return _ops.lowrank_linear(x, A, B, alpha, gate, activation, bias, base)
