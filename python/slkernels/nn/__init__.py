"""Modules: sparse plus low-rank, low-rank, 2:4 sparse and 8-bit in place of ``torch.nn.Linear``, attention over a
block-sparse pattern."""

from .block_sparse_attention import BlockSparseAttention
from .int8_linear import Int8Linear
from .linear24 import Linear24
from .lowrank_linear import LowRankLinear
from .mask_linear24 import MaskLinear24
from .sl_linear import SLLinear, exclude_indices_from_ddp
from .track24 import Tracking, track24
from .weight_cache import cached_weights

__all__ = [
    "BlockSparseAttention",
    "Int8Linear",
    "Linear24",
    "LowRankLinear",
    "MaskLinear24",
    "SLLinear",
    "Tracking",
    "cached_weights",
    "exclude_indices_from_ddp",
    "track24",
]
