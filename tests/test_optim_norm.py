"""grad_norm_sq and clip_coef: clipping by global norm that writes nothing."""

import os
import subprocess
import sys

import pytest
import slkernels
import torch
from slkernels.optim import clip_coef, global_norm_sq, grad_norm_sq
from test_optim import FLOATS, random_tensor, same_bits

SIZES = [(1,), (0,), (15,), (16, 4), (63,), (16384,), (16385,), (5461, 7), (100_003,)]


def make_grads(dtype=torch.float32, device="cpu"):
    return [random_tensor(*s, seed=i, decades=3.0).to(device, dtype) for i, s in enumerate(SIZES)]


@pytest.mark.parametrize("dtype", FLOATS)
def test_norm_matches_float64(dtype, device):
    grads = make_grads(dtype, device)
    for some in (grads, *([g] for g in grads), grads[::-1], [random_tensor(300, 70).to(device, dtype).t(), grads[5]]):
        want = sum(g.double().square().sum() for g in some)
        got = grad_norm_sq(some)
        assert got.shape == () and got.dtype == torch.float32 and got.device.type == device.type
        # 256 additions in float32 and the rounding of the result; the errors of the sums have either sign.
        torch.testing.assert_close(got.double(), want.double(), rtol=2e-6, atol=0)


def test_norm_of_mixed_dtypes(device):
    grads = [g.to(t) for t in FLOATS for g in make_grads(device=device)]
    want = sum(g.double().square().sum() for g in grads)
    torch.testing.assert_close(grad_norm_sq(grads).double(), want, rtol=2e-6, atol=0)


def test_one_element_anywhere_counts(device):
    """No element is dropped or read twice, whatever its place in vectors, chunks and tensors."""
    for n in (1, 17, 63, 64, 65, 16383, 16384, 16385, 40000):
        for i in sorted({0, n // 2, n - 1, max(0, n - 2), min(16384, n - 1), min(16383, n - 1)}):
            x = torch.zeros(n, device=device)
            x[i] = 3.0
            assert grad_norm_sq([torch.zeros(5, device=device), x]).item() == 9.0, (n, i)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_bad_element_is_seen(bad, dtype, device):
    for i in (0, 16384, 39999):
        x = torch.ones(40000, dtype=dtype, device=device)
        x[i] = bad
        norm_sq = grad_norm_sq([x])
        assert norm_sq.isnan() if bad != bad else norm_sq == float("inf")
        assert not clip_coef(norm_sq, 1.0).isfinite()


def test_norm_does_not_depend_on_threads(threads):
    grads, results = make_grads(), []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(grad_norm_sq(grads))
    assert all(same_bits(results[0], r) for r in results[1:])


SCRIPT = """
import sys, torch, slkernels
sys.path.insert(0, sys.argv[1])
from test_optim_norm import FLOATS, make_grads
assert slkernels.build_info()["cpu_isa"] == sys.argv[2]
print([slkernels.optim.grad_norm_sq(make_grads(dtype)).view(torch.int32).item() for dtype in FLOATS])
"""


def test_norm_has_the_same_bits_on_every_instruction_set():
    printed = {}
    for isa in slkernels.build_info()["cpu_isas"]:
        environment = {**os.environ, "SLKERNELS_CPU_ISA": isa}
        command = [sys.executable, "-c", SCRIPT, os.path.dirname(__file__), isa]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if "is not available on this machine" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        printed[isa] = done.stdout
    assert len(set(printed.values())) == 1, printed


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e6])
def test_clipping_is_torch_clipping(max_norm, device):
    grads = make_grads(device=device)
    params = [torch.nn.Parameter(torch.zeros_like(g, dtype=torch.float64)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.double()
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
    norm_sq = global_norm_sq(grads)
    torch.testing.assert_close(norm_sq.double().sqrt(), norm, rtol=2e-6, atol=0)
    divisor = clip_coef(norm_sq, max_norm)
    assert (divisor > 1) == (norm > max_norm)
    for p, g in zip(params, grads, strict=True):
        torch.testing.assert_close((g / divisor).double(), p.grad, rtol=3e-6, atol=0)


def test_clip_coef_values(device):
    for norm_sq, max_norm, want in ((4.0, 1.0, 2.000001), (4.0, 2.0, 1.0000005), (3.99, 2.0, 1.0), (0.0, 1.0, 1.0)):
        got = clip_coef(torch.tensor(norm_sq, device=device), max_norm)
        assert got.shape == () and got.item() == pytest.approx(want, rel=1e-7)


def test_norm_opcheck_and_compile(device):
    grads = [g for g in make_grads(device=device) if g.numel() < 20000]
    torch.library.opcheck(torch.ops.slkernels.grad_norm_sq.default, (grads,))
    torch.library.opcheck(torch.ops.slkernels.clip_coef.default, (torch.ones(1, device=device), 2.0))

    def divisor(grads):
        return clip_coef(grad_norm_sq(grads), 0.5) * 2

    compiled = torch.compile(divisor, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(grads), divisor(grads))


def test_norm_errors():
    ops = torch.ops.slkernels
    for op, call, message in (
        ("grad_norm_sq", lambda: ops.grad_norm_sq([torch.ones(2), torch.ones(2).double()]), r"grads\[1\] must be flo"),
        ("clip_coef", lambda: ops.clip_coef(torch.ones(2), 1.0), "norm_sq must be a float32 tensor with one element"),
        ("clip_coef", lambda: ops.clip_coef(torch.ones(1).double(), 1.0), r"one element, got float64 \[1\]"),
        ("clip_coef", lambda: ops.clip_coef(torch.ones(1), 0.0), "max_norm must be positive, got 0"),
    ):
        for mode in (torch.device("cpu"), torch.device("meta")):
            with mode, pytest.raises(RuntimeError, match=f"slkernels::{op}: .*{message}"):
                call()
