"""Modules in place of ``torch.nn.Linear``: sparse plus low-rank, low-rank, and with an 8-bit weight."""

from .int8_linear import Int8Linear
from .lowrank_linear import LowRankLinear
from .sl_linear import SLLinear, exclude_indices_from_ddp

__all__ = ["Int8Linear", "LowRankLinear", "SLLinear", "exclude_indices_from_ddp"]
