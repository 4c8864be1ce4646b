"""Family ``project`` in plain PyTorch. The in-place ops return their new state here; scalars are Python numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .philox import philox

# ---- random numbers -------------------------------------------------------------------------------------------------


_NORMALS = 0x6E6F726D  # the fourth word of the counters that normals are made of ("norm")


def rand_matrix(seed: int, rank: int, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """See :func:`slkernels.rand_matrix`; the ops do the same in float32.

    Of 64 neighbours in a row, counter (16 b + l, j, 0, tag) makes elements 64 b + l + 16 e, e = 0 .. 3.
    """
    blocks = (size + 63) // 64
    rows, counters = torch.arange(rank)[:, None], torch.arange(16 * blocks)[None]
    zeros = torch.zeros_like(counters)
    words = torch.broadcast_tensors(*philox(int(seed), counters, rows, zeros, zeros + _NORMALS))
    z = []
    for radius_word, angle_word in (words[:2], words[2:]):
        u = ((radius_word >> 1).float() * 2**-31 + 2**-32).double()  # in (0, 1], on float32's grid
        radius = (-2 * u.log()).sqrt()
        # The two highest bits are the quadrant; the others, as a signed number, the angle from its middle.
        fraction = (angle_word << 2 & 0xFFFFFFFF).double() * 2**-32
        fraction = torch.where(fraction >= 0.5, fraction - 1, fraction)
        angle = math.pi / 2 * ((angle_word >> 30).double() + fraction)
        z += [radius * angle.cos(), radius * angle.sin()]
    z = torch.stack([part.view(rank, blocks, 16) for part in z], dim=2).reshape(rank, 64 * blocks)
    return (z[:, :size] / math.sqrt(max(rank, 1))).to(dtype)


# ---- projections ----------------------------------------------------------------------------------------------------


def project(G: Tensor, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
    """See :func:`slkernels.project`. The order of the two products is the op's: it shows in 16-bit dtypes."""
    if left is None or right is None:
        return G @ right.t() if left is None else left.t() @ G
    return left.t() @ (G @ right.t()) if G.shape[0] < G.shape[1] else (left.t() @ G) @ right.t()


