"""Family ``gemm``: C = A B^T on tensor cores, the product that other families' CUDA kernels grow from."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import check, define, needs_grad

_ops = torch.ops.slkernels

KERNELS = ("auto", "sm80", "sm90")


def _fake(a, b, kernel="auto"):
    check(a.dim() == 2, "gemm", lambda: f"a must be [m, k], got {list(a.shape)}")
    check(
        b.dim() == 2 and b.shape[1] == a.shape[1], "gemm", lambda: f"b must be [n, {a.shape[1]}], got {list(b.shape)}"
    )
    check(a.dtype == torch.bfloat16 and b.dtype == torch.bfloat16, "gemm", lambda: "a and b must be bfloat16")
    check(kernel in KERNELS, "gemm", lambda: f"kernel must be auto, sm80 or sm90, got {kernel}")
    return a.new_empty((a.shape[0], b.shape[0]))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1])


def _backward(ctx, dc):
    a, b = ctx.saved_tensors
    # The dense library reads transposed operands in place; ours would copy them.
    da = dc @ b if needs_grad(ctx, 0) else None
    db = dc.t() @ a if needs_grad(ctx, 1) else None
    return da, db, None


define(
    'gemm(Tensor a, Tensor b, str kernel="auto") -> Tensor',
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
)


def gemm(a: Tensor, b: Tensor, kernel: str = "auto") -> Tensor:
    """C = A B^T with fp32 sums, rounded once.

    A plain product, for study and as a yardstick of the kernels that build on it; a model's dense products belong to
    torch's library.

    Args:
        a, b: [m, k] and [n, k], bfloat16. On CUDA, rows that do not start at multiples of 16 bytes are copied first.
        kernel: ``"sm80"`` (cp.async, ldmatrix, mma.sync; compute capability 8.0 and newer), ``"sm90"`` (TMA, wgmma;
            9.0), or ``"auto"``: the newest that the GPU runs. On a CPU, torch's dense library is ``"auto"``.

    Returns:
        [m, n], bfloat16, contiguous.

    Raises:
        RuntimeError: shapes or dtypes that do not fit, or a kernel that the device does not run.
    """
    return _ops.gemm(a, b, kernel)
