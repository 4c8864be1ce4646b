"""Family ``optim`` in plain PyTorch: the step rules, and the roundings of parameters. The codecs: optim_codec.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .optim_codec import decode_in_step, dequantize_block, dynamic_map, quantize_block

__all__ = [
    "adam",
    "ademamix",
    "decode_in_step",
    "dequantize_block",
    "dynamic_map",
    "join_master",
    "momentum",
    "quantize_block",
    "round_stochastic",
    "split_master",
]


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
    keep their old values where v' is not finite. With p = 0, lr = -1 and no decay, p is adam_q_dir_'s direction.
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


def ademamix(
    p: Tensor,
    grad: Tensor,
    m: Tensor,
    m_slow: Tensor,
    v: Tensor,
    step: float,
    lr: float,
    beta3: float,
    alpha: float,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool = True,
    grad_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New (p, m, m_slow, v) of one AdEMAMix step (arXiv 2409.03137), in the dtype of m."""
    p, grad = p.to(m.dtype), grad.to(m.dtype) / grad_scale
    if not decoupled:
        grad = grad + weight_decay * p
    m_new = beta1 * m + (1 - beta1) * grad
    slow_new = beta3 * m_slow + (1 - beta3) * grad
    v_new = beta2 * v + (1 - beta2) * grad * grad
    denominator = v_new.sqrt() / (1 - beta2**step) ** 0.5 + eps
    decay = 1 - lr * weight_decay if decoupled else 1.0
    p = p * decay - lr * (m_new / (1 - beta1**step) + alpha * slow_new) / denominator
    finite = v_new < torch.inf
    return (p, *(torch.where(finite, new, old) for new, old in ((m_new, m), (slow_new, m_slow), (v_new, v))))


def momentum(
    p: Tensor,
    grad: Tensor,
    m: Tensor,
    step: float,
    lr: float,
    *,
    rule: str,
    beta1: float,
    beta2: float,
    weight_decay: float,
    grad_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """New (p, m) of one step of ``rule`` (see :func:`slkernels.momentum_q_`), in the dtype of m."""
    p, grad = p.to(m.dtype), grad.to(m.dtype) / grad_scale
    if rule == "lion":
        update = (beta1 * m + (1 - beta1) * grad).sign()
        m_new = beta2 * m + (1 - beta2) * grad
    elif rule == "signum":
        m_new = beta1 * m + (1 - beta1) * grad
        update = m_new.sign()
    else:
        grad = grad + weight_decay * p
        m_new = grad if step == 1 else beta1 * m + grad
        update = grad + beta1 * m_new if rule == "nesterov" else m_new
    decay = 1 - lr * weight_decay if rule in ("lion", "signum") else 1.0
    return p * decay - lr * update, torch.where(m_new.isfinite(), m_new, m)


# ---- roundings of parameters ----------------------------------------------------------------------------------------


def round_stochastic(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """float32 to bfloat16 or float16, by adding random bits (int64, below 2^16) to what is cut off."""
    if dtype == torch.float32:
        return x
    finite = x.isfinite()
    if dtype == torch.bfloat16:
        added = x.view(torch.int32) + bits.to(torch.int32)
        return torch.where(finite, (added & -65536).view(torch.float32), x).to(dtype)
    # float16 drops 13 bits; below its smallest normal number, what 2^-24 leaves, of which 13 bits count.
    unit = torch.ldexp(torch.ones_like(x, dtype=torch.float64), (torch.frexp(x).exponent - 11).clamp(min=-24))
    a = (x.double().abs() / unit * 2**13).floor()
    rounded = ((a + (bits >> 3)) / 2**13).floor() * unit
    return torch.where(finite, torch.copysign(rounded, x.double()), x.double()).to(dtype)


def join_master(p: Tensor, low: Tensor) -> Tensor:
    """The float32 number of a bfloat16 tensor and its int16 or int8 remainder."""
    high = p.view(torch.int16).to(torch.int32) << 16
    return (high + (low.to(torch.int32) << (0 if low.dtype == torch.int16 else 8))).view(torch.float32)


def split_master(x: Tensor, dtype: torch.dtype, bits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """And back: (bfloat16, int16 or int8). int8 rounds to 16 significand bits: to nearest even, or by random bits."""
    u = torch.where(x.isnan(), torch.tensor(torch.nan), x).view(torch.int32).long() & 0xFFFFFFFF
    if dtype == torch.int8:
        added = 0x7F + (u >> 8 & 1) if bits is None else bits >> 8
        u = torch.where(x.isfinite(), u + added, u) & 0xFFFFFF00
    high = (u + 0x8000 >> 16).to(torch.int16).view(torch.bfloat16)
    low = (u & 0xFFFF).to(torch.int16) if dtype == torch.int16 else (u >> 8 & 0xFF).to(torch.int8)
    return high, low
