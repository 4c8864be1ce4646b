"""The plain PyTorch definition of every op: the specification that the tests hold the kernels to.

The functions have the names and arguments of the ops, work in any floating dtype on any device, and are
differentiable by autograd. They are written to be read, not to be fast: S is a dense matrix here.
"""

from . import attention, optim, project, semi24, semi24_mask
from .block8 import block8_sddmm, block8_spmm, block8_spmm_t, block8_to_dense
from .gemm import gemm
from .lowrank import lowrank_linear, lowrank_linear_multi, lowrank_swiglu
from .random_support import permute, random_blocks8, random_support, round_keys
from .semi24_linear import dense24, dw_compress24, kept_columns24, linear24, linear24_dx, linear24_train
from .sl import sl_linear
from .sparse import check_support, compose, gather_support, sddmm, spmm, spmm_t, support_rows, to_dense

__all__ = [
    "attention",
    "block8_sddmm",
    "block8_spmm",
    "block8_spmm_t",
    "block8_to_dense",
    "check_support",
    "compose",
    "dense24",
    "dw_compress24",
    "gather_support",
    "gemm",
    "kept_columns24",
    "linear24",
    "linear24_dx",
    "linear24_train",
    "lowrank_linear",
    "lowrank_linear_multi",
    "lowrank_swiglu",
    "optim",
    "permute",
    "project",
    "random_blocks8",
    "random_support",
    "round_keys",
    "sddmm",
    "semi24",
    "semi24_mask",
    "sl_linear",
    "spmm",
    "spmm_t",
    "support_rows",
    "to_dense",
]
