"""The products in the layouts that the hardware reads, and the rule by which linear24 picks a kernel on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import slkernels
import torch
import torch.nn.functional as F
from harness import Inputs, OpCase, assert_bitwise_equal, assert_matches_reference
from semi24_data import drawn_pack, pruned_pack, transposable_pack
from slkernels import reference
from slkernels.semi24 import sparse_pays24
from torch import Tensor

ops = torch.ops.slkernels
HALVES = [torch.bfloat16, torch.float16]

# tokens, n, m, activation, bias
PRODUCTS = {
    "one_token": (1, 64, 128, "none", False),
    "corner": (3, 1, 1, "relu", True),
    "ragged": (130, 70, 201, "silu", True),
    "columns_2736": (37, 131, 2736, "relu2", True),
    "rows_5461": (9, 5461, 19, "none", True),
    "tokens_300": (300, 264, 80, "gelu", True),
    "no_tokens": (0, 5, 8, "none", True),
    "no_features": (3, 5, 0, "silu", True),
}


@pytest.fixture(params=["sm80", "sm90"])
def layout(request, device) -> str:
    if request.param == "sm90" and device.type == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("layout sm90 needs a GPU of compute capability 9.0")
    return request.param


def packed(values: Tensor, meta: Tensor, n: int, m: int, layout: str) -> tuple[Tensor, Tensor]:
    return ops.convert24(values, meta, n, m, "plain", layout)


@dataclass(frozen=True)
class Packed(OpCase):
    """linear24's or linear24_train's arguments, plain; the call converts them."""

    layout: str = ""

    def __call__(self, x, values, meta, *rest) -> Tensor:
        m = x.shape[-1]
        if self.op == "linear24_packed":
            n, *end = rest
            return ops.linear24_packed(x, *packed(values, meta, n, m, self.layout), n, self.layout, *end)
        values_t, meta_t, n, bias, activation, weight = rest
        packs = *packed(values, meta, n, m, self.layout), *packed(values_t, meta_t, m, n, self.layout)
        return ops.linear24_train(x, *packs, n, bias, activation, weight, self.layout)


def with_slope(f):
    """On absolute values: z (1 + z) bounds each activation and what an error of z does to it."""

    def magnitude(*args):
        names = [a if isinstance(a, Tensor) or a is None or isinstance(a, int) else "none" for a in args]
        z = f(*names)
        return z * (1 + z)

    return magnitude


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_numeric_packed(name, dtype, layout, device) -> None:
    tokens, n, m, activation, bias = PRODUCTS[name]
    inputs = Inputs(dtype, device)
    pack = drawn_pack(inputs, n, m, scale=max(m, 1) ** -0.5)
    args = inputs.tensor(tokens, m), *pack, n, inputs.tensor(n) if bias else None, activation
    case = Packed(
        "linear24_packed",
        name,
        lambda _: args,
        reference.linear24,
        terms=m,
        roundings=1,
        magnitude=with_slope(reference.linear24),
        layout=layout,
    )
    assert_matches_reference(case, args, backward=False)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("straight_through", [False, True])
def test_numeric_packed_train(straight_through, activation, dtype, layout, device) -> None:
    tokens, n, m = 70, 45, 130
    inputs = Inputs(dtype, device)
    if straight_through:
        values, meta = drawn_pack(inputs, n, m)
        packs = values, meta, *pruned_pack(reference.dense24(values, meta, m).t())
    else:
        packs = transposable_pack(inputs, n, m)
    weight = inputs.tensor(n, m) if straight_through else None
    args = inputs.tensor(tokens, m), *packs, n, inputs.tensor(n), activation, weight
    case = Packed(
        "linear24_train",
        activation,
        lambda _: args,
        reference.linear24_train,
        terms=max(tokens, n, m),
        roundings=4,
        magnitude=with_slope(reference.linear24_train),
        layout=layout,
    )
    assert_matches_reference(case, args)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_numeric_packed_gradient_has_the_plain_bits(dtype, layout, device) -> None:
    tokens, n, m = 75, 70, 133
    inputs = Inputs(dtype, device)
    values, meta = drawn_pack(inputs, n, m)
    dy, x = inputs.tensor(tokens, n), inputs.tensor(tokens, m)
    codes = packed(values, meta, n, m, layout)[1]
    got = ops.convert24(ops.dw_compress24(dy, x, codes, layout), codes, n, m, layout, "plain")[0]
    assert_bitwise_equal(got, ops.dw_compress24(dy, x, meta), layout)


def test_rule() -> None:
    assert sparse_pays24(4096, 4096, 4096) and sparse_pays24(16384, 4096, 11008)
    assert not sparse_pays24(2048, 2048, 2048) and not sparse_pays24(256, 16384, 16384)


def test_linear24_leaves_small_products_to_the_dense_library(gpu) -> None:
    inputs = Inputs(torch.bfloat16, gpu)
    x, (values, meta) = inputs.tensor(256, 512), drawn_pack(inputs, 384, 512)
    dense = F.linear(x, slkernels.decompress24(values, meta, 384, 512))
    assert_bitwise_equal(slkernels.linear24(x, values, meta, 384), dense, "dense")


def test_linear24_takes_large_products_to_the_sparse_tensor_cores(gpu) -> None:
    tokens, n, m = 2100, 2056, 2061
    inputs = Inputs(torch.bfloat16, gpu)
    args = inputs.tensor(tokens, m), *drawn_pack(inputs, n, m, scale=m**-0.5), n, inputs.tensor(n), "none"
    assert sparse_pays24(tokens, n, m)
    case = OpCase("linear24", "large", lambda _: args, reference.linear24, terms=m)
    assert_matches_reference(case, args, backward=False)
    layout = "sm90" if torch.cuda.get_device_capability() == (9, 0) else "sm80"
    x, values, meta, _, *end = args
    sparse = ops.linear24_packed(x, *packed(values, meta, n, m, layout), n, layout, *end)
    assert_bitwise_equal(slkernels.linear24(*args), sparse, layout)


def test_layout_sm90_is_refused_elsewhere(gpu) -> None:
    if torch.cuda.get_device_capability() == (9, 0):
        pytest.skip("this GPU runs it")
    inputs = Inputs(torch.bfloat16, gpu)
    pack = packed(*drawn_pack(inputs, 64, 128), 64, 128, "sm90")
    with pytest.raises(RuntimeError, match=r"layout sm90 needs a GPU of compute capability 9\.0"):
        ops.linear24_packed(inputs.tensor(3, 128), *pack, 64, "sm90")
