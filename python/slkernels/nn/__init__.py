"""Modules: sparse plus low-rank and low-rank in place of ``torch.nn.Linear``, attention over a block-sparse pattern."""

from .block_sparse_attention import BlockSparseAttention
from .lowrank_linear import LowRankLinear
from .sl_linear import SLLinear, exclude_indices_from_ddp

__all__ = ["BlockSparseAttention", "LowRankLinear", "SLLinear", "exclude_indices_from_ddp"]
