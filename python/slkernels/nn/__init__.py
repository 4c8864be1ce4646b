"""Modules in place of ``torch.nn.Linear``: sparse plus low-rank, and low-rank."""

from .lowrank_linear import LowRankLinear
from .sl_linear import SLLinear, exclude_indices_from_ddp

__all__ = ["LowRankLinear", "SLLinear", "exclude_indices_from_ddp"]
