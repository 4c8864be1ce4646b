"""The codecs of family ``optim`` in plain PyTorch: maps as tables, exact nearest by search, stochastic rounding."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .philox import rounding_bits

SIGNED = ("dyn8", "lin8", "cmp8", "dyn4", "fp8")
FOUR_BITS = ("dyn4", "lin4u")
ZERO_CODE = {"dyn8": 127, "dyn4": 7}
_TOP = {"lin8": 127.0, "lin8u": 255.0, "cmp8u": 255.0, "fp8": 448.0, "fp8u": 448.0}


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


@functools.cache
def magnitudes(codec: str) -> Tensor:
    """The values of a codec on the positive side, ascending, float32, in units of the stored scale (cmp8u: squared)."""
    if codec in ("dyn8", "dyn8u"):
        return dynamic_map(codec == "dyn8")[127 if codec == "dyn8" else 0 :]
    if codec == "dyn4":  # the signed dynamic map with 3 exponent bits of 4 (arXiv 2309.01507), as torchao computes it
        return torch.tensor([0.0, 0.0055, 0.0325000025, 0.0775, 0.21249999, 0.4375, 0.6625, 0.8875, 1.0])
    if codec == "lin4u":
        return torch.arange(1, 17) / 16
    if codec in ("fp8", "fp8u"):
        return torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    q = torch.arange(256 if codec.endswith("u") else 128, dtype=torch.float32)
    return {"lin8": q, "lin8u": q, "cmp8": q / (254 - q), "cmp8u": q * q}[codec]


def code_values(codec: str) -> Tensor:
    """The value of every code, float32 [256 or 16], in units of the stored scale (cmp8u: squared). NaN where no value
    has the code."""
    values, count = magnitudes(codec), 16 if codec in FOUR_BITS else 256
    out = torch.full((count,), torch.nan)
    index = torch.arange(len(values))
    out[_code(index, torch.zeros(len(values), dtype=torch.bool), codec).long()] = values
    if codec in SIGNED:
        below = index[:-1] if codec in ZERO_CODE else index
        out[_code(below, torch.ones(len(below), dtype=torch.bool), codec).long()] = -values[below]
        out[ZERO_CODE.get(codec, 0)] = 0.0
    return out


@functools.cache
def _lines(signed: bool) -> tuple[Tensor, Tensor]:
    """Slope and offset of every magnitude of the dynamic map as the steps read it (codec::dynamic_line), float32."""
    slopes, offsets = [], []
    for t in range(129 if signed else 257):
        e = max(t, 1).bit_length() - 1
        power = 1e-6
        for _ in range(e if signed else e - 1):
            power *= 10
        slope, offset = 0.9 * power / 2**e, power * (0.45 / 2**e - 0.8)
        if signed and t in (0, 2):
            slope, offset = float(dynamic_map(True)[129]) / 2, 0.0
        elif signed and t == 128:
            slope, offset = 2.0**-7, 0.0
        elif not signed and t in (1, 256):
            slope, offset = 1 / 255, -1 / 255
        slopes.append(slope)
        offsets.append(offset)
    return torch.tensor(slopes), torch.tensor(offsets)


def _code(index: Tensor, negative: Tensor, codec: str) -> Tensor:
    """Positions in :func:`magnitudes` and signs to codes."""
    zero = ZERO_CODE.get(codec, 0)
    if codec == "fp8":
        return (index + 128 * negative).to(torch.uint8)
    return (zero + torch.where(negative, -index, index)).remainder(256).to(torch.uint8)


def _root(x: Tensor) -> Tensor:
    """The correctly rounded root, which torch's float32 sqrt is not."""
    return x.double().sqrt().float()


def _over(top: float, largest: Tensor) -> Tensor:
    """top / largest, rounded once: with a Python number, torch multiplies by a reciprocal."""
    return torch.full_like(largest, top) / largest


def _nearest(x: Tensor, largest: Tensor, codec: str) -> Tensor:
    """Positions in :func:`magnitudes` for blocks x [b, block] with their largest magnitudes [b, 1], all float32."""
    power = torch.where(largest < 2.0**-100, 2.0**100, torch.where(largest > 2.0**100, 2.0**-100, 1.0))
    a, top = (x * power).abs(), largest * power
    if codec in ("dyn8", "dyn8u"):
        return _search(a / top, magnitudes(codec))
    if codec == "dyn4":
        return _search(a * _over(1.0, top), magnitudes(codec))
    if codec == "cmp8":
        k = torch.tensor(1 / 254)
        return (a / (a.double() * k.double() + (top * k).double()).float()).round().long()
    if codec == "cmp8u":
        index = (_root(x) * _over(255.0, _root(largest))).round().long()
    elif codec == "lin4u":
        return (a * _over(16.0, top)).round().long().clamp(min=1) - 1
    elif codec in ("fp8", "fp8u"):
        y = (a * _over(448.0, top)).clamp(max=448)
        index = y.to(torch.float8_e4m3fn).view(torch.uint8).long()
    else:
        index = (a * _over(_TOP[codec], top)).round().long()
    return index if codec in SIGNED else torch.where(x > 0, index.clamp(min=1), index)


