"""``quantize_block`` and ``dequantize_block``: codecs by themselves, for checkpoints, tests, other optimizers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._library import check, define
from ._checks import FOUR_BITS, blocks, check_block, check_codec, check_float, check_rounding

_ops = torch.ops.slkernels


def _quantize_block_fake(x, codec="dyn8", block=256, round_mode=0, rng=None):
    op = "quantize_block"
    check_codec(op, codec)
    check_block(op, block)
    check_float(op, "x", x.dtype)
    check_rounding(op, round_mode, rng)
    shape = ((x.numel() + 1) // 2,) if codec in FOUR_BITS else x.shape
    codes = x.new_empty(shape, dtype=torch.uint8)
    return codes, x.new_empty((blocks(x.numel(), block),), dtype=torch.float32)


def _dequantize_block_fake(codes, scale, codec="dyn8", block=256, dtype=None, numel=None):
    op = "dequantize_block"
    check_codec(op, codec)
    check_block(op, block)
    check_float(op, "dtype", dtype or torch.float32)
    if codec in FOUR_BITS:
        count = 2 * codes.numel() if numel is None else numel
        check(
            (count + 1) // 2 == codes.numel(),
            op,
            lambda: f"numel must be {2 * codes.numel()} or one less, got {count}",
        )
        shape = (count,)
    else:
        count, shape = codes.numel(), codes.shape
        check(
            numel is None or numel == count,
            op,
            lambda: f"numel must be the number of codes, {count}, got {numel}",
        )
    check(
        scale.dim() == 1 and scale.shape[0] == blocks(count, block),
        op,
        lambda: f"scale must be [{blocks(count, block)}], got {list(scale.shape)}",
    )
    return codes.new_empty(shape, dtype=dtype or torch.float32)


define(
    "quantize_block(Tensor x, str codec='dyn8', int block=256, int round_mode=0, Tensor? rng=None) -> (Tensor, Tensor)",
    fake=_quantize_block_fake,
)
define(
    "dequantize_block(Tensor codes, Tensor scale, str codec='dyn8', int block=256, ScalarType? dtype=None, "
    "SymInt? numel=None) -> Tensor",
    fake=_dequantize_block_fake,
)


def quantize_block(
    x: Tensor, codec: str = "dyn8", block: int = 256, round_mode: int = 0, rng: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize ``x`` to 8 or 4 bits block by block: a scale from the block's largest magnitude A, and a code for each
    element.

    ======== ==== ============= ================== ================================================================
    codec    bits scale         decoded            for
    ======== ==== ============= ================== ================================================================
    dyn8     8    A             scale map[code]    m; bitsandbytes' signed dynamic map (arXiv 2110.02861); 0 is 127
    dyn8u    8    A             scale map[code]    v; bitsandbytes' unsigned one
    lin8     8    A / 127       scale q            m; q = code as int8, -127 .. 127
    lin8u    8    A / 255       scale q            v; q = 0 .. 255, 0 for zeros only
    cmp8     8    A             scale q/(254-|q|)  m; softsign companding, q as in lin8 (FlashOptim; blocks of 32)
    cmp8u    8    sqrt(A)/255   (scale q)^2        v; linear in sqrt(v), 0 for zeros only (the same)
    dyn4     4    A             scale map[code]    m; 16-value dynamic map (arXiv 2309.01507; blocks of 128); 0 is 7
    lin4u    4    A             scale (code+1)/16  v; no zero: 0 decodes to scale / 16 (the same)
    fp8      8    A / 448       scale e4m3(code)   m
    fp8u     8    A / 448       scale e4m3(code)   v; 0 for zeros only
    ======== ==== ============= ================== ================================================================

    Nearest is to nearest, exactly defined in ``include/slkernels/optim_codec.cuh``; the same codes on every device.
    Zero stays exactly zero in every codec but lin4u. Unsigned codecs take negative values as 0.

    Args:
        x: any shape, float32, bfloat16 or float16; a copy is made if it is not contiguous.
        codec: a name of the table.
        block: elements per scale, a multiple of 16 up to 4096.
        round_mode: 0, nearest; 1, stochastic: one of the two values around x, with the mean x (the draws have 16 bits:
            the mean is right to 2^-16 of the step). Not below the smallest code of a codec whose v is never 0.
        rng: int64 [2] = (seed, step) on x's device, for round_mode 1: element i draws from Philox 4x32-10 with key
            seed and counter (i / 8, 0, step), whatever the number of threads.

    Returns:
        codes: uint8, x's shape; with 4 bits [ceil(x.numel() / 2)], element 2 i in the high half of byte i and 2 i + 1
        in the low one. scale: float32 [ceil(x.numel() / block)]. A block of zeros has scale 0; a block with a NaN or an
        infinity has scale NaN, so that all of it dequantizes to NaN instead of to plausible numbers.

    Raises:
        RuntimeError: another dtype, codec, block size or round_mode, or an rng that does not fit.
    """
    return _ops.quantize_block(x, codec, block, round_mode, rng)


def dequantize_block(
    codes: Tensor,
    scale: Tensor,
    codec: str = "dyn8",
    block: int = 256,
    dtype: torch.dtype | None = None,
    numel: int | None = None,
) -> Tensor:
    """The values that :func:`quantize_block` stored, in float32 and rounded to ``dtype``.

    Args:
        codes: uint8, any shape. scale: float32 [ceil(numel / block)]. codec, block: as they were quantized.
        dtype: float32 (default), bfloat16 or float16.
        numel: number of elements, for 4-bit codes of an odd number (default: two for each byte).

    Returns:
        codes' shape, or [numel] from 4-bit codes; ``dtype``.

    Raises:
        RuntimeError: shapes, dtypes, codec or block size that do not fit.
    """
    return _ops.dequantize_block(codes, scale, codec, block, dtype, numel)
