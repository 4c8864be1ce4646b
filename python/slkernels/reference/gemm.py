"""Family ``gemm``."""

from torch import Tensor


def gemm(a: Tensor, b: Tensor) -> Tensor:
    """C [m, n] = A [m, k] B [n, k]^T."""
    return a @ b.t()
