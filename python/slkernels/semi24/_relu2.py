"""2:4 activations: squared ReLU, pruned and packed both ways ("ELAS", arXiv 2605.03667)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import check, define
from ._pack import _check_layout, _check_matrix, _new_packed

_ops = torch.ops.slkernels


def _relu2_fake(x, layout="plain"):
    op = "relu2_prune24"
    check(x.dim() == 2, op, lambda: f"x must be [tokens, m], got {list(x.shape)}")
    _check_layout(op, layout, x)
    tokens, m = x.shape
    return *_new_packed(x, tokens, m, layout), *_new_packed(x, m, tokens, layout)
