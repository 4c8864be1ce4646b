"""Family ``semi24``: 2:4 sparse weights, of which two of every four along a row are kept.

Formats and layouts: include/slkernels/semi24.h.
"""

from ._linear import dw_compress24, linear24, linear24_packed, linear24_train

__all__ = ["dw_compress24", "linear24", "linear24_packed", "linear24_train"]
