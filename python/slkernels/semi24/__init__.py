"""Family ``semi24``: 2:4 sparse weights, of which two of every four along a row are kept.

Formats and layouts: include/slkernels/semi24.h.
"""

from ._dispatch import sparse_pays24
from ._interop import from_torch_semi_structured, to_torch_semi_structured
from ._linear import dw_compress24, linear24, linear24_packed, linear24_train
from ._pack import (
    check24,
    compress24,
    convert24,
    decompress24,
    mask_of24,
    prune24,
    prune_compress24,
    repack24_perm,
    repack24_t_,
)

__all__ = [
    "check24",
    "compress24",
    "convert24",
    "decompress24",
    "dw_compress24",
    "from_torch_semi_structured",
    "linear24",
    "linear24_packed",
    "linear24_train",
    "mask_of24",
    "prune24",
    "prune_compress24",
    "repack24_perm",
    "repack24_t_",
    "sparse_pays24",
    "to_torch_semi_structured",
]
