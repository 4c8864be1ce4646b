"""Family ``project``, quantized weights: asymmetric groups of 8 or 4 bits, updates through them, and a linear layer.

A matrix [n, m] is ``codes`` (uint8: [n, m] for 8 bits; [n, ceil(m / 2)] for 4, the even column in the high half),
``scale`` (float32) and ``zero`` (uint8), both [n, ceil(m / group)]: w = (code - zero) * scale. Groups are runs of a
row; a row's last one may be shorter. Q-GaLore: arXiv 2407.08296.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import check, define, needs_grad
from .project import ROUNDING, check_matrix, check_projection, check_rounding, check_shape

_ops = torch.ops.slkernels


def _groups(columns: int, group: int) -> int:
    return (columns + group - 1) // group


def _check_group(op: str, bits: int, group: int) -> None:
    check(bits in (4, 8), op, lambda: f"bits must be 4 or 8, got {bits}")
    check(
        16 <= group <= 4096 and group % 16 == 0,
        op,
        lambda: f"group must be a multiple of 16 from 16 to 4096, got {group}",
    )


def _check_quantized(op: str, codes: Tensor, scale: Tensor, zero: Tensor, columns: int, bits: int, group: int) -> None:
    _check_group(op, bits, group)
    lead = tuple(codes.shape[:-1])
    check_shape(op, "codes", codes, (*lead, columns if bits == 8 else (columns + 1) // 2))
    check_shape(op, "scale", scale, (*lead, _groups(columns, group)))
    check_shape(op, "zero", zero, (*lead, _groups(columns, group)))


# ---- quantize_group, dequantize_group -------------------------------------------------------------------------------


def _quantize_group_fake(w, bits=8, group=256, round_mode=0, rng=None):
    op = "quantize_group"
    check(w.dim() >= 1, op, lambda: "w must have at least one dimension")
    _check_group(op, bits, group)
    check_rounding(op, round_mode, rng)
    lead, m = w.shape[:-1], w.shape[-1]
    return (
        w.new_empty((*lead, m if bits == 8 else (m + 1) // 2), dtype=torch.uint8),
        w.new_empty((*lead, _groups(m, group)), dtype=torch.float32),
        w.new_empty((*lead, _groups(m, group)), dtype=torch.uint8),
    )


def _dequantize_group_fake(codes, scale, zero, columns=None, bits=8, group=256, dtype=None):
    op = "dequantize_group"
    check(codes.dim() >= 1, op, lambda: "codes must have at least one dimension")
    if columns is None:
        columns = codes.shape[-1] * (8 // bits)
    _check_quantized(op, codes, scale, zero, columns, bits, group)
    return codes.new_empty((*codes.shape[:-1], columns), dtype=dtype or torch.float32)


define(
    f"quantize_group(Tensor w, int bits=8, int group=256, {ROUNDING}) -> (Tensor, Tensor, Tensor)",
    fake=_quantize_group_fake,
)
define(
    "dequantize_group(Tensor codes, Tensor scale, Tensor zero, int? columns=None, int bits=8, int group=256, "
    "ScalarType? dtype=None) -> Tensor",
    fake=_dequantize_group_fake,
)


def quantize_group(
    w: Tensor, bits: int = 8, group: int = 256, round_mode: int = 0, rng: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero of w, group by group; the range of a group always includes 0:

        hi = max(w, 0), lo = min(w, 0);  scale = (hi - lo) / (2^bits - 1);  zero = round(-lo / scale)
        code = clamp(round(w / scale) + zero, 0, 2^bits - 1)

    Zero is stored exactly, and groups of one sign keep their accuracy: Q-GaLore's public quantizer clamps the zero
        point of
    such groups, and errs by half of the weight.

    Args:
        w: [..., m], float32, bfloat16 or float16.
        bits: 8, or 4 (two codes a byte). group: elements of a row that share a scale, a multiple of 16 up to 4096.
        round_mode: 0 rounds to nearest even; 1 stochastically: up with the probability of the fraction, so that the
            mean is w. rng: int64 [2], (seed, step), on w's device.

    Returns:
        codes: uint8 [..., m], or [..., ceil(m / 2)] for 4 bits. scale: float32 [..., ceil(m / group)]. zero: uint8, the
        same. A group of zeros has scale 0; one with a NaN or an infinity has scale NaN and codes 0.

    Raises:
        RuntimeError: shapes, dtypes or options that do not fit.
    """
    return _ops.quantize_group(w, bits, group, round_mode, rng)


