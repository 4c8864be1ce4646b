"""Definition of the ``lowrank`` family."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"none": lambda z: z, "relu": F.relu, "silu": F.silu, "gelu": F.gelu}


def lowrank_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    alpha: float = 1.0,
    gate: Tensor | None = None,
    activation: str = "none",
    bias: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """y [..., n] = alpha (act(x A^T) * gate) B^T + x base^T + bias; x [..., m], A [r, m], B [n, r], gate [r], bias [n],
    base [n, m].

    The chain of CoLA (arXiv 2502.10940), gated as in SoRA (arXiv 2311.11696).
    """
    z = ACTIVATIONS[activation](F.linear(x, A))
    if gate is not None:
        z = z * gate
    y = F.linear(z * alpha, B, bias)
    return y if base is None else y + F.linear(x, base)


def lowrank_linear_multi(
    x: Tensor,
    A: Tensor,
    B: Sequence[Tensor],
    alpha: Sequence[float] | None = None,
    bias: Sequence[Tensor] | None = None,
    base: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """y_i [..., n_i] = alpha_i (x A_i^T) B_i^T + x base_i^T + bias_i, with the A_i [r_i, m] stacked in A."""
    parts = A.split([b.shape[1] for b in B])
    alpha, bias, base = alpha or [1.0] * len(B), bias or [None] * len(B), base or [None] * len(B)
    return [lowrank_linear(x, parts[i], b, alpha[i], bias=bias[i], base=base[i]) for i, b in enumerate(B)]


def lowrank_swiglu(x: Tensor, A: Tensor, B_gate: Tensor, B_up: Tensor, alpha: float = 1.0) -> Tensor:
    """h [..., n] = silu(gate) * up, the two products of lowrank_linear_multi (SwiGLU, arXiv 2002.05202)."""
    gate, up = lowrank_linear_multi(x, A, (B_gate, B_up), (alpha, alpha))
    return F.silu(gate) * up
