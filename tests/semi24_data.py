"""2:4 packs in layout plain, drawn or made in plain PyTorch: independent of the ops that pack."""

from __future__ import annotations

import torch
from harness import Inputs
from slkernels.reference import kept_columns24
from torch import Tensor

CODES = torch.tensor([0x4, 0x8, 0xC, 0x9, 0xD, 0xE], dtype=torch.uint8)
FIRST, SECOND = CODES.long() & 3, CODES.long() >> 2


def meta_of(codes: Tensor) -> Tensor:
    """codes [n, groups] -> bytes of two groups."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=0x4)
    return codes[:, 0::2] | codes[:, 1::2] << 4


def drawn_pack(inputs: Inputs, n: int, m: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """(values, meta) of a matrix [n, m] with random codes; kept padding columns are zero."""
    groups = (m + 3) // 4
    meta = meta_of(CODES[torch.randint(6, (n, groups), generator=inputs.generator)]).to(inputs.device)
    values = inputs.tensor(n, 2 * groups, scale=scale)
    return torch.where(kept_columns24(meta, m) < m, values, 0), meta


def pruned_pack(w: Tensor) -> tuple[Tensor, Tensor]:
    """(values, meta) of w's two largest of every four along a row, the lower column first among equals."""
    n, m = w.shape
    groups = torch.nn.functional.pad(w, (0, -m % 4)).view(n, -1, 4)
    kept = groups.abs().sort(dim=2, descending=True, stable=True).indices[:, :, :2].sort(dim=2).values
    return groups.gather(2, kept).view(n, -1), meta_of((kept[:, :, 0] | kept[:, :, 1] << 2).to(torch.uint8))


def transposable_pack(inputs: Inputs, n: int, m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(values, meta, values_t, meta_t) of a matrix that keeps two of four along its rows and along its columns."""
    base = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1]], dtype=torch.bool)
    tiles = torch.stack([base[torch.randperm(4, generator=inputs.generator)] for _ in range(-(-n // 4) * -(-m // 4))])
    mask = tiles.view(-(-n // 4), -(-m // 4), 4, 4).transpose(1, 2).reshape(-(-n // 4) * 4, -1)[:n, :m]
    w = inputs.tensor(n, m) * mask.to(inputs.device)
    return *pruned_pack(w), *pruned_pack(w.t())
