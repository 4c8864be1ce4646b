"""The fixed positions of a sparse matrix S [n, m], as the CSR tensors that families ``sparse`` and ``sl`` take."""

from __future__ import annotations

from dataclasses import InitVar, dataclass

import torch
from torch import Tensor

from .sparse import _random_support_fake

_ops = torch.ops.slkernels
_INT32_MAX = 2**31 - 1
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def check_indices(crow: Tensor, col: Tensor, n: int, m: int) -> None:
    """:func:`slkernels.check_support`, for indices on any device: it runs once, so a copy to the CPU is affordable."""
    if not crow.is_meta:
        crow, col = crow.cpu(), col.cpu()
    _ops.check_support(crow, col, n, m)


def _as_int32(name: str, index: Tensor) -> Tensor:
    """index as contiguous int32; raises rather than wraps around."""
    if index.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be an integer tensor, got {index.dtype}")
    if index.dtype == torch.int64 and not index.is_meta:
        fault = ((index < -_INT32_MAX) | (index > _INT32_MAX)).flatten().nonzero()
        if len(fault):
            position = int(fault[0])
            raise ValueError(f"{name}[{position}] = {int(index.flatten()[position])} does not fit int32")
    return index.to(torch.int32).contiguous()


def _col_dtype(m: int) -> torch.dtype:
    return torch.int16 if m <= 32768 else torch.int32


