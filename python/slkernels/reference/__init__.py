"""The plain PyTorch definition of every op: the specification that the tests hold the kernels to.

The functions have the names and arguments of the ops, work in any floating dtype on any device, and are
differentiable by autograd. They are written to be read, not to be fast: S is a dense matrix here.
"""

from . import attention, optim, project, semi24
from .gemm import gemm
from .lowrank import lowrank_linear
from .random_support import permute, random_blocks8, random_support, round_keys
from .semi24_linear import dense24, dw_compress24, kept_columns24, linear24, linear24_dx, linear24_train
from .sl import sl_linear
from .sparse import check_support, compose, gather_support, sddmm, spmm, spmm_t, support_rows, to_dense

__all__ = [
    "attention",
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
    "optim",
    "permute",
    "project",
    "random_blocks8",
    "random_support",
    "round_keys",
    "sddmm",
    "semi24",
    "sl_linear",
    "spmm",
    "spmm_t",
    "support_rows",
    "to_dense",
]
