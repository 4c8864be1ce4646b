"""Definition of ``random_support`` and ``random_blocks8``, equal to the kernels bit for bit.

Sampling k of N positions without replacement is evaluating a keyed permutation of [0, N) at 0 .. k - 1: an alternating
Feistel network with cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002).
"""

from __future__ import annotations

import torch
from torch import Tensor

_U32, _U64 = 2**32 - 1, 2**64 - 1
_ROUNDS = 8
_STREAM = 0xD1342543DE82EF95  # apart from each other: whole matrix, edges, rows
_GOLDEN = 0x9E3779B97F4A7C15


def _mix64(x: int) -> int:
    """SplitMix64's output function."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _U64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _U64
    return x ^ (x >> 31)


def round_keys(seed: int, stream: int) -> list[int]:
    """The round keys of stream 0 (whole matrix), 1, 2 (right and bottom edge of blocks) or 1 + row."""
    key = _mix64((_mix64(seed & _U64) + stream * _STREAM) & _U64)
    return [_mix64((key + (r + 1) * _GOLDEN) & _U64) & _U32 for r in range(_ROUNDS)]


def _round(half: Tensor, key: int | Tensor) -> Tensor:
    """MurmurHash3's finalizer, on 32 bits."""
    h = half ^ key
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _U32
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _U32
    return h ^ (h >> 16)


def permute(x: Tensor, size: int, keys: list[int] | list[Tensor]) -> Tensor:
    """The images of x (int64, in [0, size)) under a permutation of [0, size). A key may be one for each x."""
    bits = max(size - 1, 0).bit_length()
    low_bits = bits - bits // 2
    high_mask, low_mask = 2 ** (bits // 2) - 1, 2**low_bits - 1

    def encrypt(x: Tensor) -> Tensor:
        high, low = x >> low_bits, x & low_mask
        for r in range(0, _ROUNDS, 2):
            high = high ^ (_round(low, keys[r]) & high_mask)
            low = low ^ (_round(high, keys[r + 1]) & low_mask)
        return high << low_bits | low

    x = encrypt(x)
    while (outside := x >= size).any():  # walk the cycle until it is inside again
        x = torch.where(outside, encrypt(x), x)
    return x


def _to_csr(rows: Tensor, cols: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    order = torch.argsort(rows * max(m, 1) + cols)
    crow = torch.zeros(n + 1, dtype=torch.int32)
    crow[1:] = torch.bincount(rows, minlength=n).cumsum(0)
    return crow, cols[order].to(torch.int16 if m <= 32768 else torch.int32)


def random_blocks8(n: int, m: int, density: float, seed: int) -> tuple[Tensor, Tensor]:
    """CSR of the chosen blocks over the [ceil(n/8), ceil(m/8)] grid. Whole blocks, blocks cut by the right edge, by the
    bottom edge and by both are drawn apart, each at ``density``."""
    grid_n, grid_m, whole_n, whole_m = (n + 7) // 8, (m + 7) // 8, n // 8, m // 8
    whole = permute(torch.arange(int(density * whole_n * whole_m)), whole_n * whole_m, round_keys(seed, 0))
    right = torch.arange(int(density * whole_n) if m % 8 else 0)
    bottom = torch.arange(int(density * whole_m) if n % 8 else 0)
    corner = torch.arange(int(density) if m % 8 and n % 8 else 0)
    rows = [
        whole // max(whole_m, 1),
        permute(right, whole_n, round_keys(seed, 1)),
        bottom * 0 + whole_n,
        corner + whole_n,
    ]
    cols = [
        whole % max(whole_m, 1),
        right * 0 + whole_m,
        permute(bottom, whole_m, round_keys(seed, 2)),
        corner + whole_m,
    ]
    return _to_csr(torch.cat(rows), torch.cat(cols), grid_n, grid_m)


def random_support(n: int, m: int, density: float, seed: int, kind: str = "uniform") -> tuple[Tensor, Tensor]:
    """(crow, col) of a random support of an [n, m] matrix; see :func:`slkernels.random_support` for the kinds."""
    if kind == "uniform":
        positions = permute(torch.arange(int(density * n * m)), n * m, round_keys(seed, 0))
        return _to_csr(positions // max(m, 1), positions % max(m, 1), n, m)
    if kind in ("row", "column"):
        count = int(density * m)
        rows = torch.arange(n).repeat_interleave(count)
        slots = torch.arange(count).repeat(n)
        if kind == "column":
            return _to_csr(rows, permute(slots, m, round_keys(seed, 0)), n, m)
        by_row = [round_keys(seed, 1 + row) for row in range(n)]
        keys = [torch.tensor([k[r] for k in by_row], dtype=torch.int64)[rows] for r in range(_ROUNDS)]
        return _to_csr(rows, permute(slots, m, keys), n, m)
    if kind == "block8":
        block_crow, block_col = random_blocks8(n, m, density, seed)
        mask = torch.zeros(block_crow.numel() - 1, (m + 7) // 8, dtype=torch.bool)
        mask[torch.arange(block_crow.numel() - 1).repeat_interleave(block_crow.diff().long()), block_col.long()] = True
        mask = mask.repeat_interleave(8, 0).repeat_interleave(8, 1)[:n, :m]
        rows, cols = mask.nonzero(as_tuple=True)
        return _to_csr(rows, cols, n, m)
    raise RuntimeError(f"slkernels::random_support: kind must be uniform, row, column or block8, got {kind}")
