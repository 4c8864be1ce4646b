"""relu2_prune24."""

from __future__ import annotations

import math

import pytest
import slkernels
import torch
from harness import FLOATS, LAYOUTS, assert_bitwise_equal
from slkernels.reference import semi24_mask as reference
from torch import Tensor

ops = torch.ops.slkernels

SHAPES = [(4, 4), (1, 1), (0, 8), (8, 0), (5, 7), (64, 64), (130, 67), (67, 260), (3, 5461), (200, 192)]
CASES = [(dtype, "plain") for dtype in (*FLOATS, torch.float64)]
CASES += [(dtype, layout) for dtype in (torch.bfloat16, torch.float16) for layout in ("sm80", "sm90")]


def unpack(packs: tuple[Tensor, ...], tokens: int, m: int, layout: str) -> tuple[Tensor, Tensor]:
    values, meta, values_t, meta_t = packs
    return (
        slkernels.decompress24(values, meta, tokens, m, layout),
        slkernels.decompress24(values_t, meta_t, m, tokens, layout),
    )


@pytest.mark.parametrize("dtype,layout", CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numeric_packs_are_the_formulas(shape: tuple, dtype: torch.dtype, layout: str, device: torch.device) -> None:
    x = torch.randn(shape, device=device, dtype=torch.float64).mul(4).round().div(4).to(dtype)  # ties
    packs = slkernels.relu2_prune24(x, layout)
    for got, want in zip(unpack(packs, *shape, layout), reference.relu2_prune24(x), strict=True):
        assert_bitwise_equal(got, want, "dense")
    for name, layout_of in LAYOUTS.items():
        if name != "expanded":
            for got, want in zip(slkernels.relu2_prune24(layout_of(x), layout), packs, strict=True):
                assert_bitwise_equal(got, want, name)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_numeric_same_packs_as_the_two_ops(dtype: torch.dtype, device: torch.device) -> None:
    """Metadata too, and every rounding of the square."""
    x = torch.randn(99, 333, device=device).to(dtype)
    want = slkernels.prune_compress24(torch.relu(x).square())
    for name, got, other in zip(
        ("values", "meta", "values_t", "meta_t"), slkernels.relu2_prune24(x), want, strict=True
    ):
        assert_bitwise_equal(got, other, name)


def test_numeric_special_values(device: torch.device) -> None:
    x = torch.tensor([[math.nan, 3.0, 4.0, -1.0, -math.inf, math.inf, -0.0, 2.0]], device=device)
    values, meta, *_ = slkernels.relu2_prune24(x)
    dense = slkernels.decompress24(values, meta, 1, 8)
    assert dense.nan_to_num(nan=-1.0, posinf=-2.0).tolist() == [[-1.0, 0.0, 16.0, 0.0, 0.0, -2.0, 0.0, 4.0]]


@pytest.mark.parametrize("dtype,layout", CASES, ids=str)
@pytest.mark.parametrize("which", ["values", "values_t", "both"])
def test_numeric_gradient(which: str, dtype: torch.dtype, layout: str, device: torch.device) -> None:
    """Of every element: 1.5 roundings, a quarter of one for the square's under the root included; and the square's
    underflow in float16."""
    tokens, m = 70, 133
    x = torch.randn(tokens, m, device=device).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    values, meta, values_t, meta_t = slkernels.relu2_prune24(x, layout)
    dense = unpack((values, meta, values_t, meta_t), tokens, m, layout)
    chosen = {"values": [0], "values_t": [1], "both": [0, 1]}[which]
    cotangents = [torch.randn(d.shape, device=device).to(dtype) for d in dense]
    sum((dense[i] * cotangents[i]).sum() for i in chosen).backward()
    formula = reference.relu2_prune24(wide)
    # Rounding the square may turn two elements into equals, and which of them is kept.
    kept = (dense[0].detach() != 0, dense[1].detach() != 0)
    y = torch.relu(wide).square()
    masked = (torch.where(kept[0], y, 0), torch.where(kept[1], y.t(), 0))
    assert sum(int((a != b).sum()) for a, b in zip(masked, formula, strict=True)) <= 8
    sum((masked[i] * cotangents[i].double()).sum() for i in chosen).backward()
    size = sum((cotangents[i].double().abs() if i == 0 else cotangents[i].double().abs().t()) for i in chosen)
    eps = torch.finfo(dtype).eps
    under = 2 * 2**-12.5 * size if dtype == torch.float16 else 0
    terms = 2 * torch.relu(wide.detach()) * size  # both gradients are added in the values' dtype
    bound = 0.75 * eps * wide.grad.abs() + 0.75 * eps * terms * (len(chosen) == 2) + under
    assert ((x.grad.double() - wide.grad).abs() <= bound).all()


def test_gradcheck() -> None:
    x = torch.randn(6, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: slkernels.relu2_prune24(t)[::2], x)


def test_backward_keeps_the_values_and_not_x() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        packs = slkernels.relu2_prune24(x)
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in packs}


@pytest.mark.parametrize("layout", ["plain", "sm80", "sm90"])
def test_opcheck_and_compile(layout: str) -> None:
    x = torch.randn(36, 40).bfloat16().requires_grad_()
    torch.library.opcheck(ops.relu2_prune24.default, (x, layout))
    compiled = torch.compile(lambda t: slkernels.relu2_prune24(t, layout), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x), slkernels.relu2_prune24(x, layout), strict=True):
        assert_bitwise_equal(got, want, layout)
    dvalues, values = torch.randn(3, 8), torch.rand(3, 8)
    torch.library.opcheck(ops.relu2_backward24.default, (dvalues, values))


@pytest.mark.parametrize(
    "x,layout,message",
    [
        (torch.ones(4), "plain", "x must be [tokens, m], got [4]"),
        (torch.ones(4, 4).long(), "plain", "x must be float32, bfloat16, float16 or float64, got int64"),
        (torch.ones(4, 4), "rows", "layout must be plain, sm80 or sm90, got rows"),
        (torch.ones(4, 4), "sm90", "layout sm90 needs bfloat16 or float16, got float32"),
    ],
)
def test_error(x: Tensor, layout: str, message: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        slkernels.relu2_prune24(x, layout)
    assert str(caught.value).startswith(f"slkernels::relu2_prune24: {message}")


def test_error_of_the_backward() -> None:
    with pytest.raises(RuntimeError, match=r"slkernels::relu2_backward24: dvalues must be \[3, 8\], got \[3, 4\]"):
        ops.relu2_backward24(torch.ones(3, 4), torch.ones(3, 8))
