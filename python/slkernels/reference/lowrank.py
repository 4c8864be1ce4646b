"""Definition of the ``lowrank`` family."""

from __future__ import annotations

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
) -> Tensor:
    """y [..., n] = alpha (act(x A^T) * gate) B^T + bias; x [..., m], A [r, m], B [n, r], gate [r], bias [n].

    The chain of CoLA (arXiv 2502.10940), gated as in SoRA (arXiv 2311.11696).
    """
    z = ACTIVATIONS[activation](F.linear(x, A))
    if gate is not None:
        z = z * gate
    return F.linear(z * alpha, B, bias)
