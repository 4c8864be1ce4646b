"""Family semi24, packing: 2:4 pruning and packing both ways, against a copy of as many bytes and PyTorch's formula."""

from __future__ import annotations

import slkernels
import torch

from ..case import OURS, Case, Provider, Target
from ..data import generator, nbytes, uniform

COPY = "copy"
FORMULA = "torch formula"


def _kept(x: torch.Tensor) -> torch.Tensor:
    """The positions of the two largest of each group of a row, by topk: what a script does."""
    return x.view(x.shape[0], -1, 4).abs().topk(2, dim=-1, sorted=False).indices.sort(-1).values


def pack_problem(n: int, m: int, dtype: torch.dtype, by: str):
    def make(device, seed):
        W = uniform(n, m, dtype=dtype, gen=generator(device, seed))
        packs = slkernels.prune_compress24(W, by)
        mask = slkernels.prune24(W, by)
        traffic = nbytes(W, *packs)
        source = torch.zeros(traffic // 2, dtype=torch.uint8, device=device)  # its copy allocates, as the op does

        def formula():
            """Rows only; both orientations by topk and gather, codes packed two a byte."""
            kept = _kept(W)
            dense = torch.zeros_like(W).view(n, -1, 4).scatter_(-1, kept, W.view(n, -1, 4).gather(-1, kept)).view(n, m)
            result = []
            for x, slots in ((W, kept), (dense.t().contiguous(), None)):
                slots = _kept(x) if slots is None else slots
                codes = (slots[..., 0] | slots[..., 1] << 2).to(torch.uint8)
                values = x.view(x.shape[0], -1, 4).gather(-1, slots).flatten(1)
                result += [values, codes[:, 0::2] | codes[:, 1::2] << 4]
            return tuple(result)

        def pack_error(got) -> float:
            """0 where the packs are of W under a mask that keeps as much of every row's groups as ours does."""
            dense, again = slkernels.decompress24(*got[:2], n, m), slkernels.decompress24(*got[2:], m, n).t()
            wrong = ((dense != W) & (dense != 0)).any() or ((again != dense) & (again != 0)).any()
            lost = (W.double() * mask).abs().sum() - dense.double().abs().sum()
            return 2.0 * float(bool(wrong) or abs(float(lost)) > 1e-6)

        providers = {
            OURS: Provider(lambda: slkernels.prune_compress24(W, by), pack_error, 0.0, traffic),
            COPY: Provider(source.clone, lambda got: 2.0 * float(got.numel() != source.numel()), 0.0, traffic),
        }
        if by == "row":
            providers[FORMULA] = Provider(formula, pack_error, 0.0, traffic)
        return providers

    return make


def cases() -> list[Case]:
    """All cases of the family's packing."""
    found = []
    for size in (1024, 4096):
        for dtype in (torch.float32, torch.bfloat16):
            for by in ("row", "transposable"):
                found.append(
                    Case(
                        "semi24",
                        f"prune_compress24 {by}",
                        f"{size}x{size}",
                        dtype,
                        pack_problem(size, size, dtype, by),
                        baseline=COPY,
                        targets=(Target(COPY, 1 / 3),) if size == 4096 else (),
                        quick=size == 1024 and by == "row" and dtype == torch.bfloat16,
                    )
                )
    return found
