"""Family ``project``: APOLLO's and Fira's update."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import check, define
from .project import ROUNDING, check_matrix, check_rounding, check_shape, resolve_side

_ops = torch.ops.slkernels


def _apollo_fake(
    W,
    G,
    N,
    R,
    norm,
    lr,
    side="auto",
    *,
    kind="channel",
    alpha=1.0,
    limiter=1.01,
    weight_decay=0.0,
    left=None,
    right=None,
    found_inf=None,
    round_mode=0,
    rng=None,
):
    op = "apollo_scale_update_"
    check_matrix(op, "W", W)
    n, m = W.shape
    check_shape(op, "G", G, (n, m))
    side = resolve_side(op, side, n, m)
    rank = R.shape[0 if side == "left" else -1]
    check_shape(op, "R", R, (rank, m) if side == "left" else (n, rank))
    check_shape(op, "N", N, tuple(R.shape))
    check(kind in ("channel", "tensor"), op, lambda: f"kind must be channel or tensor, got {kind}")
    if left is not None:
        check(side == "left", op, lambda: "left must not be given where side is right")
        check_shape(op, "left", left, (n, rank))
    if right is not None:
        check(side == "right", op, lambda: "right must not be given where side is left")
        check_shape(op, "right", right, (rank, m))
    check_rounding(op, round_mode, rng)


define(
    "apollo_scale_update_(Tensor(a!) W, Tensor G, Tensor N, Tensor R, Tensor(b!) norm, Tensor lr, "
    'str side="auto", *, str kind="channel", float alpha=1.0, float limiter=1.01, float weight_decay=0.0, '
    f"Tensor? left=None, Tensor? right=None, Tensor? found_inf=None, {ROUNDING}) -> ()",
    fake=_apollo_fake,
)


def apollo_scale_update_(
    W: Tensor,
    G: Tensor,
    N: Tensor,
    R: Tensor,
    norm: Tensor,
    lr: Tensor,
    side: str = "auto",
    *,
    kind: str = "channel",
    alpha: float = 1.0,
    limiter: float = 1.01,
    weight_decay: float = 0.0,
    left: Tensor | None = None,
    right: Tensor | None = None,
    found_inf: Tensor | None = None,
    round_mode: int = 0,
    rng: Tensor | None = None,
) -> None:
    """APOLLO's update, in two passes over G and with every scalar on the device (arXiv 2412.05270, algorithm 1):

        s = |N| / (|R| + 1e-8)                     per channel, or one for the tensor
        U = s G;   u = |U|
        c = max(u / (norm + 1e-8), limiter) / limiter   where norm > 0, else 1;   norm <- u / c
        W <- (1 - lr weight_decay) W - lr alpha U / c

    Channels are the rows of G for side ``"right"`` (R = G P^T), the columns for ``"left"`` (R = P^T G).

    With the projection, ``left`` or ``right`` (orthonormal), it is Fira's (arXiv 2410.01623): U is the scaled part of G
    outside the subspace, and the update inside is N's: U = s (G - back(R)), W <- ... - lr alpha (back(N) + U / c),
    where u^2 = sum s^2 (|G|^2 - |R|^2), which holds for an orthonormal projection.

    Args:
        W: [n, m], float32, bfloat16 or float16, contiguous. G: [n, m], W's dtype; rows of unit stride are not copied.
        N, R: the normalized and the raw projected gradient, [n, rank] (right) or [rank, m] (left), float32 or W's
            dtype.
        norm: float32, one element, state: 0 before the first step. It stays at 0 after a step without a gradient, so
            that the limiter does not hold the next one to 1.01 times nothing; it keeps its value where u is not finite.
        lr: float32, one element, on W's device (times the bias correction, where N has none).
        kind: ``"channel"``, or ``"tensor"`` (APOLLO-Mini). alpha: a factor of the update; APOLLO's sqrt(scale), Fira's
            scale.
        limiter: the largest growth of u from step to step; 0 turns it off.
        left, right: [n, rank] or [rank, m], of N's dtype: Fira's residual.
        weight_decay, found_inf, round_mode, rng: as in :func:`project_back_add_`.

    Raises:
        RuntimeError: shapes, dtypes or options that do not fit.
    """
    _ops.apollo_scale_update_(
        W,
        G,
        N,
        R,
        norm,
        lr,
        side,
        kind=kind,
        alpha=alpha,
        limiter=limiter,
        weight_decay=weight_decay,
        left=left,
        right=right,
        found_inf=found_inf,
        round_mode=round_mode,
        rng=rng,
    )
