"""random_support and random_blocks8."""

from __future__ import annotations

import hashlib

import pytest
import slkernels
import torch
from harness import assert_bitwise_equal
from hypothesis import given
from hypothesis import strategies as st
from slkernels import reference
from supports import index_dtype

ops = torch.ops.slkernels
KINDS = ["uniform", "row", "column", "block8"]


def assert_support_equal(got, want, what: str) -> None:
    for name, g, w in zip(("crow", "col"), got, want, strict=True):
        assert_bitwise_equal(g, w, f"{what} {name}")


def expected_nonzeros(n: int, m: int, density: float, kind: str) -> int:
    """By the documented counts, not by the code's formula."""
    if kind == "uniform":
        return int(density * n * m)
    if kind in ("row", "column"):
        return n * int(density * m)
    inner, right = int(density * (n // 8) * (m // 8)), int(density * (n // 8))
    bottom, corner = int(density * (m // 8)), int(density)
    return inner * 64 + right * 8 * (m % 8) + bottom * 8 * (n % 8) + corner * (n % 8) * (m % 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n", "m", "density"),
    [
        (1, 1, 1.0),
        (8, 8, 1.0),
        (9, 17, 1.0),
        (13, 64, 0.0),
        (64, 48, 0.3),
        (61, 53, 0.2),
        (257, 131, 0.03),
        (5461, 27, 0.05),
        (29, 2736, 0.03),
        (3, 32768, 0.01),
        (3, 40009, 0.01),
        (40009, 3, 0.34),
        (0, 5, 0.5),
        (5, 0, 0.5),
        (0, 0, 0.5),
    ],
)
def test_equals_reference(n: int, m: int, density: float, kind: str, device: torch.device) -> None:
    for seed in (0, -1, 2**63 - 1):
        got = ops.random_support(n, m, density, seed, kind, device)
        assert_support_equal([t.cpu() for t in got], reference.random_support(n, m, density, seed, kind), f"{seed}")
        reference.check_support(got[0].cpu(), got[1].cpu(), n, m)
        assert got[1].numel() == expected_nonzeros(n, m, density, kind) and got[1].dtype == index_dtype(m)


@given(
    st.integers(0, 100),
    st.integers(0, 100),
    st.floats(0, 1),
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from(KINDS),
)
def test_any_shape_equals_reference(n: int, m: int, density: float, seed: int, kind: str) -> None:
    got = ops.random_support(n, m, density, seed, kind)
    assert_support_equal(got, reference.random_support(n, m, density, seed, kind), kind)
    ops.check_support(*got, n, m)
    assert_support_equal(ops.random_blocks8(n, m, density, seed), reference.random_blocks8(n, m, density, seed), "")


@given(st.integers(1, 5000), st.integers(0, 2**63 - 1))
def test_reference_permutes(size: int, key: int) -> None:
    image = reference.permute(torch.arange(size), size, reference.round_keys(key, 0))
    assert torch.equal(image.sort().values, torch.arange(size))


def test_bits_are_fixed_for_all_time() -> None:
    """A checkpoint may hold a seed instead of a support: the same seed must mean the same support in every release."""
    digest = hashlib.sha256()
    for kind in KINDS:
        for t in slkernels.random_support(1000, 700, 0.05, 42, kind):
            digest.update(t.to(torch.int32).numpy().tobytes())
    assert digest.hexdigest() == "a4cac36a6cc329d8e7954e8724d65c56cf0f83e9738e1c8b5aaddc46abc78ec8"


@pytest.mark.parametrize("kind", KINDS)
def test_full_size_is_valid_and_independent_of_threads(kind: str, threads) -> None:
    threads(1)
    want = ops.random_support(5461, 2736, 0.03, 7, kind)
    ops.check_support(*want, 5461, 2736)
    for count in (2, 3, 4):
        threads(count)
        assert_support_equal(ops.random_support(5461, 2736, 0.03, 7, kind), want, f"{count} threads")


def test_uniform_is_uniform() -> None:
    """Each of n m positions is taken in `density` of the draws, and rows' counts spread as hypergeometric ones do."""
    n, m, density, draws = 40, 50, 0.25, 400
    counts, row_counts = torch.zeros(n, m), []
    for seed in range(draws):
        crow, col = ops.random_support(n, m, density, seed)
        counts[reference.support_rows(crow), col.long()] += 1
        row_counts.append(crow.diff().double())
    variance = draws * density * (1 - density)
    z = (counts - draws * density) / variance**0.5
    assert z.abs().max() < 5 and abs(float(z.var()) - 1) < 0.15
    rows = torch.stack(row_counts)
    hypergeometric = m * density * (1 - density) * (n * m - m) / (n * m - 1)
    assert abs(float(rows.mean()) - m * density) < 1e-9  # exactly int(density n m) in all
    assert abs(float(rows.var()) / hypergeometric - 1) < 0.1


@pytest.mark.parametrize("kind", ["uniform", "row"])
def test_seeds_and_rows_are_unrelated(kind: str) -> None:
    """Two seeds, and two rows of one seed, share as many positions as chance has it."""
    n, m, density = 200, 1000, 0.05

    def mask(seed: int) -> torch.Tensor:
        crow, col = ops.random_support(n, m, density, seed, kind)
        return reference.to_dense(torch.ones(col.numel()), crow, col, m)

    a, b = mask(1), mask(2)
    expected = n * m * density**2
    for shared in ((a * b).sum(), (a[:-1] * a[1:]).sum() * n / (n - 1)):
        assert abs(float(shared) - expected) < 5 * expected**0.5


def test_kinds_have_their_shape() -> None:
    n, m = 40, 64
    crow, col = ops.random_support(n, m, 0.2, 3, "row")
    assert (crow.diff() == 12).all()
    crow, col = ops.random_support(n, m, 0.2, 3, "column")
    assert (col.view(n, 12) == col[:12]).all()
    crow, col = ops.random_support(n, m, 0.2, 3, "block8")
    dense = reference.to_dense(torch.ones(col.numel()), crow, col, m)
    blocks = dense.view(5, 8, 8, 8).sum((1, 3))
    assert set(blocks.unique().tolist()) == {0.0, 64.0}
    block_crow, block_col = slkernels.random_blocks8(n, m, 0.2, 3)
    listed = reference.to_dense(torch.ones(block_col.numel()), block_crow, block_col, 8)
    assert torch.equal(listed, blocks / 64)


def test_seed_changes_the_support() -> None:
    supports = {tuple(ops.random_support(20, 30, 0.3, seed)[1].tolist()) for seed in range(50)}
    assert len(supports) == 50


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((-1, 5, 0.5, 0), "n and m must not be negative, got -1 and 5"),
        ((5, -1, 0.5, 0), "n and m must not be negative, got 5 and -1"),
        ((5, 5, -0.1, 0), "density must be in [0, 1], got -0.1"),
        ((5, 5, 1.5, 0), "density must be in [0, 1], got 1.5"),
        ((5, 5, float("nan"), 0), "density must be in [0, 1], got nan"),
        ((2**31, 1, 0.0, 0), "n and m must be below 2^31, got 2147483648 and 1"),
        ((1, 2**31, 0.0, 0), "n and m must be below 2^31, got 1 and 2147483648"),
        ((70000, 70000, 0.9, 0), "more than 2^31 - 1 nonzeros (4410000000) do not fit int32 offsets"),
        ((70000, 70000, 0.9, 0, "block8"), "more than 2^31 - 1 nonzeros"),
        ((5, 5, 0.5, 0, "diagonal"), "kind must be uniform, row, column or block8, got diagonal"),
    ],
)
def test_error(args: tuple, message: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        ops.random_support(*args)
    assert f"slkernels::random_support: {message}" in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_and_fake(kind: str) -> None:
    for n, m, density in ((20, 30, 0.3), (13, 9, 1.0), (0, 4, 0.5), (3, 40000, 0.1)):
        torch.library.opcheck(ops.random_support.default, (n, m, density, 5, kind), test_utils=["test_schema"])
        with torch._subclasses.FakeTensorMode():
            fake = ops.random_support(n, m, density, 5, kind)
        for f, r in zip(fake, ops.random_support(n, m, density, 5, kind), strict=True):
            assert f.shape == r.shape and f.dtype == r.dtype and f.device == r.device


def test_device_without_kernels_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="slkernels::random_support: device must be cpu or cuda"):
        ops.random_support(4, 4, 0.5, 0, "uniform", torch.device("meta"))


@pytest.mark.skipif(slkernels.build_info()["cuda"], reason="a build with CUDA kernels")
def test_cuda_device_without_cuda_kernels_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="this build of slkernels has no CUDA kernels"):
        ops.random_support(4, 4, 0.5, 0, "uniform", torch.device("cuda"))
