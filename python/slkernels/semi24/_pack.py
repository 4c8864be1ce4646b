"""Pruning to 2:4 and packing: masks, the compressed formats, and the ways between them.

W is [n, m], G = ceil(m / 4). A packed weight is ``(values, meta)`` in one of three layouts
(include/slkernels/semi24.h):

* ``plain``: values [n, 2 G], any dtype; meta uint8 [n, ceil(G / 2)]. The format of checkpoints.
* ``sm80``: bfloat16 or float16; values [N, M / 2], meta int16 [N, M / 16]; N, M are n, m rounded up to 32, 64. What
  ``torch.sparse.SparseSemiStructuredTensorCUTLASS`` holds.
* ``sm90``: bfloat16 or float16; values [N, M / 2], meta uint8 [N M / 8]; N, M are n, m rounded up to 64, 128. What a
  CUTLASS 3.x GEMM with tiles of 128 along K reads.

A group is four columns, W being padded with zero columns to whole groups; its 4-bit code holds two positions. Where a
mask keeps fewer than two of a group, a slot is padding: lowest padding columns first; its value is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import check, define

_ops = torch.ops.slkernels

LAYOUTS = ("plain", "sm80", "sm90")
_ROWS = {"sm80": 32, "sm90": 64}  # what n is padded to
_COLUMNS = {"sm80": 64, "sm90": 128}  # what m is padded to
_HALVES = (torch.bfloat16, torch.float16)
_FLOATS = (torch.float32, *_HALVES, torch.float64)


def _up(a, b: int):
    return (a + b - 1) // b * b


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def values_shape(n, m, layout: str) -> tuple:
    """The shape of ``values`` of an [n, m] weight."""
    if layout == "plain":
        return n, _up(m, 4) // 2
    return _up(n, _ROWS[layout]), _up(m, _COLUMNS[layout]) // 2


def meta_shape(n, m, layout: str) -> tuple:
    """The shape of ``meta`` of an [n, m] weight."""
    if layout == "plain":
        return n, _up(m, 8) // 8
    N, M = _up(n, _ROWS[layout]), _up(m, _COLUMNS[layout])
    return (N, M // 16) if layout == "sm80" else (N * M // 8,)


def meta_dtype(layout: str) -> torch.dtype:
    """The dtype of ``meta``: int16 for sm80, else uint8."""
    return torch.int16 if layout == "sm80" else torch.uint8


def _check_matrix(op: str, name: str, t: Tensor) -> None:
    check(t.dim() == 2, op, lambda: f"{name} must be [n, m], got {list(t.shape)}")


def _check_layout(op: str, layout: str, values: Tensor | None = None, argument: str = "layout") -> None:
    check(layout in LAYOUTS, op, lambda: f"{argument} must be plain, sm80 or sm90, got {layout}")
    if values is not None:
        check(
            layout == "plain" or values.dtype in _HALVES,
            op,
            lambda: f"layout {layout} needs bfloat16 or float16, got {_name(values.dtype)}",
        )


def _check_by(op: str, by: str, W: Tensor, score: Tensor | None) -> None:
    _check_matrix(op, "W", W)
    check(by in ("row", "transposable"), op, lambda: f"by must be row or transposable, got {by}")
    if score is not None:
        _check_shape(op, "score", score, W.shape)
        check(
            score.dtype == W.dtype,
            op,
            lambda: f"score must have W's dtype {_name(W.dtype)}, got {_name(score.dtype)}",
        )


def _check_shape(op: str, name: str, t: Tensor, shape: tuple) -> None:
    check(
        t.dim() == len(shape) and all(a == b for a, b in zip(t.shape, shape, strict=True)),
        op,
        lambda: f"{name} must be {list(shape)}, got {list(t.shape)}",
    )


def check_meta(op: str, meta: Tensor, n, m, layout: str, name: str = "meta") -> None:
    """Checks shape and dtype of an [n, m] weight's ``meta``."""
    check(n >= 0 and m >= 0, op, lambda: f"n and m must not be negative, got {n} and {m}")
    _check_shape(op, name, meta, meta_shape(n, m, layout))
    want = meta_dtype(layout)
    check(meta.dtype == want, op, lambda: f"{name} must be {_name(want)}, got {_name(meta.dtype)}")


