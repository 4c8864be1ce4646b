"""Packed weights from and to ``torch.sparse``'s semi-structured tensors."""

from __future__ import annotations

from torch import Tensor
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUTLASS

from .._library import check
from ._pack import check24, check_packed, convert24


def to_torch_semi_structured(values: Tensor, meta: Tensor, n: int, m: int) -> SparseSemiStructuredTensorCUTLASS:
    """A plain packed weight as the tensor that ``torch.sparse.to_sparse_semi_structured`` makes with its CUTLASS
    backend: layout sm80. torch multiplies with it on a GPU only.

    Args:
        values, meta: plain layout, bfloat16 or float16. n, m: multiples of 32 and of 64, as torch requires.

    Raises:
        RuntimeError: sizes, shapes or dtypes that do not fit.
    """
    op = "to_torch_semi_structured"
    check_packed(op, values, meta, n, m, "plain")
    check(n % 32 == 0 and m % 64 == 0, op, lambda: f"n and m must be multiples of 32 and 64, got {n} and {m}")
    packed, packed_meta = convert24(values.detach(), meta, n, m, "plain", "sm80")
    return SparseSemiStructuredTensorCUTLASS(
        (n, m), packed=packed, meta=packed_meta, packed_t=None, meta_t=None, compressed_swizzled_bitmask=None
    )


def from_torch_semi_structured(tensor: SparseSemiStructuredTensor) -> tuple[Tensor, Tensor]:
    """(values, meta) in plain layout of a semi-structured tensor of torch's CUTLASS backend.

    Args:
        tensor: bfloat16 or float16, of ``to_sparse_semi_structured`` with the CUTLASS backend
            (``SparseSemiStructuredTensor._FORCE_CUTLASS = True``). cuSPARSELt's format is not documented: convert its
            tensors by ``compress24(dense, dense != 0)`` from ``dense = tensor.to_dense()`` instead. Neither can the
            tensors of ``prune_dense_static_sort`` be read, whose metadata have another order.

    Raises:
        RuntimeError: another kind of tensor; codes that are not 2:4.
    """
    op = "from_torch_semi_structured"
    check(
        isinstance(tensor, SparseSemiStructuredTensorCUTLASS)
        and tensor.packed is not None
        and tensor.meta is not None
        and tensor.meta.dim() == 2,
        op,
        lambda: f"tensor must be what to_sparse_semi_structured makes with CUTLASS, got {type(tensor).__name__}",
    )
    n, m = tensor.shape
    check_packed(op, tensor.packed, tensor.meta, n, m, "sm80")
    check24(tensor.meta, n, m, "sm80")
    return convert24(tensor.packed, tensor.meta, n, m, "sm80", "plain")
