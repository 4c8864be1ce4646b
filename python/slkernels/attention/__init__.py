"""Block-sparse attention: one layout for every mask, its builders, patterns by name, and the op."""

from . import _layout_ops, _ops, patterns  # noqa: F401  (registers the ops)
from .attend import attend
from .layout import BlockCols, BlockRows, Density

__all__ = ["BlockCols", "BlockRows", "Density", "attend", "patterns"]
