"""Inputs and comparisons of the tests of family `optim`."""

from __future__ import annotations

import torch

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = {"dyn8": "dyn8u", "lin8": "lin8u", "cmp8": "cmp8u", "dyn4": "lin4u", "fp8": "fp8u"}
BLOCKS = {"dyn8": 256, "lin8": 256, "cmp8": 32, "dyn4": 128, "fp8": 256}
CODECS = [codec for pair in PAIRS.items() for codec in pair]


def bits(x):
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def random_tensor(*shape, dtype=torch.float32, seed=0, decades=6.0):
    """Both signs, magnitudes over many decades, some zeros."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g) * 10 ** (-decades * torch.rand(*shape, generator=g))
    return torch.where(torch.rand(*shape, generator=g) < 0.02, 0.0, x).to(dtype)