def check_packed(op: str, values: Tensor, meta: Tensor, n, m, layout: str) -> None:
    """Checks shapes and dtypes of an [n, m] weight in ``layout``."""
    _check_layout(op, layout, values)
    check_meta(op, meta, n, m, layout)
    _check_shape(op, "values", values, values_shape(n, m, layout))


def _new_packed(like: Tensor, n, m, layout: str) -> tuple[Tensor, Tensor]:
    meta = like.new_empty(meta_shape(n, m, layout), dtype=meta_dtype(layout))
    return like.new_empty(values_shape(n, m, layout)), meta


# ---- prune24 --------------------------------------------------------------------------------------------------------


def _prune_fake(W, by="row", score=None):
    _check_by("prune24", by, W, score)
    return W.new_empty(W.shape, dtype=torch.bool)


define('prune24(Tensor W, str by="row", Tensor? score=None) -> Tensor', fake=_prune_fake)


def prune24(W: Tensor, by: str = "row", score: Tensor | None = None) -> Tensor:
    """The 2:4 mask that keeps the most of W, or of ``score``, by magnitude.

    Args:
        W: [n, m], float32, bfloat16, float16, or float64 (on a CPU).
        by: ``"row"``: the two largest of every four in a row; among equals the lower columns. ``"transposable"``: two
            of every row and every column of each 4x4 tile, so that W and W^T are 2:4 under one mask: the exact best of
            the 90 such patterns, by sums in fp32 (fp64 for float64); equal sums are decided in the order of
            include/slkernels/semi24.cuh, the same on every device.
        score: [n, m], W's dtype; its magnitudes rank instead of W's. Wanda (arXiv 2306.11695) is ``|W| * x_norm``.

    NaN ranks above infinity by rows. In a tile's sums NaN, infinity and all above 2^124 count as 2^124 (float64:
    2^1020), so that a tile keeps as many of them as it can. Ragged edges are read as padded with zeros.

    Returns:
        bool [n, m], contiguous.

    Raises:
        RuntimeError: shapes, dtypes or ``by`` that do not fit.
    """
    return _ops.prune24(W, by, score)


# ---- compress24, decompress24 ---------------------------------------------------------------------------------------


def _compress_fake(W, mask, layout="plain", validate=True):
    op = "compress24"
    _check_matrix(op, "W", W)
    _check_shape(op, "mask", mask, W.shape)
    check(mask.dtype == torch.bool, op, lambda: f"mask must be bool, got {_name(mask.dtype)}")
    _check_layout(op, layout, W)
    return _new_packed(W, W.shape[0], W.shape[1], layout)


def _compress_setup(ctx, inputs, output):
    W, layout = inputs[0], inputs[2]
    ctx.save_for_backward(output[1])
    ctx.size, ctx.layout = tuple(W.shape), layout
    ctx.mark_non_differentiable(output[1])


def _compress_backward(ctx, dvalues, _dmeta):
    (meta,) = ctx.saved_tensors
    return _ops.decompress24(dvalues, meta, *ctx.size, ctx.layout), None, None, None


define(
    'compress24(Tensor W, Tensor mask, str layout="plain", bool validate=True) -> (Tensor, Tensor)',
    fake=_compress_fake,
    setup_context=_compress_setup,
    backward=_compress_backward,
)


def compress24(W: Tensor, mask: Tensor, layout: str = "plain", validate: bool = True) -> tuple[Tensor, Tensor]:
    """W * mask in half the space. Values keep their bits; the gradient of ``values`` goes to W at the mask.

    Args:
        W: [n, m], float32, bfloat16, float16, or float64 (on a CPU); bfloat16 or float16 for sm80 and sm90.
        mask: bool [n, m], 2:4: two of every whole group; of a last group of w < 4 columns at most two, and at least
            w - 2.
        layout: see the module.
        validate: check the mask. On a GPU the check waits for the device. Without it, a group that is not 2:4 is packed
            as two NaNs with code 0x4.

    Returns:
        values, meta.

    Raises:
        RuntimeError: a mask that is not 2:4, naming the first group that is not; shapes, dtypes that do not fit.
    """
    return _ops.compress24(W, mask, layout, validate)


