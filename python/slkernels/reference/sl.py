"""Definition of the ``sl`` family."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .sparse import compose


def sl_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    alpha: float,
    bias: Tensor | None = None,
    path: str = "auto",
    validate: bool = True,
    weight: Tensor | None = None,
) -> Tensor:
    """y [..., n] = x (alpha B A + S)^T + bias (SLTrain, arXiv 2406.02214, equation 2). ``path`` changes how it is
    computed, never what; nor does ``weight``, which holds alpha B A + S."""
    if path not in ("auto", "chain", "compose"):
        raise RuntimeError(f"slkernels::sl_linear: path must be auto, chain or compose, got {path}")
    return F.linear(x, compose(values, crow, col, x.shape[-1], A, B, alpha, validate=validate), bias)