def project_back(N: Tensor, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
    """See :func:`slkernels.project_back`."""
    U = N if right is None else N @ right
    return U if left is None else left @ U


def project_back_add(
    W: Tensor,
    N: Tensor,
    lr: float,
    left: Tensor | None = None,
    right: Tensor | None = None,
    *,
    alpha: float = 1.0,
    weight_decay: float = 0.0,
) -> Tensor:
    """The new W of :func:`slkernels.project_back_add_`."""
    return (1 - lr * weight_decay) * W - lr * alpha * project_back(N, left, right).to(W.dtype)


def _is_left(side: str, G: Tensor) -> bool:
    return side == "left" or (side == "auto" and G.shape[0] < G.shape[1])


def randomized_range(
    G: Tensor, rank: int, seed: int = 0, oversample: int = 8, iters: int = 1, side: str = "auto"
) -> Tensor:
    """See :func:`slkernels.randomized_range`: another way to the same subspace, by QR and SVD."""
    left = _is_left(side, G)
    X = G if left else G.t()
    count = min(rank + oversample, *X.shape)
    Q = torch.linalg.qr(X @ rand_matrix(seed, count, X.shape[1], X.dtype).t())[0]
    for _ in range(iters):
        Q = torch.linalg.qr(X @ (X.t() @ Q))[0]
    U = (Q @ torch.linalg.svd(Q.t() @ X, full_matrices=False)[0])[:, :rank]
    return U if left else U.t()


def rand_project(G: Tensor, seed: int | Tensor, rank: int, side: str = "auto") -> Tensor:
    """See :func:`slkernels.rand_project`."""
    if _is_left(side, G):
        return rand_matrix(int(seed), rank, G.shape[0], G.dtype) @ G
    return G @ rand_matrix(int(seed), rank, G.shape[1], G.dtype).t()


def rand_project_back(R: Tensor, seed: int | Tensor, size: int, side: str) -> Tensor:
    """See :func:`slkernels.rand_project_back`."""
    if side == "left":
        return rand_matrix(int(seed), R.shape[0], size, R.dtype).t() @ R
    return R @ rand_matrix(int(seed), R.shape[1], size, R.dtype)


def apollo_scale_update(
    W: Tensor,
    G: Tensor,
    N: Tensor,
    R: Tensor,
    norm: float,
    lr: float,
    side: str = "auto",
    *,
    kind: str = "channel",
    alpha: float = 1.0,
    limiter: float = 1.01,
    weight_decay: float = 0.0,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> tuple[Tensor, float]:
    """The new (W, norm) of :func:`slkernels.apollo_scale_update_`."""
    dim = 0 if _is_left(side, G) else 1
    if kind == "channel":
        s = N.norm(dim=dim, keepdim=True) / (R.norm(dim=dim, keepdim=True) + 1e-8)
    else:
        s = N.norm() / (R.norm() + 1e-8)
    residual = left is not None or right is not None
    U = s * (G - project_back(R, left, right) if residual else G)
    u = float(U.norm())
    growth = max(u / (norm + 1e-8), limiter) / limiter if norm > 0 and limiter > 0 else 1.0
    update = U / growth + (project_back(N, left, right) if residual else 0)
    new_norm = u / growth if math.isfinite(u) else norm
    return (1 - lr * weight_decay) * W - lr * alpha * update, new_norm


# ---- quantized groups -----------------------------------------------------------------------------------------------


def quantize_group(
    w: Tensor, bits: int = 8, group: int = 256, uniform: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`slkernels.quantize_group`. uniform: w's shape, in [0, 1): rounds stochastically; else to nearest."""
    lead, m, top = w.shape[:-1], w.shape[-1], 2**bits - 1
    pad = (0, -m % group)
    g = torch.nn.functional.pad(w.float(), pad).view(*lead, -(-m // group), group)
    hi, lo = g.amax(-1, keepdim=True).clamp(min=0), g.amin(-1, keepdim=True).clamp(max=0)
    scale = (hi - lo) / top
    finite, positive = scale.isfinite(), scale > 0
    zero = torch.where(finite & positive, (-lo / scale).round().clamp(0, top), 0.0)
    y = g / scale
    up = 0.0 if uniform is None else torch.nn.functional.pad(uniform, pad).view_as(g) < y - y.floor()
    y = y.round() if uniform is None else y.floor() + up
    codes = torch.where(finite & positive, (y + zero).clamp(0, top), 0.0).flatten(-2)[..., :m].to(torch.uint8)
    if bits == 4:
        codes = torch.nn.functional.pad(codes, (0, m % 2))
        codes = codes[..., 0::2] << 4 | codes[..., 1::2]
    scale = torch.where(finite, scale, torch.nan)
    return codes, scale.squeeze(-1), zero.squeeze(-1).to(torch.uint8)


def dequantize_group(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    columns: int | None = None,
    bits: int = 8,
    group: int = 256,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See :func:`slkernels.dequantize_group`."""
    if bits == 4:
        codes = torch.stack([codes >> 4, codes & 15], dim=-1).flatten(-2)
    m = codes.shape[-1] if columns is None else columns

    def spread(t: Tensor) -> Tensor:
        return t.repeat_interleave(group, dim=-1)[..., :m]

    return ((codes[..., :m].float() - spread(zero).float()) * spread(scale)).to(dtype or torch.float32)


def w8a16_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    group: int = 256,
    bias: Tensor | None = None,
    carrier: Tensor | None = None,
) -> Tensor:
    """See :func:`slkernels.w8a16_linear`; the carrier's gradient is the weight's."""
    W = dequantize_group(codes, scale, zero, group=group, dtype=x.dtype)
    if carrier is not None:
        W = W + (carrier - carrier.detach())
    return torch.nn.functional.linear(x, W, bias)
