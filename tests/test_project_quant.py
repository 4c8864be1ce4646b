"""quantize_group, dequantize_group, project_back_add_q_, w8a16_linear."""

from __future__ import annotations

import math

import pytest
import slkernels
import torch
import torch.nn.functional as F
from harness import FLOATS, LAYOUTS, Inputs, assert_bitwise_equal
from op_tests import ErrorCase, OpTests
from slkernels.reference import project as reference
from slkernels.reference.philox import rounding_bits
from torch import Tensor

ops = torch.ops.slkernels

SHAPES = [(1, 1), (3, 16), (2, 17), (5, 256), (3, 300), (2, 5461), (4, 2736), (7,), (2, 3, 40), (0, 5), (5, 0)]


def rng(seed: int = 5, step: int = 1, device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor([seed, step], device=device)


def weights(*shape: int, dtype: torch.dtype = torch.float32, device="cpu", seed: int = 0) -> Tensor:
    return Inputs(dtype, device, seed=seed).tensor(*shape)


def assert_same(got: tuple, want: tuple, what: str) -> None:
    for name, g, w in zip(("codes", "scale", "zero"), got, want, strict=True):
        assert_bitwise_equal(g, w.to(g.device), f"{what} {name}")


def call_quantize(**changes):
    a = {"w": torch.ones(4, 5), "bits": 8, "group": 16, "round_mode": 0, "rng": None} | changes
    return ops.quantize_group(*a.values())


def call_linear(**changes):
    codes, scale, zero = slkernels.quantize_group(torch.ones(6, 40), group=32)
    a = {"x": torch.ones(3, 40), "codes": codes, "scale": scale, "zero": zero, "group": 32, "bias": None}
    a |= {"carrier": None} | changes
    return ops.w8a16_linear(*a.values())


def call_back_add(**changes):
    codes, scale, zero = slkernels.quantize_group(torch.ones(6, 40), group=32)
    a = {"codes": codes, "scale": scale, "zero": zero, "N": torch.ones(6, 2), "lr": torch.tensor(0.1)}
    a |= {"left": None, "right": torch.ones(2, 40)} | changes
    return ops.project_back_add_q_(*a.values(), group=32)


def error(op: str, id: str, message: str, call, **changes) -> ErrorCase:
    return ErrorCase(op, f"{op}_{id}", lambda: call(**changes), message)


class TestQuant(OpTests):
    errors = [  # noqa: RUF012
        error("quantize_group", "bits", "bits must be 4 or 8, got 3", call_quantize, bits=3),
        error(
            "quantize_group", "group", "group must be a multiple of 16 from 16 to 4096, got 24", call_quantize, group=24
        ),
        error(
            "quantize_group",
            "large",
            "group must be a multiple of 16 from 16 to 4096, got 4112",
            call_quantize,
            group=4112,
        ),
        error(
            "quantize_group",
            "dtype",
            "w must be float32, bfloat16 or float16, got float64",
            call_quantize,
            w=torch.ones(3).double(),
        ),
        error("quantize_group", "scalar", "w must have at least one dimension", call_quantize, w=torch.tensor(1.0)),
        error("quantize_group", "rng", "round_mode 1 needs rng, int64 [2] = (seed, step)", call_quantize, round_mode=1),
        error("w8a16_linear", "x", "x must be [tokens, 40], got [3, 41]", call_linear, x=torch.ones(3, 41)),
        error(
            "w8a16_linear",
            "codes",
            "codes must be uint8, got int8",
            call_linear,
            codes=torch.ones(6, 40, dtype=torch.int8),
        ),
        error("w8a16_linear", "scale", "scale must be [6, 2], got [6, 3]", call_linear, scale=torch.ones(6, 3)),
        error("w8a16_linear", "zero", "zero must be uint8, got float32", call_linear, zero=torch.ones(6, 2)),
        error("w8a16_linear", "bias", "bias must be [6], got [5]", call_linear, bias=torch.ones(5)),
        error("w8a16_linear", "carrier", "carrier must be [6, 40], got [6, 2]", call_linear, carrier=torch.ones(6, 2)),
        error(
            "project_back_add_q_", "right", "right must be [2, 40], got [2, 39]", call_back_add, right=torch.ones(2, 39)
        ),
        error(
            "project_back_add_q_",
            "codes",
            "codes, scale and zero must be contiguous",
            call_back_add,
            codes=torch.ones(40, 6, dtype=torch.uint8).t(),
        ),
    ]


# ---- quantize_group, dequantize_group -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_numeric_codes_are_their_definition(shape, bits: int, dtype: torch.dtype, device: torch.device) -> None:
    for group in (16, 256, 4096):
        w = weights(*shape, dtype=dtype, device=device)
        got = ops.quantize_group(w, bits, group)
        assert_same(got, reference.quantize_group(w.cpu(), bits, group), f"group {group}")
        for out in (None, *FLOATS):
            read = ops.dequantize_group(*got, shape[-1], bits, group, out)
            want = reference.dequantize_group(*(t.cpu() for t in got), shape[-1], bits, group, out)
            assert_bitwise_equal(read.cpu(), want, f"group {group} {out}")
        step = got[1].repeat_interleave(group, -1)[..., : shape[-1]]
        read = ops.dequantize_group(*got, shape[-1], bits, group)
        assert ((read - w.float()).abs() <= 0.5001 * step + 1e-6 * w.float().abs()).all()


@pytest.mark.parametrize("shape", [(3, 300), (2, 5461), (2, 3, 40)], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_numeric_stochastic_codes_are_their_definition(shape, bits: int, device: torch.device) -> None:
    w = weights(*shape, device=device)
    got = ops.quantize_group(w, bits, 256, 1, rng(3, 2**33 + 5, device))
    uniform = rounding_bits(w.numel(), 3, 5).view(shape).float() / 65536
    assert_same(got, reference.quantize_group(w.cpu(), bits, 256, uniform), "stochastic")


@pytest.mark.parametrize("bits", [4, 8])
def test_stochastic_rounding_is_unbiased(bits: int) -> None:
    w = weights(4, 512)
    total = torch.zeros_like(w)
    for step in range(200):
        codes = slkernels.quantize_group(w, bits, 256, 1, rng(1, step))
        total += slkernels.dequantize_group(*codes, bits=bits)
    step_size = codes[1].repeat_interleave(256, -1)
    groups = w.view(4, 2, 256)
    reach = codes[1][..., None]
    inner = (groups > groups.amin(-1, keepdim=True) + reach) & (groups < groups.amax(-1, keepdim=True) - reach)
    # zero is an integer: one end of the range may lie up to half a step beyond the last code
    error = (total / 200 - w).abs() - 0.5001 * step_size * ~inner.view_as(w)
    assert (error <= 5 * step_size / 2 / 200**0.5 + 1e-6).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_stochastic_rounding_keeps_what_is_on_the_grid(bits: int) -> None:
    top = 2**bits - 1
    w = (torch.arange(256) % (top + 1) - top // 3).float().repeat(8, 1) / 16
    codes = slkernels.quantize_group(w, bits, 256, 1, rng())
    assert_bitwise_equal(slkernels.dequantize_group(*codes, bits=bits), w, "grid")


@pytest.mark.parametrize("bits", [4, 8])
def test_single_sign_groups_keep_their_accuracy(bits: int) -> None:
    """Q-GaLore's quantizer clamps the zero point of a group in [1, 2] and errs by 1.005 (unsloth #10841)."""
    w = torch.rand(4, 256) + 1
    for sign in (1, -1):
        codes, scale, zero = slkernels.quantize_group(sign * w, bits)
        read = slkernels.dequantize_group(codes, scale, zero, bits=bits)
        assert (read - sign * w).abs().max() <= 0.51 * scale.max() <= 0.51 * 2.0 / (2**bits - 1) * 1.001
        assert (zero == (0 if sign > 0 else 2**bits - 1)).all()


def test_four_bits_are_four_bits() -> None:
    """Q-GaLore stores one 4-bit code a byte: twice what it reports."""
    w = weights(8, 1024)
    codes, scale, zero = slkernels.quantize_group(w, 4, 256)
    assert codes.shape == (8, 512) and codes.untyped_storage().nbytes() == w.numel() // 2
    assert scale.numel() == zero.numel() == 32
    first = slkernels.dequantize_group(codes, scale, zero, bits=4)
    codes[0, 0] = codes[0, 0] ^ 0x10  # the high half is the even column
    second = slkernels.dequantize_group(codes, scale, zero, bits=4)
    assert (first != second).nonzero().tolist() == [[0, 0]]


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_is_exact(bits: int) -> None:
    w = weights(16, 256)
    w[:, ::3] = 0.0
    w[3] = 0.0
    for mode, generator in ((0, None), (1, rng())):
        codes, scale, zero = slkernels.quantize_group(w, bits, 64, mode, generator)
        read = slkernels.dequantize_group(codes, scale, zero, bits=bits, group=64)
        assert (read[w == 0] == 0).all() and (scale[3] == 0).all() and (codes[3] == 0).all()


def test_special_values() -> None:
    w = torch.zeros(6, 32)
    w[0, 3], w[1, 3], w[2, 3], w[3, 3], w[4, 3] = math.nan, math.inf, -math.inf, 1e-44, 1e-39
    w[5, 3], w[5, 4] = 3e38, -3e38
    codes, scale, zero = slkernels.quantize_group(w, group=16)
    assert scale[[0, 1, 2, 5], 0].isnan().all() and (codes[[0, 1, 2, 5], :16] == 0).all()
    assert (scale[:, 1] == 0).all() and (zero[:, 1] == 0).all()
    read = slkernels.dequantize_group(codes, scale, zero, group=16)
    assert read[3, 3] == 0  # below the smallest scale
    assert abs(float(read[4, 3]) / 1e-39 - 1) < 1e-2
    assert read[0, :16].isnan().all() and (read[0, 16:] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    w = LAYOUTS[layout](weights(6, 40))
    got = slkernels.quantize_group(w, 4, 16)
    assert_same(got, slkernels.quantize_group(w.contiguous(), 4, 16), layout)
    moved = [t.t().contiguous().t() for t in got]
    assert_bitwise_equal(
        slkernels.dequantize_group(*moved, bits=4, group=16), slkernels.dequantize_group(*got, bits=4, group=16), layout
    )


def test_codes_do_not_depend_on_threads(threads) -> None:
    w = weights(300, 700)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(slkernels.quantize_group(w, 8, 256, 1, rng()))
    assert_same(results[1], results[0], "2 threads")
    assert_same(results[2], results[0], "3 threads")


# ---- project_back_add_q_ --------------------------------------------------------------------------------------------


def integer_factors(n: int, m: int, device) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(3)
    N = torch.randint(-2, 3, (n, 8), generator=gen).float()
    return N.to(device), torch.randint(-2, 3, (8, m), generator=gen).float().to(device)


@pytest.mark.parametrize("shape", [(3, 16), (5, 300), (2, 5461), (900, 4096), (3, 2736)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", [0, 1])
def test_numeric_back_add_q_is_its_definition(shape, dtype: torch.dtype, mode: int, device: torch.device) -> None:
    """Dequantize, decay, add, quantize: bit for bit, with a product that is exact."""
    N, right = integer_factors(*shape, device)
    codes = slkernels.quantize_group(weights(*shape, device=device))
    lr, alpha, decay = (torch.tensor(v) for v in (0.03, 0.25, 0.1))
    scale = (1 - lr.double() * decay.double()).float()
    start = reference.dequantize_group(*(t.cpu() for t in codes))
    x = ((start * scale).double() + (-lr * alpha).double() * (N @ right).cpu().double()).float()
    uniform = rounding_bits(x.numel(), 5, 1).view(shape).float() / 65536 if mode else None
    got = tuple(t.clone() for t in codes)
    slkernels.project_back_add_q_(
        *got,
        N.to(dtype),
        lr.to(device),
        None,
        right.to(dtype),
        alpha=0.25,
        weight_decay=0.1,
        round_mode=mode,
        rng=rng(device=device),
    )
    assert_same(got, reference.quantize_group(x, uniform=uniform), "update")
    before = tuple(t.clone() for t in got)
    slkernels.project_back_add_q_(
        *got,
        N.to(dtype),
        lr.to(device),
        None,
        right.to(dtype),
        found_inf=torch.ones(1, device=device),
        round_mode=mode,
        rng=rng(device=device),
    )
    assert_same(got, before, "found_inf")


def test_small_steps_of_quantized_weights_count_on_average() -> None:
    """Steps of a sixteenth of the quantization step: nearest rounding stands still."""
    w = (torch.arange(256) - 128).repeat(64, 1) / 16.0  # on the grid
    nearest, random = slkernels.quantize_group(w), slkernels.quantize_group(w)
    start = slkernels.dequantize_group(*random)
    N, right = torch.ones(64, 1), torch.ones(1, 256)
    right[0, 0] = right[0, 255] = 0.0  # the range stays
    lr = torch.tensor(float(random[1][0, 0]) / 16)
    for step in range(32):
        slkernels.project_back_add_q_(*nearest, N, lr, None, right, round_mode=0)
        slkernels.project_back_add_q_(*random, N, lr, None, right, rng=rng(1, step))
    assert torch.equal(slkernels.dequantize_group(*nearest), start)
    moved = (start - slkernels.dequantize_group(*random))[:, 40:216].mean() / (32 * lr)
    assert abs(float(moved) - 1) < 0.05, float(moved)


@pytest.mark.parametrize("shape", [(0, 16), (5, 0)], ids=str)
def test_empty_quantized_weights(shape) -> None:
    codes = slkernels.quantize_group(torch.zeros(shape))
    N, right = torch.zeros(shape[0], 2), torch.zeros(2, shape[1])
    slkernels.project_back_add_q_(*codes, N, torch.tensor(0.1), None, right, rng=rng())
    y = slkernels.w8a16_linear(torch.ones(3, shape[1]), *codes, bias=torch.ones(shape[0]))
    assert y.shape == (3, shape[0]) and (y == 1).all()


# ---- w8a16_linear ---------------------------------------------------------------------------------------------------

# leading shape of x, n, m, group, bias
LINEAR = {
    "vector": ((), 5, 7, 16, True),
    "one_token": ((1,), 131, 300, 256, False),
    "few_tokens": ((2, 6), 67, 2736, 256, True),
    "tokens_16": ((16,), 33, 5461, 256, False),
    "tokens_17": ((17,), 33, 5461, 256, True),
    "many_tokens": ((300,), 65, 130, 64, True),
    "slices": ((40,), 1031, 1100, 256, True),
    "no_tokens": ((0,), 5, 20, 16, True),
}


def linear_problem(name: str, dtype: torch.dtype, device="cpu") -> tuple:
    lead, n, m, group, bias = LINEAR[name]
    inputs = Inputs(dtype, device)
    codes = slkernels.quantize_group(weights(n, m, device=device), 8, group)
    return inputs.tensor(*lead, m), *codes, group, inputs.tensor(n) if bias else None


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_numeric_linear(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Forward, and the gradients of x, bias and the carrier, against float64 and the same formula in torch."""
    x, codes, scale, zero, group, bias = linear_problem(name, dtype, device)
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is for gradcheck on a CPU")
    W = slkernels.dequantize_group(codes, scale, zero, group=group).double()
    leaves = {"x": x, "carrier": slkernels.grad_carrier(codes, dtype).detach()} | (
        {} if bias is None else {"bias": bias}
    )
    leaves = {k: v.requires_grad_() for k, v in leaves.items()}
    y = slkernels.w8a16_linear(leaves["x"], codes, scale, zero, group, leaves.get("bias"), leaves["carrier"])
    assert y.shape == (*x.shape[:-1], codes.shape[0]) and y.dtype == dtype
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    y.backward(dy)

    def run(weight: Tensor, kind: torch.dtype, absolute: bool = False) -> dict[str, Tensor]:
        part = (lambda t: t.detach().abs()) if absolute else (lambda t: t.detach().clone())
        given = {"x": part(x).to(kind), "W": part(weight).to(kind), "b": None if bias is None else part(bias).to(kind)}
        given = {k: None if v is None else v.requires_grad_() for k, v in given.items()}
        out = F.linear(given["x"], given["W"], given["b"])
        out.backward(part(dy).to(kind))
        grads = {"x": given["x"].grad, "carrier": given["W"].grad}
        return {"y": out.detach()} | grads | ({} if bias is None else {"bias": given["b"].grad})

    want, size = run(W, torch.float64), run(W, torch.float64, absolute=True)
    in_torch = run(W.to(dtype), dtype)
    got = {"y": y.detach()} | {k: v.grad for k, v in leaves.items()}
    ulp = torch.finfo(dtype).eps / 2
    terms = max(x.numel(), *codes.shape)
    for key, w in want.items():
        error = (got[key].double() - w).abs()
        accumulate = 0 if dtype == torch.float64 else 2 * (2 + terms**0.5) * 2.0**-24
        bound = 1.01 * ulp * w.abs() + (accumulate + (1.01 + 16 * (dtype == torch.float64)) * ulp) * size[key]
        bound += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert (error <= bound).all(), f"{key}: {float((error / bound).max())}"
        if error.numel() and dtype != torch.float64:
            torch_error = (in_torch[key].double() - w).abs().max()
            assert error.max() <= 2 * torch_error + ulp * w.abs().max() + 2.0**-24 * size[key].max(), key


def test_linear_gradcheck() -> None:
    x, codes, scale, zero, group, bias = linear_problem("vector", torch.float64)
    x, bias = x.requires_grad_(), bias.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: ops.w8a16_linear(a, codes, scale, zero, group, b), (x, bias))


@pytest.mark.parametrize("tokens", [3, 40])
def test_linear_layouts(tokens: int) -> None:
    codes = slkernels.quantize_group(weights(70, 130), 8, 64)
    x = weights(tokens, 130, seed=1)
    for name, layout in LAYOUTS.items():
        moved, strided = layout(x), [t.t().contiguous().t() for t in codes]
        got = ops.w8a16_linear(moved, *strided, 64)
        torch.testing.assert_close(got, ops.w8a16_linear(moved.contiguous(), *codes, 64), msg=name)
        dy = layout(weights(tokens, 70, seed=2))
        got = ops._w8a16_linear_dx(dy, *strided, 64)
        torch.testing.assert_close(got, ops._w8a16_linear_dx(dy.contiguous(), *codes, 64), msg=name)


def test_the_carrier_is_a_leaf_without_memory() -> None:
    """Hooks, accumulation and an optimizer's view of the weight's gradient: what ``weight.float_grad`` never was."""
    codes, scale, zero = slkernels.quantize_group(weights(20, 48), 8, 16)
    carrier = slkernels.grad_carrier(codes, torch.bfloat16)
    assert carrier.shape == (20, 48) and carrier.untyped_storage().nbytes() == 2 and carrier.is_leaf
    calls = []
    carrier.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.shape))
    x = weights(5, 48, dtype=torch.bfloat16, seed=1)
    want = torch.zeros(20, 48)
    for _ in range(2):
        y = slkernels.w8a16_linear(x, codes, scale, zero, 16, carrier=carrier)
        y.backward(torch.ones_like(y))
        want += torch.ones(20, 5) @ x.float()
    assert calls == [(20, 48)] * 2
    assert carrier.grad.is_contiguous()
    torch.testing.assert_close(carrier.grad.float(), want, rtol=2e-2, atol=2e-2)


def test_a_frozen_linear_does_not_keep_x() -> None:
    codes, scale, zero = slkernels.quantize_group(weights(20, 48), 8, 16)
    x = weights(5, 48).requires_grad_()
    carrier = slkernels.grad_carrier(codes, torch.float32)
    for trained in (True, False):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            slkernels.w8a16_linear(x, codes, scale, zero, 16, carrier=carrier.requires_grad_(trained))
        assert (x.data_ptr() in [t.data_ptr() for t in saved]) == trained


# ---- torch's own rules ----------------------------------------------------------------------------------------------


def op_calls() -> dict:
    w = weights(6, 40)
    codes = slkernels.quantize_group(w, 8, 16)
    packed = slkernels.quantize_group(w, 4, 16)
    x = weights(3, 40, seed=1).requires_grad_()
    lr = torch.tensor(0.1)
    bias, carrier = torch.ones(6, requires_grad=True), slkernels.grad_carrier(codes[0], torch.float32)
    return {
        "quantize_group": ((w, 4, 16, 1, rng()), {}),
        "dequantize_group": ((*packed, 40, 4, 16, torch.bfloat16), {}),
        "project_back_add_q_": (
            (*codes, torch.ones(6, 2), lr, None, torch.ones(2, 40)),
            {"group": 16, "round_mode": 1, "rng": rng()},
        ),
        "w8a16_linear": ((x, *codes, 16, bias, carrier), {}),
    }


@pytest.mark.parametrize("op", ["quantize_group", "dequantize_group", "project_back_add_q_", "w8a16_linear"])
def test_opcheck(op: str) -> None:
    args, kwargs = op_calls()[op]
    torch.library.opcheck(getattr(ops, op).default, args, kwargs)


def test_linear_compiles() -> None:
    args, _ = op_calls()["w8a16_linear"]
    compiled = torch.compile(lambda *a: ops.w8a16_linear(*a) * 2, fullgraph=True, backend="aot_eager")
    want, got = ops.w8a16_linear(*args) * 2, compiled(*args)
    assert_bitwise_equal(got, want, "forward")
    leaves = [args[0], *args[5:]]
    for a, b in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        assert_bitwise_equal(a, b, "gradient")