def _decompress_fake(values, meta, n, m, layout="plain"):
    check_packed("decompress24", values, meta, n, m, layout)
    return values.new_empty((n, m))


def _decompress_setup(ctx, inputs, output):
    _values, meta, n, m, layout = inputs
    ctx.save_for_backward(meta)
    ctx.n, ctx.m, ctx.layout = n, m, layout


def _decompress_backward(ctx, dW):
    (meta,) = ctx.saved_tensors
    mask = _ops.mask_of24(meta, ctx.n, ctx.m, ctx.layout)
    return _ops.compress24(dW, mask, ctx.layout, False)[0], None, None, None, None


define(
    'decompress24(Tensor values, Tensor meta, SymInt n, SymInt m, str layout="plain") -> Tensor',
    fake=_decompress_fake,
    setup_context=_decompress_setup,
    backward=_decompress_backward,
)


def decompress24(values: Tensor, meta: Tensor, n: int, m: int, layout: str = "plain") -> Tensor:
    """The dense [n, m] of a packed weight; zero where nothing is kept. Differentiable in ``values``.

    Codes are not checked (:func:`check24` does): a code that is none of the six still stays inside its group.

    Raises:
        RuntimeError: shapes, dtypes or a layout that do not fit.
    """
    return _ops.decompress24(values, meta, n, m, layout)


# ---- mask_of24, check24 ---------------------------------------------------------------------------------------------


def _mask_of_fake(meta, n, m, layout="plain"):
    _check_layout("mask_of24", layout)
    check_meta("mask_of24", meta, n, m, layout)
    return meta.new_empty((n, m), dtype=torch.bool)


def _check_fake(meta, n, m, layout="plain"):
    _check_layout("check24", layout)
    check_meta("check24", meta, n, m, layout)


define('mask_of24(Tensor meta, SymInt n, SymInt m, str layout="plain") -> Tensor', fake=_mask_of_fake)
define('check24(Tensor meta, SymInt n, SymInt m, str layout="plain") -> ()', fake=_check_fake)


def mask_of24(meta: Tensor, n: int, m: int, layout: str = "plain") -> Tensor:
    """bool [n, m]: the slots that ``meta`` names. Of a transposed pack that includes the slots that hold a zero because
    the mask kept fewer than two of their group."""
    return _ops.mask_of24(meta, n, m, layout)


def check24(meta: Tensor, n: int, m: int, layout: str = "plain") -> None:
    """Raises RuntimeError with row and group of the first code that is none of the six. Packed weights from a file or
    another library are to be checked once, where they enter; on a GPU the check waits for the device."""
    _ops.check24(meta, n, m, layout)


# ---- prune_compress24 -----------------------------------------------------------------------------------------------


def _prune_compress_fake(W, by="row", score=None, layout="plain"):
    op = "prune_compress24"
    _check_by(op, by, W, score)
    _check_layout(op, layout, W)
    n, m = W.shape
    return *_new_packed(W, n, m, layout), *_new_packed(W, m, n, layout)


def _prune_compress_setup(ctx, inputs, output):
    W = inputs[0]
    _values, meta, _values_t, meta_t = output
    ctx.save_for_backward(meta, meta_t)
    ctx.size, ctx.layout = tuple(W.shape), inputs[3] if len(inputs) > 3 else "plain"
    ctx.mark_non_differentiable(meta, meta_t)


def _prune_compress_backward(ctx, dvalues, _dmeta, dvalues_t, _dmeta_t):
    meta, meta_t = ctx.saved_tensors
    n, m = ctx.size
    dW = _ops.decompress24(dvalues, meta, n, m, ctx.layout)
    dW_t = _ops.decompress24(dvalues_t, meta_t, m, n, ctx.layout)
    # Slots of the transposed pack that the mask does not keep hold a constant zero.
    return dW + dW_t.t() * _ops.mask_of24(meta, n, m, ctx.layout), None, None, None


define(
    'prune_compress24(Tensor W, str by="row", Tensor? score=None, str layout="plain") '
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_prune_compress_fake,
    setup_context=_prune_compress_setup,
    backward=_prune_compress_backward,
)


