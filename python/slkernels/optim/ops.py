"""Family ``optim``: block-wise quantization of optimizer state, and the fused multi-tensor AdamW step on it.

A tensor's state is ``codes`` (uint8, the tensor's shape) and ``scale`` (float32, one per block of ``block`` elements of
the flattened tensor; the last block may be shorter): value = map[code] * scale. Codec ``dyn8`` is bitsandbytes' signed
dynamic map (256 values in [-0.993, 1], code 127 is 0), ``dyn8u`` its unsigned one (256 values in [0, 1], code 0 is 0),
bit for bit: "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._library import check, define

_ops = torch.ops.slkernels

_MULTIPLE, _MAX_BLOCK = 16, 4096
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _check_block(op: str, block: int) -> None:
    check(
        _MULTIPLE <= block <= _MAX_BLOCK and block % _MULTIPLE == 0,
        op,
        lambda: f"block must be a multiple of {_MULTIPLE} from {_MULTIPLE} to {_MAX_BLOCK}, got {block}",
    )


def _check_codec(op: str, codec: str) -> None:
    check(codec in ("dyn8", "dyn8u"), op, lambda: f"codec must be 'dyn8' or 'dyn8u', got '{codec}'")


def _check_float(op: str, name: str, dtype: torch.dtype) -> None:
    check(dtype in _FLOATS, op, lambda: f"{name} must be float32, bfloat16 or float16, got {dtype}")


# ---- quantize_block, dequantize_block -------------------------------------------------------------------------------


def _quantize_block_fake(x, codec="dyn8", block=256):
    _check_codec("quantize_block", codec)
    _check_block("quantize_block", block)
    _check_float("quantize_block", "x", x.dtype)
    codes = x.new_empty(x.shape, dtype=torch.uint8)
    return codes, x.new_empty(((x.numel() + block - 1) // block,), dtype=torch.float32)


def _dequantize_block_fake(codes, scale, codec="dyn8", block=256, dtype=None):
    op = "dequantize_block"
    _check_codec(op, codec)
    _check_block(op, block)
    _check_float(op, "dtype", dtype or torch.float32)
    blocks = (codes.numel() + block - 1) // block
    check(scale.dim() == 1 and scale.shape[0] == blocks, op, lambda: f"scale must be [{blocks}]")
    return codes.new_empty(codes.shape, dtype=dtype or torch.float32)


define(
    "quantize_block(Tensor x, str codec='dyn8', int block=256) -> (Tensor, Tensor)",
    fake=_quantize_block_fake,
)
define(
    "dequantize_block(Tensor codes, Tensor scale, str codec='dyn8', int block=256, ScalarType? dtype=None) -> Tensor",
    fake=_dequantize_block_fake,
)


def quantize_block(x: Tensor, codec: str = "dyn8", block: int = 256) -> tuple[Tensor, Tensor]:
    """Quantize ``x`` to 8 bits block by block: scale = max |x| of the block, code = nearest of the map to x / scale.

    Nearest is exact: of the map's float32 values to the float32 quotient x / scale, ties to the smaller magnitude. Zero
    has a code of its own, so it stays exactly zero.

    Args:
        x: any shape, float32, bfloat16 or float16; a copy is made if it is not contiguous.
        codec: ``"dyn8"`` (signed), or ``"dyn8u"`` (unsigned: negative values count as 0).
        block: elements per scale, a multiple of 16 up to 4096.

    Returns:
        codes: uint8, x's shape. scale: float32 [ceil(x.numel() / block)]. A block of zeros has scale 0; a block with a
        NaN or an infinity has scale NaN, so that all of it dequantizes to NaN instead of to plausible numbers.

    Raises:
        RuntimeError: another dtype, codec or block size.
    """
    return _ops.quantize_block(x, codec, block)


def dequantize_block(
    codes: Tensor, scale: Tensor, codec: str = "dyn8", block: int = 256, dtype: torch.dtype | None = None
) -> Tensor:
    """The values that :func:`quantize_block` stored: map[codes] * scale, one float32 product, rounded to ``dtype``.

    Args:
        codes: uint8, any shape. scale: float32 [ceil(codes.numel() / block)]. codec, block: as they were quantized.
        dtype: float32 (default), bfloat16 or float16.

    Returns:
        codes' shape, ``dtype``.

    Raises:
        RuntimeError: shapes, dtypes, codec or block size that do not fit.
    """
    return _ops.dequantize_block(codes, scale, codec, block, dtype)


# ---- adam_q_ --------------------------------------------------------------------------------------------------------


def _adam_q_fake(
    params,
    grads,
    m,
    m_scale,
    v,
    v_scale,
    master_lo,
    step,
    lr,
    *,
    beta1,
    beta2,
    eps,
    weight_decay,
    decoupled=True,
    codec="dyn8",
    block=256,
    grad_scale=None,
    found_inf=None,
    round_mode=0,
    rng=None,
):
    _check_block("adam_q_", block)
    for name, tensors in (("grads", grads), ("m", m), ("m_scale", m_scale), ("v", v), ("v_scale", v_scale)):
        check(
            len(tensors) == len(params),
            "adam_q_",
            lambda name=name, tensors=tensors: (
                f"{name} must have as many tensors as params, {len(params)}, got {len(tensors)}"
            ),
        )


define(
    "adam_q_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] m, Tensor(c!)[] m_scale, Tensor(d!)[] v, "
    "Tensor(e!)[] v_scale, Tensor(f!)[] master_lo, Tensor step, Tensor lr, *, float beta1, float beta2, float eps, "
    "float weight_decay, bool decoupled=True, str codec='dyn8', int block=256, Tensor? grad_scale=None, "
    "Tensor? found_inf=None, int round_mode=0, Tensor? rng=None) -> ()",
    fake=_adam_q_fake,
)


def adam_q_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    m: Sequence[Tensor],
    m_scale: Sequence[Tensor],
    v: Sequence[Tensor],
    v_scale: Sequence[Tensor],
    master_lo: Sequence[Tensor],
    step: Tensor,
    lr: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool = True,
    codec: str = "dyn8",
    block: int = 256,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    round_mode: int = 0,
    rng: Tensor | None = None,
) -> None:
    """One Adam(W) step on a list of tensors, in place and in one pass: decode m and v, step in float32, encode again.

    The formula and the order are ``torch.optim.AdamW``'s (decay before the update; Loshchilov and Hutter, arXiv
    1711.05101) or, with ``decoupled=False``, ``torch.optim.Adam``'s L2 term. The update uses m and v before they are
    quantized; p is rounded once, to nearest even. There is no sign correction of m's code (bitsandbytes' GPU kernel has
    one, its CPU code none): m takes the nearest code, zero included.

    A gradient element that is NaN or infinite, or whose square overflows: its m and v keep their old values, and so do
    the scale and the other elements of its block; its p follows the formula (NaN for NaN and infinity, as in torch).

    Args:
        params: contiguous float32, bfloat16 or float16, distinct storage. Call under ``torch.no_grad()``.
        grads: the same shapes and dtypes; a copy is made of one that is not contiguous. Not modified.
        m, v: per tensor either uint8 codes (``dyn8`` and ``dyn8u``) or float32, contiguous, the parameter's numel.
        m_scale, v_scale: float32 [ceil(numel / block)], or empty where m and v are float32.
        master_lo: not supported yet: an empty list.
        step: float32, one element: the number of this step, from 1. lr: float32, one element. Read in C++.
        block: elements per scale, a multiple of 16 up to 4096.
        grad_scale: float32, one element: gradients are divided by it (times its reciprocal), as in torch's fused Adam.
        found_inf: float32, one element: if it is not 0, nothing is changed.
        codec, round_mode, rng: only ``"dyn8"``, 0 (nearest even) and None are supported yet.

    Raises:
        RuntimeError: shapes, dtypes, list lengths that do not fit, or an option that is not supported yet.
    """
    _ops.adam_q_(
        params,
        grads,
        m,
        m_scale,
        v,
        v_scale,
        master_lo,
        step,
        lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        decoupled=decoupled,
        codec=codec,
        block=block,
        grad_scale=grad_scale,
        found_inf=found_inf,
        round_mode=round_mode,
        rng=rng,
    )
