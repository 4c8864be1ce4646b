"""gemm: C = A B^T in bfloat16. On CUDA, every kernel that the GPU runs."""

from __future__ import annotations

import pytest
import slkernels
import slkernels.reference
import torch
from torch import Tensor

ops = torch.ops.slkernels

# m, n, k: empty, tiny, ragged, and more than one tile of any kernel
SIZES = [(0, 3, 4), (3, 0, 4), (3, 4, 0), (1, 1, 1), (5, 9, 13), (64, 128, 96), (257, 513, 129), (130, 264, 1000)]


def runs() -> list:
    """(device, kernel) pairs."""
    pairs = [pytest.param("cpu", "auto", id="cpu")]
    on_gpu = torch.cuda.is_available() and slkernels.build_info()["cuda"]
    for kernel in ("auto", "sm80", "sm90"):
        lacks = kernel == "sm90" and on_gpu and torch.cuda.get_device_capability() != (9, 0)
        skip = pytest.mark.skipif(not on_gpu or lacks, reason=f"no GPU that runs {kernel}")
        pairs.append(pytest.param("cuda", kernel, id=f"cuda-{kernel}", marks=[pytest.mark.cuda, skip]))
    return pairs


on_each = pytest.mark.parametrize(("device", "kernel"), runs())


def random(*shape: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, torch.bfloat16)


def assert_right(c: Tensor, a: Tensor, b: Tensor) -> None:
    """Every element: one rounding to bfloat16 (2^-8) and k fp32 additions of truncating hardware (2^-23)."""
    assert c.dtype == torch.bfloat16 and c.shape == (a.shape[0], b.shape[0]) and c.is_contiguous()
    exact = slkernels.reference.gemm(a.double(), b.double())
    bound = exact.abs() * 1.01 * 2**-8 + a.double().abs() @ b.double().abs().t() * (a.shape[1] + 1) * 2**-23
    error = (c.double() - exact).abs()
    assert (error <= bound).all(), f"{int((error > bound).sum())} of {error.numel()} elements are wrong"


@pytest.mark.sanitize
@on_each
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_float64(size, device, kernel):
    m, n, k = size
    a, b = random(m, k, device=device), random(n, k, device=device, seed=1)
    assert_right(ops.gemm(a, b, kernel), a, b)


@on_each
def test_layouts(device, kernel):
    """Transposed, sliced, offset and expanded inputs; NaN around them must not be read."""
    a, b = random(40, 24, device=device), random(56, 24, device=device, seed=1)
    wide = torch.full((40, 64), float("nan"), device=device, dtype=torch.bfloat16)
    for first, step in ((8, 1), (3, 1), (1, 2)):
        view = wide[:, first : first + 24 * step : step]
        view.copy_(a)
        assert_right(ops.gemm(view, b, kernel), a, b)
        assert_right(ops.gemm(b, view, kernel), b, a)
        wide.fill_(float("nan"))
    assert_right(ops.gemm(a.t().contiguous().t(), b, kernel), a, b)
    assert_right(ops.gemm(a[:1].expand(7, 24), b, kernel), a[:1].expand(7, 24), b)


@on_each
def test_same_bits_again(device, kernel):
    a, b = random(300, 520, device=device), random(260, 520, device=device, seed=1)
    assert torch.equal(ops.gemm(a, b, kernel), ops.gemm(a, b, kernel))


@on_each
def test_gradients(device, kernel):
    a, b = (random(*s, device=device).requires_grad_() for s in ((9, 13), (11, 13)))
    dc = random(9, 11, device=device, seed=2)
    da, db = torch.autograd.grad(ops.gemm(a, b, kernel), (a, b), dc)
    with torch.no_grad():
        assert_right(da, dc, b.t())
        assert_right(db, dc.t(), a.t())


@on_each
def test_opcheck_and_compile(device, kernel):
    args = (random(5, 8, device=device).requires_grad_(), random(7, 8, device=device), kernel)
    torch.library.opcheck(ops.gemm.default, args)
    compiled = torch.compile(slkernels.gemm, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), slkernels.gemm(*args))


def test_errors():
    a, b = random(4, 8, device="cpu"), random(6, 8, device="cpu")
    for args, message in (
        ((a[0], b), r"a must be \[m, k\], got \[8\]"),
        ((a, b[:, :7]), r"b must be \[n, 8\], got \[6, 7\]"),
        ((a.float(), b.float()), "a must be bfloat16, got float32"),
        ((a, b.float()), "b must have a's dtype bfloat16, got float32"),
        ((a, b, "sm70"), "kernel must be auto, sm80 or sm90, got sm70"),
        ((a, b, "sm80"), "kernel sm80 needs CUDA tensors"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.gemm(*args)


@pytest.mark.parametrize("kernel", ["sm80", "sm90"])
def test_graph_replays_on_new_inputs(gpu, kernel):
    """The tensor maps of sm90 are kernel arguments: a graph keeps them, and with them the addresses, not the data."""
    if kernel == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no GPU that runs sm90")
    a, b = random(300, 520, device="cuda"), random(260, 520, device="cuda", seed=1)
    ops.gemm(a, b, kernel)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        c = ops.gemm(a, b, kernel)
    for seed in (2, 3):
        a.copy_(random(300, 520, device="cuda", seed=seed))
        graph.replay()
        assert_right(c, a, b)


def test_current_stream_is_used(gpu):
    """A product on a side stream waits for what that stream does to its input, and for nothing else."""
    side = torch.cuda.Stream()
    a, b = random(512, 512, device="cuda"), random(512, 512, device="cuda", seed=1)
    late = torch.zeros_like(a)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(a)
        c = ops.gemm(late, b)
    side.synchronize()
    assert_right(c, a, b)