@dataclass(frozen=True, eq=False, repr=False)
class Support:
    """The support of a sparse [n, m] matrix (SLTrain, arXiv 2406.02214, section 3: fixed, drawn at random).

    Args:
        crow: int32 [n + 1], contiguous; row i holds positions crow[i] to crow[i + 1] of ``col``.
        col: [nnz], contiguous, sorted and unique within a row; int16 when m <= 32768, else int32.
        n, m: rows and columns.
        validate: check every index, O(nnz); the error names the position of the first fault.

    Raises:
        RuntimeError: indices that are no support of an [n, m] matrix.
    """

    crow: Tensor
    col: Tensor
    n: int
    m: int
    validate: InitVar[bool] = True

    def __post_init__(self, validate: bool) -> None:
        if validate:
            check_indices(self.crow, self.col, self.n, self.m)

    # ---- constructors ------------------------------------------------------------------------------------------------

    @classmethod
    def random(
        cls,
        n: int,
        m: int,
        density: float,
        seed: int,
        kind: str = "uniform",
        device: torch.device | str | None = None,
    ) -> Support:
        """A support that is a pure function of (n, m, density, seed, kind), the same on every device and rank.

        ``kind`` is one of "uniform", "row", "block8", "column": see :func:`slkernels.random_support`.
        """
        device = torch.empty(0, device=device).device  # None is the default device, and `with torch.device(...)` counts
        draw = _random_support_fake if device.type == "meta" else _ops.random_support
        crow, col = draw(n, m, density, seed, kind, device)
        return cls(crow, col, n, m, validate=False)

    @classmethod
    def from_csr(cls, crow: Tensor, col: Tensor, n: int, m: int) -> Support:
        """From CSR indices of any integer dtype; ValueError or RuntimeError with the position of the first fault."""
        crow, col = _as_int32("crow", crow), _as_int32("col", col)
        check_indices(crow, col, n, m)
        return cls(crow, col.to(_col_dtype(m)), n, m, validate=False)

    @classmethod
    def from_dense_mask(cls, mask: Tensor) -> Support:
        """The nonzero positions of ``mask`` [n, m], bool or any other dtype."""
        if mask.dim() != 2:
            raise ValueError(f"mask must be [n, m], got {list(mask.shape)}")
        n, m = mask.shape
        row, col = mask.nonzero(as_tuple=True)
        if len(col) > _INT32_MAX:
            raise ValueError(f"a support holds at most {_INT32_MAX} positions, got {len(col)}")
        crow = torch.searchsorted(row, torch.arange(n + 1, device=mask.device))
        return cls(crow.to(torch.int32), col.to(_col_dtype(m)), n, m, validate=False)

    @classmethod
    def from_flat(cls, index: Tensor, n: int, m: int) -> Support:
        """From SLTrain's flat indices i * m + j, integers [nnz] in any order. A support is a set: where values go with
        the indices, use :meth:`from_flat_values`, which sorts both.

        Raises:
            TypeError: index is not an integer tensor.
            ValueError: out of range or duplicate, with the position in ``index`` of the first fault.
        """
        return cls._from_flat(index, n, m)[0]

    @classmethod
    def from_flat_values(cls, index: Tensor, values: Tensor, n: int, m: int) -> tuple[Support, Tensor]:
        """:meth:`from_flat` with the values [nnz] that belong to ``index``, returned in the order of the support."""
        if values.shape != index.shape:
            raise ValueError(f"values must be {list(index.shape)} as index, got {list(values.shape)}")
        support, order = cls._from_flat(index, n, m)
        return support, values if order is None else values[order.to(values.device)]

    @classmethod
    def _from_flat(cls, index: Tensor, n: int, m: int) -> tuple[Support, Tensor | None]:
        if index.dtype not in _INTEGERS:
            raise TypeError(f"index must be an integer tensor, got {index.dtype}")
        if index.dim() != 1 or len(index) > _INT32_MAX:
            raise ValueError(f"index must be [nnz] with nnz <= {_INT32_MAX}, got {list(index.shape)}")
        index = index.to(torch.int64)
        fault = ((index < 0) | (index >= n * m)).nonzero()
        if len(fault):
            position = int(fault[0])
            raise ValueError(f"index[{position}] = {int(index[position])} is out of range [0, {n * m})")
        order = None
        if bool((index[1:] < index[:-1]).any()):
            index, order = torch.sort(index, stable=True)
        fault = (index[1:] == index[:-1]).nonzero()
        if len(fault):
            later = int(fault[0]) + 1
            position = later if order is None else int(order[later])
            raise ValueError(f"index[{position}] = {int(index[later])} is a duplicate")
        crow = torch.searchsorted(index, torch.arange(n + 1, device=index.device) * m)
        col = index % max(m, 1)
        return cls(crow.to(torch.int32), col.to(_col_dtype(m)), n, m, validate=False), order

    @classmethod
    def from_sparse_csr(cls, matrix: Tensor) -> tuple[Support, Tensor]:
        """The support and the values [nnz] of a two-dimensional ``torch.sparse_csr`` tensor."""
        if matrix.layout != torch.sparse_csr or matrix.dim() != 2:
            raise ValueError(f"matrix must be [n, m] in layout torch.sparse_csr, got {matrix.dim()}-D {matrix.layout}")
        n, m = matrix.shape
        return cls.from_csr(matrix.crow_indices(), matrix.col_indices(), n, m), matrix.values()

    # ---- conversions -------------------------------------------------------------------------------------------------

    def rows(self) -> Tensor:
        """int64 [nnz]: the row of every position."""
        row = torch.arange(self.n, device=self.crow.device)
        return torch.repeat_interleave(row, self.crow.diff().long(), output_size=self.nnz)

    def to_flat(self) -> Tensor:
        """SLTrain's flat indices i * m + j: int64 [nnz], sorted."""
        return self.rows() * self.m + self.col

    def to_mask(self) -> Tensor:
        """bool [n, m]."""
        mask = torch.zeros(self.n * self.m, dtype=torch.bool, device=self.col.device)
        mask[self.to_flat()] = True
        return mask.view(self.n, self.m)

    def to_sparse_csr(self, values: Tensor) -> Tensor:
        """S as a ``torch.sparse_csr`` tensor with int32 indices; ``values`` [nnz] is shared, not copied."""
        col = self.col.to(torch.int32)
        return torch.sparse_csr_tensor(self.crow, col, values, (self.n, self.m), check_invariants=False)

    def to(self, device: torch.device | str) -> Support:
        """The same support on another device."""
        return Support(self.crow.to(device), self.col.to(device), self.n, self.m, validate=False)

    # ---- sizes -------------------------------------------------------------------------------------------------------

    @property
    def nnz(self) -> int:
        return self.col.shape[0]

    @property
    def density(self) -> float:
        """nnz / (n m); 0 for an empty matrix."""
        return self.nnz / max(self.n * self.m, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the indices: 4 (n + 1) + 2 or 4 a position. SLTrain's int64 indices take 8 a position."""
        return self.crow.nbytes + self.col.nbytes

    @property
    def device(self) -> torch.device:
        return self.col.device

    def __repr__(self) -> str:
        dtype = str(self.col.dtype).removeprefix("torch.")
        return (
            f"Support({self.n}x{self.m}, nnz={self.nnz}, density={self.density:.4g}, col={dtype}, device={self.device})"
        )
