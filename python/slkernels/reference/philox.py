"""Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _product(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of multiplier * x, both below 2^32; 64-bit products of halves do not overflow."""
    low, high = multiplier * (x & 0xFFFF), multiplier * (x >> 16)
    low, high = low + ((high & 0xFFFF) << 16), high >> 16
    return high + (low >> 32), low & _MASK


def philox(key: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, ...]:
    """Four words of a 64-bit key and four counter words (int64 tensors below 2^32)."""
    k0, k1 = key & _MASK, key >> 32 & _MASK
    for _ in range(10):
        high0, low0 = _product(0xD2511F53, c0)
        high1, low1 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def rounding_bits(numel: int, seed: int, step: int, tensor: int = 0) -> Tensor:
    """The 16 random bits of each element of tensor number ``tensor`` of a list, int64 [numel]."""
    group = torch.arange((numel + 7) // 8, dtype=torch.int64)
    other = torch.full_like(group, tensor)
    words = philox(seed, group & _MASK, group >> 32, other, torch.full_like(group, step & _MASK))
    halves = [half for w in words for half in (w & 0xFFFF, w >> 16)]
    return torch.stack(halves, 1).reshape(-1)[:numel]
