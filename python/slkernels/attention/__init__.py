"""Block-sparse attention: one layout for every mask, its builders, patterns by name, and the op."""

from . import _layout_ops, patterns  # noqa: F401  (registers the ops)
from ._ops import ColumnStatistics, attention_colstats, block_sparse_attention, merge_attention_states
from .attend import attend
from .layout import BlockCols, BlockRows, Density

__all__ = [
    "BlockCols",
    "BlockRows",
    "ColumnStatistics",
    "Density",
    "attend",
    "attention_colstats",
    "block_sparse_attention",
    "merge_attention_states",
    "patterns",
]