def prune_compress24(
    W: Tensor, by: str = "row", score: Tensor | None = None, layout: str = "plain"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prunes W and packs it and its transpose, in one pass over W.

    (values, meta) is ``compress24(W, prune24(W, by, score), layout)``. (values_t, meta_t) packs W_t = (W * mask)^T
    [m, n], pruned once more by rows among what the mask kept: SLoPe's double pruning (arXiv 2405.16325, section 2). A
    transposable mask loses nothing by it. Where the mask keeps fewer than two of a group of W_t, the free slots hold
    zeros: first padding, then the lowest position.

    Args: as :func:`prune24` and :func:`compress24`. The gradients of both ``values`` go to W, through the kept slots.

    Returns:
        values, meta, values_t, meta_t; the last two are those of an [m, n] weight.

    Raises:
        RuntimeError: shapes, dtypes or options that do not fit.
    """
    return _ops.prune_compress24(W, by, score, layout)


# ---- convert24 ------------------------------------------------------------------------------------------------------


def _convert_fake(values, meta, n, m, source, target):
    op = "convert24"
    _check_layout(op, source, values, "source")
    _check_layout(op, target, values, "target")
    check_packed(op, values, meta, n, m, source)
    return _new_packed(values, n, m, target)


def _convert_setup(ctx, inputs, output):
    _values, _meta, n, m, source, target = inputs
    ctx.save_for_backward(output[1])
    ctx.n, ctx.m, ctx.source, ctx.target = n, m, source, target
    ctx.mark_non_differentiable(output[1])


def _convert_backward(ctx, dvalues, _dmeta):
    (meta,) = ctx.saved_tensors
    dsource, _ = _ops.convert24(dvalues, meta, ctx.n, ctx.m, ctx.target, ctx.source)
    return dsource, None, None, None, None, None


define(
    "convert24(Tensor values, Tensor meta, SymInt n, SymInt m, str source, str target) -> (Tensor, Tensor)",
    fake=_convert_fake,
    setup_context=_convert_setup,
    backward=_convert_backward,
)


def convert24(values: Tensor, meta: Tensor, n: int, m: int, source: str, target: str) -> tuple[Tensor, Tensor]:
    """A packed [n, m] weight in another layout; exact, so that a round trip gives the same bits. Differentiable in
    ``values``.

    Raises:
        RuntimeError: shapes, dtypes or layouts that do not fit.
    """
    return _ops.convert24(values, meta, n, m, source, target)


# ---- repack24_perm, repack24_t_ -------------------------------------------------------------------------------------


def _repack_perm_fake(meta, meta_t, n, m):
    op = "repack24_perm"
    check_meta(op, meta, n, m, "plain")
    check_meta(op, meta_t, m, n, "plain", "meta_t")
    return meta.new_empty(values_shape(m, n, "plain"), dtype=torch.int32)


def _repack_fake(values_t, values, perm):
    op = "repack24_t_"
    _check_matrix(op, "values_t", values_t)
    _check_matrix(op, "values", values)
    _check_shape(op, "perm", perm, values_t.shape)


define("repack24_perm(Tensor meta, Tensor meta_t, SymInt n, SymInt m) -> Tensor", fake=_repack_perm_fake)
define("repack24_t_(Tensor(a!) values_t, Tensor values, Tensor perm) -> ()", fake=_repack_fake)


def repack24_perm(meta: Tensor, meta_t: Tensor, n: int, m: int) -> Tensor:
    """Where each slot of the transposed pack's values is found in ``values``, for plain layouts.

    Returns:
        int32 [m, 2 ceil(n / 4)]: positions in ``values`` [n, 2 ceil(m / 4)], flat; -1 for slots that hold a zero.

    Raises:
        RuntimeError: shapes, dtypes that do not fit, or more than 2^31 - 1 values.
    """
    return _ops.repack24_perm(meta, meta_t, n, m)


def repack24_t_(values_t: Tensor, values: Tensor, perm: Tensor) -> None:
    """values_t <- values[perm], zero where perm is -1: after an optimizer's step on ``values``, without W.

    Args:
        values_t: [m, 2 ceil(n / 4)], contiguous, changed in place. values: [n, 2 ceil(m / 4)], the same dtype.
        perm: of :func:`repack24_perm`, contiguous. Positions outside ``values`` count as -1.

    Raises:
        RuntimeError: shapes, dtypes or strides that do not fit.
    """
    _ops.repack24_t_(values_t, values, perm)
