"""slkernels: CUDA and CPU SIMD kernels for sparse + low-rank models, as torch ops."""

from __future__ import annotations

import torch as _torch  # noqa: F401  (first: _C resolves its symbols in libtorch)

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"slkernels: the compiled core slkernels._C did not load ({error}). "
        "If slkernels was imported from its source folder, build it first: "
        "`pip install --no-build-isolation -e .` or `make test`. "
        "If it was installed as a wheel, the wheel must match this Python, and torch must be >= 2.10."
    ) from error

from . import attention, convert, nn, optim, semi24
from .block8 import block8_sddmm, block8_spmm, block8_spmm_t
from .gemm import gemm
from .lowrank import lowrank_linear
from .lowrank_shared import lowrank_linear_multi, lowrank_swiglu
from .optim import adam_q_, adam_q_dir_, ademamix_q_, dequantize_block, momentum_q_, quantize_block
from .project import (
    project,
    project_back,
    project_back_add_,
    rand_matrix,
    rand_project,
    rand_project_back,
    randomized_range,
)
from .project_apollo import apollo_scale_update_
from .project_quant import dequantize_group, grad_carrier, project_back_add_q_, quantize_group, w8a16_linear
from .semi24 import (
    check24,
    compress24,
    convert24,
    decompress24,
    dw_compress24,
    gate_to_mask,
    linear24,
    linear24_packed,
    linear24_train,
    mask_of24,
    maskllm24,
    maskllm_prior,
    prune24,
    prune_compress24,
    relu2_prune24,
    repack24_perm,
    repack24_t_,
    srste_grad_,
)
from .sl import sl_linear
from .sparse import (
    check_support,
    compose,
    gather_support,
    random_blocks8,
    random_support,
    sddmm,
    spmm,
    spmm_t,
)
from .support import Support

__version__: str = _C.build_info()["version"]


def build_info() -> dict[str, object]:
    """What this build is: version, git commit, compiler, CUDA (yes or no, architectures), the torch ABI that it
    targets, the CPU instruction set in use and those compiled in."""
    return _C.build_info()


__all__ = [
    "Support",
    "adam_q_",
    "adam_q_dir_",
    "ademamix_q_",
    "apollo_scale_update_",
    "attention",
    "block8_sddmm",
    "block8_spmm",
    "block8_spmm_t",
    "build_info",
    "check24",
    "check_support",
    "compose",
    "compress24",
    "convert",
    "convert24",
    "decompress24",
    "dequantize_block",
    "dequantize_group",
    "dw_compress24",
    "gate_to_mask",
    "gather_support",
    "gemm",
    "grad_carrier",
    "linear24",
    "linear24_packed",
    "linear24_train",
    "lowrank_linear",
    "lowrank_linear_multi",
    "lowrank_swiglu",
    "mask_of24",
    "maskllm24",
    "maskllm_prior",
    "momentum_q_",
    "nn",
    "optim",
    "project",
    "project_back",
    "project_back_add_",
    "project_back_add_q_",
    "prune24",
    "prune_compress24",
    "quantize_block",
    "quantize_group",
    "rand_matrix",
    "rand_project",
    "rand_project_back",
    "random_blocks8",
    "random_support",
    "randomized_range",
    "relu2_prune24",
    "repack24_perm",
    "repack24_t_",
    "sddmm",
    "semi24",
    "sl_linear",
    "spmm",
    "spmm_t",
    "srste_grad_",
    "w8a16_linear",
]
