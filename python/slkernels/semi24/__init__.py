"""Family ``semi24``: 2:4 sparse weights, of which two of every four along a row are kept.

Formats and layouts: include/slkernels/semi24.h.
"""

from ._dispatch import sparse_pays24
from ._interop import from_torch_semi_structured, to_torch_semi_structured
from ._linear import dw_compress24, linear24, linear24_packed, linear24_train
from ._mask import gate_to_mask, maskllm24, maskllm_prior, srste_grad_
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
from ._relu2 import relu2_prune24
from .scores import input_norms, wanda_score

__all__ = [
    "check24",
    "compress24",
    "convert24",
    "decompress24",
    "dw_compress24",
    "from_torch_semi_structured",
    "gate_to_mask",
    "input_norms",
    "linear24",
    "linear24_packed",
    "linear24_train",
    "mask_of24",
    "maskllm24",
    "maskllm_prior",
    "prune24",
    "prune_compress24",
    "relu2_prune24",
    "repack24_perm",
    "repack24_t_",
    "sparse_pays24",
    "srste_grad_",
    "to_torch_semi_structured",
    "wanda_score",
]
