"""Inputs of the cases, made without slkernels, so that a fault of its support generator cannot hide in a benchmark."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sparse:
    """A random support of an [n, m] matrix with values: SLTrain's flat indices (int64, sorted) and the same as CSR."""

    n: int
    m: int
    flat: Tensor
    crow: Tensor
    col: Tensor
    values: Tensor

    @property
    def nnz(self) -> int:
        return self.values.numel()

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.crow, self.col, self.values))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        flat = torch.zeros(self.n * self.m, dtype=dtype or self.values.dtype, device=self.values.device)
        flat[self.flat] = self.values.to(flat.dtype)
        return flat.view(self.n, self.m)

    def torch_csr(self) -> Tensor:
        """The same matrix as a torch.sparse_csr tensor; int32 indices, which MKL wants."""
        return _quietly(
            lambda: torch.sparse_csr_tensor(
                self.crow, self.col.int(), self.values, (self.n, self.m), check_invariants=True
            )
        )

    def torch_csr_transposed(self) -> Tensor:
        """The transpose as a torch.sparse_csr tensor."""
        csr = _quietly(lambda: self.dense().t().to_sparse_csr())
        return torch.sparse_csr_tensor(
            csr.crow_indices().int(), csr.col_indices().int(), csr.values(), csr.shape, check_invariants=True
        )


def _quietly(make: Callable[[], Tensor]) -> Tensor:
    """make() without torch's warning that CSR is in beta."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return make()


def generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def uniform(*shape: int, dtype: torch.dtype, gen: torch.Generator, scale: float = 1.0) -> Tensor:
    """Uniform in [-scale, scale]: zeros or constants would draw less power and flatter every provider."""
    return torch.empty(shape, device=gen.device).uniform_(-scale, scale, generator=gen).to(dtype)


def sparse(n: int, m: int, density: float, dtype: torch.dtype, gen: torch.Generator) -> Sparse:
    """SLTrain's support (int(density n m) positions without replacement) with values U(+-1/sqrt(m))."""
    nnz = int(density * n * m)
    flat = torch.randperm(n * m, device=gen.device, generator=gen)[:nnz].sort().values
    counts = torch.bincount(flat // m, minlength=n)
    crow = torch.zeros(n + 1, dtype=torch.int32, device=gen.device)
    crow[1:] = counts.cumsum(0)
    col = (flat % m).to(torch.int16 if m <= 32768 else torch.int32)
    return Sparse(n, m, flat, crow, col, uniform(nnz, dtype=dtype, gen=gen, scale=m**-0.5))


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
