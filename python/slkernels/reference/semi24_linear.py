"""Definition of the products of family ``semi24``, in layout plain: W is a dense matrix here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .lowrank import ACTIVATIONS as _ACTIVATIONS

ACTIVATIONS = {**_ACTIVATIONS, "relu2": lambda z: F.relu(z).square()}


def kept_columns24(meta: Tensor, m: int) -> Tensor:
    """[n, 2 ceil(m / 4)]: the column of every kept slot; a padding column is m or more."""
    kept = 2 * ((m + 3) // 4)
    slot = torch.arange(kept, device=meta.device)
    position = meta[:, slot // 4].int() >> (2 * (slot % 4)) & 3
    return slot // 2 * 4 + position


def dense24(values: Tensor, meta: Tensor, m: int) -> Tensor:
    """W [n, m]."""
    padded = values.new_zeros(values.shape[0], (m + 3) // 4 * 4)
    return padded.scatter(1, kept_columns24(meta, m), values)[:, :m]


def linear24(
    x: Tensor, values: Tensor, meta: Tensor, n: int, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """y [..., n] = act(x W^T + bias)."""
    return ACTIVATIONS[activation](F.linear(x, dense24(values, meta, x.shape[-1]), bias))


def linear24_dx(dy: Tensor, values: Tensor, meta: Tensor, m: int) -> Tensor:
    """dx [..., m] = dy W."""
    return dy @ dense24(values, meta, m)


def dw_compress24(dy: Tensor, x: Tensor, meta: Tensor, layout: str = "plain") -> Tensor:
    """dvalues = (dy^T x) at the kept slots; 0 at padding columns."""
    dw = torch.einsum("...n,...m->nm", dy, x)
    return F.pad(dw, (0, -x.shape[-1] % 4)).gather(1, kept_columns24(meta, x.shape[-1]))


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
    """linear24, with dx = dz W_t^T, W_t [m, n] the transposed pack; W's gradient goes to weight, if there is one."""
    w, w_t = dense24(values, meta, x.shape[-1]), dense24(values_t, meta_t, n)
    if weight is not None:
        w = w.detach() + (weight - weight.detach())
    by_x = F.linear(x, w_t.t().detach())
    z = F.linear(x.detach(), w, bias) + (by_x - by_x.detach())  # adds zeros, and x's gradient
    return ACTIVATIONS[activation](z)