def _search(y: Tensor, values: Tensor) -> Tensor:
    """Nearest of values, ties to the smaller; midpoints are exact in float64."""
    values = values.double()
    return torch.searchsorted((values[1:] + values[:-1]) / 2, y.double(), right=False)


def _stochastic(x: Tensor, scale: Tensor, nearest: Tensor, codec: str, bits: Tensor) -> Tensor:
    """One of the positions around x, so that the mean of the values is x."""
    values = magnitudes(codec)
    y = x.abs() / (scale * scale if codec == "cmp8u" else scale)
    low = torch.where(values[nearest] <= y, nearest, nearest - 1)
    first = 1 if codec in ("lin8u", "cmp8u", "fp8u") else 0
    inside = (low >= first) & (low + 1 < len(values) - (x < 0).long() * (codec in ZERO_CODE))
    low = torch.where(inside, low, 0)
    below, gap = values[low], values[low + 1] - values[low]
    up = y - below > gap * (bits * 2.0**-16)
    return torch.where(inside, low + up, nearest)


def pack(codes: Tensor, codec: str) -> Tensor:
    """4-bit codes two a byte, the first in the high half."""
    if codec not in FOUR_BITS:
        return codes
    even = torch.nn.functional.pad(codes.reshape(-1), (0, codes.numel() % 2))
    return even[::2] << 4 | even[1::2]


def unpack(codes: Tensor, codec: str, numel: int | None = None) -> Tensor:
    """And back."""
    if codec not in FOUR_BITS:
        return codes
    return torch.stack([codes >> 4, codes & 15], 1).reshape(-1)[:numel]


def quantize_block(
    x: Tensor, codec: str = "dyn8", block: int = 256, round_mode: int = 0, rng: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`slkernels.quantize_block`."""
    flat = x.reshape(-1).float()
    if codec not in SIGNED:
        flat = torch.where(flat < 0, 0.0, flat)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    largest = blocks.abs().amax(1) if blocks.numel() else blocks.new_zeros(0)
    largest = torch.where(largest.isfinite(), largest, torch.nan)
    scale = (_root(largest) if codec == "cmp8u" else largest) / _TOP.get(codec, 1.0)
    known = (largest > 0)[:, None]
    safe = torch.where(known, blocks, 0.0)
    index = _nearest(safe, torch.where(known, largest[:, None], 1.0), codec)
    if round_mode == 1:
        seed, step = rng.tolist()
        bits = torch.nn.functional.pad(rounding_bits(flat.numel(), seed, step), (0, -flat.numel() % block))
        index = _stochastic(safe, scale[:, None], index, codec, bits.view(-1, block))
    negative = safe < 0
    if codec in ("dyn8", "dyn4"):
        index = torch.where(negative, index.clamp(max=len(magnitudes(codec)) - 2), index)
    if codec == "fp8":
        negative = safe.signbit()
    codes = torch.where(known, _code(index, negative, codec), ZERO_CODE.get(codec, 0)).view(-1)[: flat.numel()]
    return pack(codes, codec) if codec in FOUR_BITS else codes.view(x.shape), scale


def dequantize_block(
    codes: Tensor,
    scale: Tensor,
    codec: str = "dyn8",
    block: int = 256,
    dtype: torch.dtype | None = None,
    numel: int | None = None,
) -> Tensor:
    """See :func:`slkernels.dequantize_block`."""
    each = unpack(codes, codec, numel).reshape(-1).long()
    scales = scale.repeat_interleave(block)[: each.numel()]
    values = (each * scales).square() if codec == "cmp8u" else code_values(codec)[each] * scales
    return (values if codec in FOUR_BITS else values.view(codes.shape)).to(dtype or torch.float32)


def decode_in_step(codes: Tensor, scale: Tensor, codec: str, block: int, numel: int | None = None) -> Tensor:
    """What the steps read, float32: dyn8 and dyn8u by one FMA, t (slope scale) + (offset scale), the others exactly."""
    if codec not in ("dyn8", "dyn8u"):
        return dequantize_block(codes, scale, codec, block, numel=numel)
    t = codes.long() - 127 if codec == "dyn8" else codes.long() + 1
    slope, offset = (table[t.abs()] for table in _lines(codec == "dyn8"))
    each = scale.repeat_interleave(block)[: codes.numel()].view(codes.shape)
    line = t.double() * (slope * each).double() + (torch.where(t < 0, -offset, offset) * each).double()
    return line.float()
