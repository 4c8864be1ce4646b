"""Modules: sparse plus low-rank, low-rank and 8-bit in place of ``torch.nn.Linear``, attention over a block-sparse
pattern."""

from .block_sparse_attention import BlockSparseAttention
from .int8_linear import Int8Linear
from .lowrank_linear import LowRankLinear
from .sl_linear import SLLinear, exclude_indices_from_ddp
from .weight_cache import cached_weights

__all__ = [
    "BlockSparseAttention",
    "Int8Linear",
    "LowRankLinear",
    "SLLinear",
    "cached_weights",
    "exclude_indices_from_ddp",
]
