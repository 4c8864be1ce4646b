"""block_sparse_attention on a GPU: the cases of the CPU in the dtypes that CUDA takes, graphs, determinism."""

from __future__ import annotations

import pytest
import slkernels
import torch
from attention_cases import AttentionCase, make_cases, mask_arguments
from harness import Inputs, assert_bitwise_equal, floats, map_floats, with_grad
from torch import Tensor

ON_GPU = torch.cuda.is_available() and slkernels.build_info()["cuda"]
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not ON_GPU, reason="no GPU, or a build without CUDA")]

attention = torch.ops.slkernels.block_sparse_attention
CASES = make_cases()
on_cases = pytest.mark.parametrize("case", CASES, ids=[c.id for c in CASES])
on_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def outputs(function, args: tuple, cotangent: Tensor) -> list[Tensor]:
    """The result and the gradients of the float arguments."""
    args = with_grad(args)
    result = function(*args)
    return [result.detach(), *torch.autograd.grad(result, floats(args), cotangent.to(result), materialize_grads=True)]


def assert_as_good_as_torch(case: AttentionCase, args: tuple) -> None:
    """At most twice the error that the formula has in the same dtype, against fp64; and one rounding."""
    shape = case.in_torch(*args).shape
    cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(args[0].dtype).to(args[0].device)
    exact = outputs(case.in_torch, map_floats(Tensor.double, args), cotangent.double())
    formula = outputs(case.in_torch, args, cotangent)
    unit = torch.finfo(args[0].dtype).eps
    for index, (got, rough, want) in enumerate(zip(outputs(case, args, cotangent), formula, exact, strict=True)):
        assert got.isfinite().all()
        if want.numel() == 0:
            continue
        error, allowed = (got.double() - want).abs(), 2 * (rough.double() - want).abs().max()
        assert (error <= allowed + unit * want.abs()).all(), f"{case} result {index}: {error.max()} > {allowed}"


@on_dtypes
@on_cases
def test_numeric(case, dtype):
    assert_as_good_as_torch(case, case.make(Inputs(dtype, torch.device("cuda"))))


@on_cases
def test_tokens_first(case):
    """[B, S, H, D] in memory, as projections leave it."""
    args = case.make(Inputs(torch.bfloat16, torch.device("cuda")))
    moved = map_floats(lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), args)
    assert_as_good_as_torch(case, moved)


@on_cases
def test_deterministic(case):
    args = case.make(Inputs(torch.bfloat16, torch.device("cuda")))
    cotangent = torch.ones_like(case(*args))
    first, second = (outputs(case, args, cotangent) for _ in range(2))
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        assert_bitwise_equal(a, b, f"{case} result {index}")


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, heads, 256, 128, generator=generator).to("cuda", torch.bfloat16) for heads in (4, 2, 2))


def on_gpu(layout: tuple) -> tuple:
    return tuple(t.cuda() if isinstance(t, Tensor) else t for t in layout)


def test_a_sparse_mask_is_not_dense():
    """A kernel that ignored its lists would give the dense result."""
    q, k, v = inputs()
    dense, _ = attention(q, k, v, *on_gpu(mask_arguments("full", 1, 1, 256, 256, 64, 64)))
    ptr, _, nmask, idx, *rest = on_gpu(mask_arguments("full", 1, 1, 256, 256, 64, 64))
    one_tile = torch.ones_like(nmask)
    sparse, _ = attention(q, k, v, ptr, one_tile, nmask, idx, *rest)
    first = idx[ptr.flatten().long()].tolist()
    assert first == [0] * 4
    group = k.shape[1]
    keys, values = (t[:, :, :64].repeat_interleave(q.shape[1] // group, 1).double() for t in (k, v))
    want = (q.double() @ keys.mT / 128**0.5).softmax(-1) @ values
    torch.testing.assert_close(sparse.double(), want, atol=0.02, rtol=0.02)
    assert (sparse - dense).abs().max() > 0.1


def test_graph_replays_with_other_inputs_and_indices():
    """A captured call reads lists and tensors anew: nothing of them is looked at by the host."""
    tensors = [t.requires_grad_() for t in inputs()]
    layout = on_gpu(mask_arguments("random", 1, 2, 256, 256, 64, 64))
    other = on_gpu(mask_arguments("random", 1, 2, 256, 256, 64, 64))
    ptr, cnt, nmask, idx = (t.clone() for t in layout[:4])
    forward_only = [*layout[4:]]

    def call() -> Tensor:
        with torch.no_grad():
            return attention(*tensors, ptr, cnt, nmask, idx, *forward_only)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    graph.replay()
    assert_bitwise_equal(result, call(), "first replay")
    before = result.clone()
    cnt.copy_((other[1] - 1).clamp(min=0))
    nmask.copy_(torch.minimum(nmask, cnt))
    with torch.no_grad():
        for t, new in zip(tensors, inputs(seed=1), strict=True):
            t.copy_(new)
    graph.replay()
    assert_bitwise_equal(result, call(), "replay with other inputs")
    assert not torch.equal(result, before)


def test_float32_is_refused():
    q, k, v = (t.float() for t in inputs())
    layout = on_gpu(mask_arguments("full", 1, 1, 256, 256, 64, 64))
    with pytest.raises(RuntimeError, match="q must be bfloat16 or float16 on CUDA, got float32"):
        attention(q, k, v, *layout)
