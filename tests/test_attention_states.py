"""merge_attention_states and the column statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import slkernels
import torch
from attention_cases import mask_arguments
from harness import FLOATS, Inputs, OpCase, assert_bitwise_equal
from op_tests import ErrorCase, OpTests, assert_compiled_equals_eager, with_grad
from slkernels import reference
from slkernels.attention import BlockRows, attention_colstats, merge_attention_states
from torch import Tensor

ops = torch.ops.slkernels

# ---- merge_attention_states -----------------------------------------------------------------------------------------

# id: B, H, S, D, small
MERGES = {
    "small": (1, 2, 3, 5, True),
    "one": (1, 1, 1, 1, True),
    "empty": (2, 0, 3, 4, True),
    "vectors": (2, 3, 17, 64, False),
    "ragged": (1, 2, 129, 37, False),
    "threads": (1, 3, 700, 128, False),
}


@dataclass(frozen=True)
class MergeCase(OpCase):
    """A case of one of the two results; lse has 0 for -infinity."""

    output: int = 0

    def _choose(self, results: tuple[Tensor, Tensor]) -> Tensor:
        chosen = results[self.output]
        return chosen.masked_fill(chosen == -math.inf, 0) if self.output else chosen

    def __call__(self, *args) -> Tensor:
        return self._choose(self.overload(*args))


def make_merge_cases() -> list[MergeCase]:
    cases = []
    for name, (batch, heads, tokens, features, small) in MERGES.items():
        for output, result in enumerate(("o", "lse")):

            def make(inputs: Inputs, sizes=(batch, heads, tokens, features)) -> tuple:
                wide = torch.float64 if inputs.dtype == torch.float64 else torch.float32
                sums = [(inputs.tensor(*sizes[:3]).to(wide) * 3) for _ in range(2)]
                return inputs.tensor(*sizes), sums[0], inputs.tensor(*sizes), sums[1]

            def chosen(*args, output=output) -> Tensor:
                return reference.attention.merge_attention_states(*args)[output]

            def magnitude(o1, lse1, o2, lse2, output=output) -> Tensor:
                return o1 + o2 + (o1 + o2) * (lse1 + lse2)[..., None] if output == 0 else 1 + lse1 + lse2

            cases.append(
                MergeCase(
                    op="merge_attention_states",
                    id=f"{name}-{result}",
                    make=make,
                    reference=chosen,
                    terms=features,
                    roundings=2,
                    condition=2.0,
                    magnitude=magnitude,
                    small=small,
                    exact=False,
                    output=output,
                )
            )
    return cases


def merge_error(id: str, message: str, **changes) -> ErrorCase:
    o, lse = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3)
    args = {**dict(o1=o, lse1=lse, o2=o, lse2=lse), **changes}.values()
    return ErrorCase("merge_attention_states", id, lambda: ops.merge_attention_states(*args), message)


class TestMerge(OpTests):
    cases = make_merge_cases()
    errors = [  # noqa: RUF012
        merge_error("o1", "o1 must be [B, H, S, D], got [2, 3, 4]", o1=torch.ones(2, 3, 4)),
        merge_error("o2", "o2 must be like o1 [1, 2, 3, 4], got [1, 2, 3, 5]", o2=torch.ones(1, 2, 3, 5)),
        merge_error("o2_dtype", "o2 must have o1's dtype float32, got float16", o2=torch.ones(1, 2, 3, 4).half()),
        merge_error("lse1", "lse1 must be [1, 2, 3], got [1, 2, 4]", lse1=torch.ones(1, 2, 4)),
        merge_error("lse2", "lse2 must be float32, got bfloat16", lse2=torch.ones(1, 2, 3).bfloat16()),
    ]

    def test_compile(self, case: MergeCase, device: torch.device) -> None:
        args = with_grad(case.make(Inputs(torch.float32, device)))
        torch._dynamo.reset()
        compiled = torch.compile(lambda *a: case(*a) * 2, fullgraph=True, backend="aot_eager")
        assert_compiled_equals_eager(compiled, lambda *a: case(*a) * 2, args, str(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_numeric_merging_empty_sets(dtype: torch.dtype, device: torch.device) -> None:
    """-infinity is a set without keys: the other state comes through bit for bit; nothing and nothing is nothing."""
    o1, o2 = (torch.randn(1, 1, 4, 8, dtype=dtype, device=device).requires_grad_() for _ in range(2))
    lse1 = torch.tensor([[[1.5, -math.inf, -math.inf, 2000.0]]], dtype=dtype, device=device).requires_grad_()
    lse2 = torch.tensor([[[-math.inf, 0.5, -math.inf, -2000.0]]], dtype=dtype, device=device).requires_grad_()
    o, lse = merge_attention_states(o1, lse1, o2, lse2)
    assert torch.equal(o[0, 0], torch.stack([o1[0, 0, 0], o2[0, 0, 1], torch.zeros_like(o1[0, 0, 2]), o1[0, 0, 3]]))
    assert torch.equal(lse[0, 0], torch.tensor([1.5, 0.5, -math.inf, 2000.0], dtype=dtype, device=device))
    do1, dlse1, do2, dlse2 = torch.autograd.grad(
        (o, lse), (o1, lse1, o2, lse2), (torch.ones_like(o), torch.ones_like(lse))
    )
    for got, want in ((do1[0, 0, :, 0], [1, 0, 0, 1]), (do2[0, 0, :, 0], [0, 1, 0, 0])):
        assert got.tolist() == want
    assert dlse1[0, 0].tolist() == [1, 0, 0, 1] and dlse2[0, 0].tolist() == [0, 1, 0, 0]


def takes(device: torch.device, dtype: torch.dtype) -> None:
    if device.type == "cuda" and dtype == torch.float32:
        pytest.skip("attention on CUDA takes bfloat16 and float16")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_numeric_two_halves_are_the_whole(dtype: torch.dtype, device: torch.device) -> None:
    """Attention over a split of the keys, merged, with gradients: the attention over all of them."""
    takes(device, dtype)
    inputs = Inputs(dtype, device)
    q, k, v = inputs.tensor(1, 2, 130, 64), inputs.tensor(1, 2, 200, 64), inputs.tensor(1, 2, 200, 32)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(1, 1, 130, 200, generator=generator) < 0.5
    part = torch.rand(1, 1, 130, 200, generator=generator) < 0.5
    layouts = [BlockRows.from_dense_mask(m.to(device), 64, 64) for m in (mask, mask & part, mask & ~part)]
    do, grads, results = torch.randn(1, 2, 130, 32, generator=generator).to(device, dtype), [], []
    for split in (False, True):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        if split:
            states = [slkernels.attention.attend(*leaves, layout, return_lse=True) for layout in layouts[1:]]
            results.append(merge_attention_states(*states[0], *states[1])[0])
        else:
            results.append(slkernels.attention.attend(*leaves, layouts[0]))
        grads.append(torch.autograd.grad(results[-1], leaves, do))
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)
    for got, want in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# ---- column statistics ----------------------------------------------------------------------------------------------

# B, Hq, Hkv, Sq, Sk, D, row_begin, row_end
RANGES = [
    (1, 2, 1, 1, 1, 8, 0, None),
    (2, 4, 2, 64, 300, 48, 0, None),
    (1, 1, 1, 521, 333, 64, 70, 200),
    (1, 3, 1, 127, 521, 64, 126, 127),
    (2, 2, 2, 320, 320, 80, 0, None),
]


def assert_statistics(got: tuple[Tensor, ...], q: Tensor, k: Tensor, keep: Tensor, block: tuple, *rest) -> None:
    """p is off by some roundings of a logit (its terms add up to |q| |k|); sums of n such p by sqrt(n) more."""
    want = reference.attention.colstats(q.double(), k.double(), keep, *block, *rest)
    logits = float((q.double().abs() @ k.double().abs().repeat_interleave(q.shape[1] // k.shape[1], 1).mT).max())
    relative = 2.0**-24 * (8 + math.sqrt(q.shape[2]) + 2 * logits * q.shape[-1] ** -0.5)
    for name, g, w in zip(("col_sum", "col_max", "diag_sum", "block_sum"), got, want, strict=True):
        assert g.dtype == torch.float32 and g.shape == w.shape, name
        assert ((g.double() - w).abs() <= 2 * relative * w + 1e-30).all(), name


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sizes", RANGES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_numeric_colstats(dtype, sizes, causal, device) -> None:
    takes(device, dtype)
    b, hq, hkv, sq, sk, d, begin, end = sizes
    inputs = Inputs(dtype, device)
    q, k = inputs.tensor(b, hq, sq, d), inputs.tensor(b, hkv, sk, d)
    keep = torch.ones(1, 1, sq, sk, dtype=torch.bool, device=device)
    keep = keep.tril(sk - sq) if causal else keep
    got = attention_colstats(q, k, row_begin=begin, row_end=end, causal=causal, block_m=128)
    assert_statistics(got, q, k, keep, (128, 64), begin, end)


@pytest.mark.parametrize("kind", ["random", "window_bits", "nothing"])
@pytest.mark.parametrize("sizes", RANGES, ids=str)
def test_numeric_colstats_of_a_layout(sizes, kind, device) -> None:
    b, hq, hkv, sq, sk, d, begin, end = sizes
    inputs = Inputs(torch.float32 if device.type == "cpu" else torch.bfloat16, device)
    q, k = inputs.tensor(b, hq, sq, d), inputs.tensor(b, hkv, sk, d)
    on_device = (a.to(device) if isinstance(a, Tensor) else a for a in mask_arguments(kind, 1, hkv, sq, sk, 64, 128))
    arguments = tuple(on_device)
    keep = reference.attention.keep_mask(sq, sk, *arguments)
    got = ops.block_sparse_colstats(q, k, *arguments, begin, end, None, 0.7 * d**-0.5, 4.0)
    assert_statistics(got, q, k, keep, (64, 128), begin, end, 0.7 * d**-0.5, 4.0)


def test_numeric_colstats_of_unaligned_tiles_and_columns(device) -> None:
    """A vertical-slash layout: tiles that start anywhere, single columns."""
    inputs = Inputs(torch.float32 if device.type == "cpu" else torch.bfloat16, device)
    q, k = inputs.tensor(1, 2, 200, 32), inputs.tensor(1, 1, 200, 32)
    vertical, slash = (torch.tensor([[a]], dtype=torch.int32, device=device) for a in ([0, 3, 70], [90, 0]))
    layout = BlockRows.from_vertical_slash(vertical, slash, 200)
    got = attention_colstats(q, k, layout)
    assert_statistics(got, q, k, layout.to_dense(), (64, 64))


def test_colstats_with_a_known_lse() -> None:
    q, k, v = torch.randn(2, 4, 150, 64), torch.randn(2, 2, 200, 64), torch.randn(2, 2, 200, 64)
    layout = BlockRows.from_dense_mask(torch.rand(1, 2, 150, 200) < 0.4, 64, 64)
    lse = slkernels.attention.attend(q, k, v, layout, return_lse=True)[1]
    for got, want in zip(attention_colstats(q, k, layout, lse=lse), attention_colstats(q, k, layout), strict=True):
        assert_bitwise_equal(got, want, "statistics")


def test_minference_estimator_is_one_call() -> None:
    """MInference's search (arXiv 2407.02490, its code minference_forward.py): softmax of the last 64 queries, causal;
    vertical lines by column sums; slashes by sums over diagonals of the [64, S] matrix."""
    S, D = 300, 64
    q, k = torch.randn(1, 3, S, D), torch.randn(1, 3, S, D)
    qk = q[:, :, -64:] @ k.mT / math.sqrt(D)
    qk[:, :, :, -64:] = qk[:, :, :, -64:].masked_fill(~torch.ones(64, 64).tril().bool(), -math.inf)
    p = qk.softmax(-1)
    slash = torch.stack([sum(p[:, :, i, S - 64 + i - d] for i in range(64) if S - 64 + i >= d) for d in range(S)], -1)
    found = attention_colstats(q[:, :, -64:], k)
    torch.testing.assert_close(found.col_sum, p.sum(2))
    torch.testing.assert_close(found.diag_sum, slash)


def test_colstats_do_not_depend_on_threads_or_poison(threads, poison_memory) -> None:
    q, k = torch.randn(1, 2, 700, 32), torch.randn(1, 2, 700, 32)
    wants = attention_colstats(q, k)
    poison_memory()
    for count in (1, 2, 3, 4):
        threads(count)
        for got, want in zip(attention_colstats(q, k), wants, strict=True):
            assert_bitwise_equal(got, want, f"{count} threads")


@pytest.mark.parametrize("empty", ["queries", "keys", "range"])
def test_colstats_of_nothing(empty: str) -> None:
    sq, sk = (0, 5) if empty == "queries" else (5, 0) if empty == "keys" else (5, 5)
    rows = dict(row_begin=2, row_end=2) if empty == "range" else {}
    found = attention_colstats(torch.ones(1, 2, sq, 8), torch.ones(1, 1, sk, 8), **rows)
    assert [t.shape[-1] for t in found[:3]] == [sk] * 3
    assert all((t == 0).all() for t in found)


def test_colstats_opcheck_and_compile() -> None:
    q, k = torch.randn(1, 2, 70, 8), torch.randn(1, 1, 130, 8)
    layout = mask_arguments("random", 1, 1, 70, 130, 64, 64)
    utils = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(ops.attention_colstats.default, (q, k, 3, 66), test_utils=utils)
    torch.library.opcheck(ops.block_sparse_colstats.default, (q, k, *layout, 3, 66), test_utils=utils)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k: attention_colstats(q, k).col_sum * 2, fullgraph=True, backend="aot_eager")
    assert_bitwise_equal(compiled(q, k), attention_colstats(q, k).col_sum * 2, "compiled")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(row_begin=-1), "rows must be a range within [0, 70], got [-1, 70)"),
        (dict(row_end=71), "rows must be a range within [0, 70], got [0, 71)"),
        (dict(row_begin=5, row_end=4), "rows must be a range within [0, 70], got [5, 4)"),
        (dict(block_m=32), "block_m must be 64 or 128, got 32"),
        (dict(lse=torch.ones(1, 2, 71)), "lse must be [1, 2, 70], got [1, 2, 71]"),
    ],
)
def test_colstats_errors(changes: dict, message: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        attention_colstats(torch.ones(1, 2, 70, 8), torch.ones(1, 1, 130, 8), **changes)
    assert f"slkernels::attention_colstats: {message}" in str(caught.value)
    with pytest.raises(RuntimeError, match="q must be float32, bfloat16 or float16, got float64"):
        attention_colstats(torch.ones(1, 2, 70, 8).double(), torch.ones(1, 1, 130, 8).double())
