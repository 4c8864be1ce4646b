"""Optimizer steps in a subspace, between two of them: GaLore's AdamW against galore-torch's formula on torch's ops.

Both have the same projection, float32 or 16-bit moments as galore-torch keeps them ("torch formula"), and do the same
two products; what differs is everything around those.
"""

from __future__ import annotations

import math
from functools import cache

import torch

from ..case import OURS, Case, Provider, Target
from ..data import generator, nbytes, uniform

FORMULA = "torch formula"
EIGHT_BIT = "slkernels 8-bit"

_LR, _SCALE, _BETAS, _EPS = 1e-2, 0.25, (0.9, 0.999), 1e-8
# Relative error of the change of W after two steps. float32: eps stands beside another square root in the formula.
# bfloat16: weights and moments round.
_ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 0.1}
_ALLOWED_8BIT = 0.1


class _Formula:
    """galore-torch's AdamW on one weight with a given projection (galore_torch/adamw.py)."""

    def __init__(self, W: torch.Tensor, G: torch.Tensor, P: torch.Tensor) -> None:
        self.W, self.G, self.P, self.t = W, G, P, 0
        self.m = torch.zeros(G.shape[0], P.shape[0], dtype=G.dtype)
        self.v = torch.zeros_like(self.m)

    def step(self) -> None:
        self.t += 1
        R = torch.matmul(self.G, self.P.t())
        self.m.mul_(_BETAS[0]).add_(R, alpha=1.0 - _BETAS[0])
        self.v.mul_(_BETAS[1]).addcmul_(R, R, value=1.0 - _BETAS[1])
        denom = self.v.sqrt().add_(_EPS)
        size = _LR * math.sqrt(1.0 - _BETAS[1] ** self.t) / (1.0 - _BETAS[0] ** self.t)
        norm_grad = torch.matmul(self.m / denom, self.P) * _SCALE
        self.W.add_(norm_grad, alpha=-size)


def step_problem(n: int, rank: int, dtype: torch.dtype):
    def make(device, seed):
        from slkernels.optim import GaLoreAdamW

        gen = generator(device, seed)
        start = uniform(n, n, dtype=dtype, gen=gen, scale=0.02)
        G = uniform(n, n, dtype=dtype, gen=gen)
        P = torch.linalg.qr(torch.randn(n, rank, generator=gen, device=device))[0].t().contiguous().to(dtype)
        count = 2

        @cache
        def expected() -> torch.Tensor:
            exact = _Formula(start.double(), G.double(), P.double())
            for _ in range(count):
                exact.step()
            return exact.W - start.double()

        def error_of(W: torch.Tensor, step, allowed: float):
            def error(_) -> float:
                for _ in range(count - 1):  # run has made the first step
                    step()
                change = W.detach().double() - start.double()
                return float((change - expected()).norm() / expected().norm()) / allowed

            return error

        def ours(codec: str | None, allowed: float, state_bytes: float) -> Provider:
            W = torch.nn.Parameter(start.clone())
            W.grad = G
            optimizer = GaLoreAdamW([W], _LR, _BETAS, _EPS, rank=rank, scale=_SCALE, codec=codec)
            group = optimizer.param_groups[0]
            optimizer.state[W] = {**optimizer._new_state(group, W), "step": torch.zeros((), device=device)}
            optimizer.state[W]["right"].copy_(P)
            optimizer.state[W]["due"].fill_(2**62)  # no new subspace
            return Provider(optimizer.step, error_of(W, optimizer.step, allowed), flops, traffic + state_bytes)

        # Two products; G and W are read, W is written, P is read twice; moments are read and written.
        flops, traffic = 4.0 * n * n * rank, 3.0 * nbytes(start) + 2.0 * nbytes(P)
        formula = _Formula(start.clone(), G, P)
        moments = n * rank
        return {
            OURS: ours(None, _ALLOWED[dtype], 16.0 * moments),
            EIGHT_BIT: ours("dyn8", max(_ALLOWED[dtype], _ALLOWED_8BIT), 4.06 * moments),
            FORMULA: Provider(
                formula.step,
                error_of(formula.W, formula.step, _ALLOWED[dtype]),
                flops,
                traffic + 2.0 * nbytes(formula.m, formula.v),
            ),
        }

    return make


def cases() -> list[Case]:
    """All cases of the family."""
    return [
        Case(
            "galore",
            "GaLore step",
            f"{n}x{n} r={rank}",
            dtype,
            step_problem(n, rank, dtype),
            baseline=FORMULA,
            targets=(Target(FORMULA, 2.0),),
            quick=n == 1024,
        )
        for dtype in (torch.float32, torch.bfloat16)
        for n, rank in ((4096, 1024), (1024, 256))
    ]
