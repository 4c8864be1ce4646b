"""Support: constructors, conversions, and the faults that they must catch before an index reaches a kernel."""

import dataclasses

import pytest
import slkernels
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slkernels import Support


@pytest.mark.parametrize("kind", ["uniform", "row", "block8", "column"])
@pytest.mark.parametrize(("n", "m"), [(64, 48), (1, 5461), (37, 1)])
def test_random_is_the_ops_support(kind, n, m):
    support = Support.random(n, m, 0.25, seed=3, kind=kind)
    crow, col = slkernels.random_support(n, m, 0.25, 3, kind)
    assert torch.equal(support.crow, crow) and torch.equal(support.col, col)
    slkernels.check_support(support.crow, support.col, n, m)


def test_random_on_meta_has_the_right_shapes():
    support, meta = (Support.random(40, 30, 0.1, seed=1, device=d) for d in ("cpu", "meta"))
    assert meta.device.type == "meta"
    assert (meta.crow.shape, meta.col.shape, meta.col.dtype) == (
        support.crow.shape,
        support.col.shape,
        support.col.dtype,
    )
    with torch.device("meta"):
        assert Support.random(40, 30, 0.1, seed=1).device.type == "meta"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**31))
def test_every_form_holds_the_same_positions(n, m, density, seed):
    support = Support.random(n, m, density, seed)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(support.nnz, generator=generator)
    values = torch.randn(support.nnz, generator=generator)
    from_flat, sorted_values = Support.from_flat_values(support.to_flat()[shuffled], values[shuffled], n, m)
    assert torch.equal(sorted_values, values)
    from_csr, same_values = Support.from_sparse_csr(support.to_sparse_csr(values))
    assert same_values.data_ptr() == values.data_ptr() or support.nnz == 0
    for other in (from_flat, from_csr, Support.from_dense_mask(support.to_mask())):
        assert torch.equal(other.crow, support.crow) and torch.equal(other.col, support.col)
        assert (other.n, other.m, other.crow.dtype, other.col.dtype) == (n, m, torch.int32, torch.int16)
    mask = torch.zeros(n * m, dtype=torch.bool)
    mask[support.to_flat()] = True
    assert torch.equal(mask.view(n, m), support.to_mask())


@pytest.mark.parametrize(("m", "dtype"), [(32768, torch.int16), (32769, torch.int32)])
def test_column_dtype_follows_the_width(m, dtype):
    last = torch.tensor([m - 1])
    for support in (
        Support.random(2, m, 0.01, seed=0),
        Support.from_flat(last, 2, m),
        Support.from_csr(torch.tensor([0, 1, 1]), last, 2, m),
        Support.from_dense_mask(torch.arange(2 * m).view(2, m) == m - 1),
    ):
        assert support.col.dtype == dtype
    assert support.to_flat().tolist() == [m - 1]


def test_flat_indices_beyond_int32():
    n, m = 70_000, 40_000
    index = torch.tensor([0, 2**31 + 5, n * m - 1])
    assert torch.equal(Support.from_flat(index, n, m).to_flat(), index)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 0), (0, 0)])
def test_empty_matrices(n, m):
    support = Support.from_flat(torch.empty(0, dtype=torch.int64), n, m)
    assert (support.nnz, support.density) == (0, 0)
    assert support.to_mask().shape == (n, m)
    assert len(support.crow) == n + 1


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([3, 1, 12], ValueError, r"index\[2\] = 12 is out of range \[0, 12\)"),
        ([3, -1, 12], ValueError, r"index\[1\] = -1 is out of range"),
        ([5, 1, 5], ValueError, r"index\[2\] = 5 is a duplicate"),
        ([1, 5, 5], ValueError, r"index\[2\] = 5 is a duplicate"),
        ([0.0], TypeError, "index must be an integer tensor, got torch.float32"),
        ([[1]], ValueError, r"index must be \[nnz\]"),
    ],
)
def test_bad_flat_indices(index, error, message):
    with pytest.raises(error, match=message):
        Support.from_flat(torch.tensor(index), 3, 4)


@pytest.mark.parametrize(
    ("crow", "col", "error", "message"),
    [
        ([0, 1, 2], [0, 4], RuntimeError, r"col\[1\] = 4 in row 1 is out of range"),
        ([0, 1, 2], [0, -1], RuntimeError, r"col\[1\] = -1 in row 1 is out of range"),
        ([0, 1, 2], [0, 2**32], ValueError, r"col\[1\] = 4294967296 does not fit int32"),
        ([0, 1, 2], [0, 2**16 + 1], RuntimeError, r"col\[1\] = 65537"),
        ([0, 2, 2], [3, 1], RuntimeError, r"col\[1\] = 1 in row 0 .*unsorted"),
        ([0, 2, 2], [1, 1], RuntimeError, r"col\[1\] = 1 in row 0 is a duplicate"),
        ([0, 2, 1], [0, 1], RuntimeError, "crow"),
        ([1, 1, 2], [0, 1], RuntimeError, r"crow\[0\] must be 0"),
        ([0, 1, 2**40], [0, 1], ValueError, r"crow\[2\] = 1099511627776 does not fit int32"),
        ([0, 2], [0, 1], RuntimeError, r"crow must be .*\[3\]"),
        ([0, 1, 2], [0.0, 1.0], TypeError, "col must be an integer tensor"),
    ],
)
def test_bad_csr(crow, col, error, message):
    with pytest.raises(error, match=message):
        Support.from_csr(torch.tensor(crow), torch.tensor(col), 2, 4)


def test_the_constructor_checks_once_and_fields_are_frozen():
    crow, col = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0, 9], dtype=torch.int16)
    with pytest.raises(RuntimeError, match=r"col\[1\] = 9"):
        Support(crow, col, 2, 4)
    support = Support(crow, col.clamp(max=3), 2, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        support.m = 2


def test_values_must_match_the_flat_indices():
    with pytest.raises(ValueError, match=r"values must be \[2\]"):
        Support.from_flat_values(torch.tensor([0, 1]), torch.ones(3), 2, 2)


def test_sizes():
    support = Support.random(100, 70, 0.1, seed=3)
    assert (support.nnz, support.density, support.nbytes) == (700, 0.1, 4 * 101 + 2 * 700)
    assert repr(support) == "Support(100x70, nnz=700, density=0.1, col=int16, device=cpu)"
    assert support.to("meta").device.type == "meta"
