"""Family ``optim`` in plain PyTorch: the maps as tables, exact nearest by search, and the Adam step."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def dynamic_map(signed: bool) -> Tensor:
    """bitsandbytes' ``create_dynamic_map``, float32 [256], sorted (arXiv 2110.02861, section 2; code: functional.py).

    There, ``torch.linspace`` makes the boundaries. Its float32 result depends on whether torch was built for a CPU with
    FMA; here the FMA result, start + step * i rounded once, is made in float64 (where it is exact) on every machine.
    """
    start, one = torch.tensor(0.1, dtype=torch.float32), torch.tensor(1.0, dtype=torch.float32)
    values = [torch.zeros(1), torch.ones(1)]
    for i in range(7):
        items = 2 ** (i if signed else i + 1) + 1
        step = ((one - start) / (items - 1)).double()
        k = torch.arange(items, dtype=torch.float64)
        up, down = start.double() + step * k, 1 - step * (items - 1 - k)
        boundaries = torch.where(k < items // 2, up, down).float()
        means = (boundaries[:-1] + boundaries[1:]) / 2
        values.append(10 ** (i - 6) * means)
        if signed:
            values.append(-(10 ** (i - 6)) * means)
    return torch.cat(values).sort().values


def _nearest(x: Tensor, signed: bool) -> Tensor:
    """Codes of the values nearest to x in [-1, 1], ties to the smaller magnitude; midpoints are exact in float64."""
    table = dynamic_map(signed).double()
    zero = 127 if signed else 0
    magnitudes = table[zero:]
    index = torch.searchsorted((magnitudes[1:] + magnitudes[:-1]) / 2, x.double().abs(), right=False)
    if not signed:
        return index.to(torch.uint8)
    return torch.where(x < 0, zero - index.clamp(max=127), zero + index).to(torch.uint8)


def quantize_block(x: Tensor, codec: str = "dyn8", block: int = 256) -> tuple[Tensor, Tensor]:
    """See :func:`slkernels.quantize_block`."""
    signed = codec == "dyn8"
    flat = x.reshape(-1).float()
    if not signed:
        flat = torch.where(flat < 0, 0.0, flat)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    largest = blocks.abs().amax(1) if blocks.numel() else blocks.new_zeros(0)
    scale = torch.where(largest.isfinite(), largest, torch.nan)
    quotient = blocks / scale[:, None]
    quotient = torch.where((scale > 0)[:, None], quotient, 0.0)
    codes = _nearest(quotient, signed).view(-1)[: flat.numel()]
    return codes.view(x.shape), scale


def dequantize_block(
    codes: Tensor, scale: Tensor, codec: str = "dyn8", block: int = 256, dtype: torch.dtype | None = None
) -> Tensor:
    """See :func:`slkernels.dequantize_block`."""
    values = dynamic_map(codec == "dyn8")[codes.reshape(-1).long()]
    each = scale.repeat_interleave(block)[: codes.numel()]
    return (values * each).view(codes.shape).to(dtype or torch.float32)


def adam(
    p: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    step: float,
    lr: float,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool = True,
    grad_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """New (p, m, v) of one Adam(W) step, in the dtype of m: float64 for an error bound, float32 for a comparison.

    The order is torch.optim.AdamW's: decay (or, not decoupled, the L2 term), moments, bias correction, update. m and v
    keep their old values where v' is not finite.
    """
    p, grad = p.to(m.dtype), grad.to(m.dtype) / grad_scale
    if not decoupled:
        grad = grad + weight_decay * p
    m_new = beta1 * m + (1 - beta1) * grad
    v_new = beta2 * v + (1 - beta2) * grad * grad
    denominator = v_new.sqrt() / (1 - beta2**step) ** 0.5 + eps
    decay = 1 - lr * weight_decay if decoupled else 1.0
    p = p * decay - lr / (1 - beta1**step) * m_new / denominator
    finite = v_new < torch.inf
    return p, torch.where(finite, m_new, m), torch.where(finite, v_new, v)