def dequantize_group(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    columns: int | None = None,
    bits: int = 8,
    group: int = 256,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(code - zero) * scale, one float32 product, rounded to ``dtype`` (default float32): [..., columns].

    columns: m; needed for 4 bits and an odd m, else taken from codes. Other arguments as in :func:`quantize_group`.
    """
    return _ops.dequantize_group(codes, scale, zero, columns, bits, group, dtype)


# ---- project_back_add_q_ --------------------------------------------------------------------------------------------


def _project_back_add_q_fake(
    codes,
    scale,
    zero,
    N,
    lr,
    left=None,
    right=None,
    *,
    group=256,
    alpha=1.0,
    weight_decay=0.0,
    found_inf=None,
    round_mode=0,
    rng=None,
):
    op = "project_back_add_q_"
    check_matrix(op, "codes", codes)
    check_matrix(op, "N", N)
    check_projection(op, left, right)
    n, m = codes.shape
    _check_quantized(op, codes, scale, zero, m, 8, group)
    if left is not None:
        check_shape(op, "left", left, (n, N.shape[0]))
    if right is not None:
        check_shape(op, "right", right, (N.shape[1], m))
    check_rounding(op, round_mode, rng)


define(
    "project_back_add_q_(Tensor(a!) codes, Tensor(b!) scale, Tensor(c!) zero, Tensor N, Tensor lr, Tensor? left=None, "
    "Tensor? right=None, *, int group=256, float alpha=1.0, float weight_decay=0.0, Tensor? found_inf=None, "
    f"{ROUNDING}) -> ()",
    fake=_project_back_add_q_fake,
)


def project_back_add_q_(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    N: Tensor,
    lr: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
    *,
    group: int = 256,
    alpha: float = 1.0,
    weight_decay: float = 0.0,
    found_inf: Tensor | None = None,
    round_mode: int = 1,
    rng: Tensor | None = None,
) -> None:
    """:func:`slkernels.project_back_add_` on an 8-bit weight: dequantize, decay, add, quantize again, in one pass.

    W <- Q((1 - lr weight_decay) W - lr alpha left N right), with a fresh range for every group. Q-GaLore's weight
    update (arXiv 2407.08296, section 3.4), where stochastic rounding is what lets 8-bit weights follow small steps.

    Args:
        codes, scale, zero: of :func:`quantize_group` with 8 bits, codes [n, m], contiguous, changed in place.
        N, lr, left, right, alpha, weight_decay, found_inf: as in :func:`slkernels.project_back_add_`; N float32,
            bfloat16 or float16.
        round_mode: 1 (stochastic; the default here, where the op's is 0) or 0. rng: int64 [2], (seed, step).

    Raises:
        RuntimeError: shapes, dtypes or options that do not fit.
    """
    _ops.project_back_add_q_(
        codes,
        scale,
        zero,
        N,
        lr,
        left,
        right,
        group=group,
        alpha=alpha,
        weight_decay=weight_decay,
        found_inf=found_inf,
        round_mode=round_mode,
        rng=rng,
    )


# ---- w8a16_linear ---------------------------------------------------------------------------------------------------


def _w8a16_fake(x, codes, scale, zero, group=256, bias=None, carrier=None):
    op = "w8a16_linear"
    check_matrix(op, "codes", codes)
    n, m = codes.shape
    _check_quantized(op, codes, scale, zero, m, 8, group)
    check(x.dim() >= 1 and x.shape[-1] == m, op, lambda: f"x must be [tokens, {m}], got {list(x.shape)}")
    if bias is not None:
        check_shape(op, "bias", bias, (n,))
    if carrier is not None:
        check_shape(op, "carrier", carrier, (n, m))
    return x.new_empty((*x.shape[:-1], n))


def _w8a16_dx_fake(dy, codes, scale, zero, group):
    return dy.new_empty((*dy.shape[:-1], codes.shape[1]))


def _w8a16_setup(ctx, inputs, output):
    x, codes, scale, zero, group, _bias, carrier = inputs
    keep_x = carrier is not None and carrier.requires_grad
    ctx.save_for_backward(x if keep_x else None, codes, scale, zero)
    ctx.group = group


def _w8a16_backward(ctx, dy):
    x, codes, scale, zero = ctx.saved_tensors
    dx = _ops._w8a16_linear_dx(dy, codes, scale, zero, ctx.group) if needs_grad(ctx, 0) else None
    dbias = dy.sum_to_size(dy.shape[-1]) if needs_grad(ctx, 5) else None
    dcarrier = None
    if needs_grad(ctx, 6):
        n, m = codes.shape
        dcarrier = dy.reshape(-1, n).t() @ x.reshape(-1, m)
    return dx, None, None, None, None, dbias, dcarrier


define(
    "w8a16_linear(Tensor x, Tensor codes, Tensor scale, Tensor zero, int group=256, Tensor? bias=None, "
    "Tensor? carrier=None) -> Tensor",
    fake=_w8a16_fake,
    setup_context=_w8a16_setup,
    backward=_w8a16_backward,
)
define(
    "_w8a16_linear_dx(Tensor dy, Tensor codes, Tensor scale, Tensor zero, int group) -> Tensor",
    fake=_w8a16_dx_fake,
)


def grad_carrier(codes: Tensor, dtype: torch.dtype) -> torch.nn.Parameter:
    """A leaf of the weight's shape and one element of memory, whose ``.grad`` receives the weight's gradient.

    uint8 tensors cannot require gradients. The carrier can: give it to :func:`w8a16_linear`, register it as a
    parameter, and an optimizer finds the dense gradient in ``carrier.grad`` ([n, m], ``dtype``), hooks and accumulation
    included. Its values (zeros) are never read.
    """
    return torch.nn.Parameter(torch.zeros((), dtype=dtype, device=codes.device).expand(codes.shape))


def w8a16_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    group: int = 256,
    bias: Tensor | None = None,
    carrier: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias with an 8-bit W; backward dx = dy W, and dW = dy^T x for ``carrier``.

    W is never stored whole: a few tokens (8 on a CPU, 16 on a GPU) read the codes directly; for more,
    slices of W are dequantized for the dense library.

    Args:
        x: [..., m], float32, bfloat16, float16 (float64 on a CPU); W is rounded to x's dtype in the dense products.
        codes, scale, zero, group: of :func:`quantize_group` with 8 bits, codes [n, m].
        bias: [n], x's dtype. carrier: see :func:`grad_carrier`; without it, or frozen, x is not kept for backward.

    Returns:
        [..., n], x's dtype.

    Raises:
        RuntimeError: shapes, dtypes or options that do not fit.
    """
    return _ops.w8a16_linear(x, codes, scale, zero, group, bias, carrier)
