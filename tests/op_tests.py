"""The tests that every op passes. A family's file has one subclass: ``class TestSparse(OpTests): cases = [...]``.

Tests named test_numeric_* are also run for every instruction set of the machine (test_isa.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from harness import (
    FLOATS,
    LAYOUTS,
    Inputs,
    OpCase,
    assert_bitwise_equal,
    assert_matches_reference,
    floats,
    gradients,
    is_float,
    map_floats,
    run_bits,
    with_grad,
)
from supports import Fault
from torch import Tensor


@dataclass(frozen=True)
class ErrorCase:
    """A wrong call and the text that the error must hold."""

    op: str
    id: str
    call: Callable[[], object]
    message: str


class OpTests:
    cases: ClassVar[list[OpCase]] = []
    errors: ClassVar[list[ErrorCase]] = []
    fault_calls: ClassVar[dict[str, Callable]] = {}  # op: (crow, col, validate) -> result, for a FAULT_SHAPE support

    SMALL = frozenset({"gradcheck", "opcheck", "compile", "export", "layout"})

    @classmethod
    def selects(cls, test: str, case: OpCase) -> bool:
        """Which cases a test runs on: the costly ones take the small cases only."""
        if not case.small and any(word in test for word in cls.SMALL):
            return False
        if "grad" in test and not case.differentiable:
            return False
        return case.exact or "exact" not in test

    # ---- numbers

    @pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
    def test_numeric_reference(self, case: OpCase, dtype: torch.dtype, device: torch.device) -> None:
        assert_matches_reference(case, case.make(Inputs(dtype, device)))

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_numeric_exact_integers(self, case: OpCase, dtype: torch.dtype, device: torch.device) -> None:
        args = case.make(Inputs(dtype, device, integers=True))
        want = case.reference(*map_floats(Tensor.double, args))
        assert want.abs().max() > 0, "a case of zeros proves nothing"
        assert_bitwise_equal(case(*args), want.to(dtype), str(case))

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    def test_numeric_layout(self, case: OpCase, layout: str, dtype: torch.dtype, device: torch.device) -> None:
        """Strided, offset, expanded inputs in the middle of NaN give the right answer."""
        args = case.make(Inputs(dtype, device))
        positions = [i for i, a in enumerate(args) if is_float(a)]
        one_by_one = [[p] for p in positions] if dtype == torch.float32 else []
        for changed in [*one_by_one, positions]:
            moved = tuple(LAYOUTS[layout](a) if i in changed else a for i, a in enumerate(args))
            assert_matches_reference(case, moved)

    def test_numeric_layout_of_incoming_gradient(self, case: OpCase, device: torch.device) -> None:
        """y.sum(), y.mean(0) and y.t() send expanded and transposed gradients backward."""
        args = with_grad(case.make(Inputs(torch.float32, device)))
        y = case(*args)
        if y.numel() == 0:
            pytest.skip("no elements, no gradient")
        dense = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
        for name, layout in LAYOUTS.items():
            cotangent = layout(dense)
            got = gradients(case, args, cotangent)
            want = gradients(case, args, cotangent.clone(memory_format=torch.contiguous_format))
            for g, w in zip(got, want, strict=True):
                torch.testing.assert_close(g, w, msg=lambda m, name=name: f"{case} {name}: {m}")

    # ---- autograd

    def test_gradcheck(self, case: OpCase, device: torch.device) -> None:
        args = with_grad(case.make(Inputs(torch.float64, device)))
        assert torch.autograd.gradcheck(case, args)
        if case.twice:
            assert torch.autograd.gradgradcheck(case, args)

    def test_gradient_of_each_input_alone(self, case: OpCase, device: torch.device) -> None:
        """A backward that computes only what is asked for computes the same."""
        args = case.make(Inputs(torch.float32, device))
        all_at_once = gradients(case, args, torch.ones_like(case(*args)))
        for index, want in enumerate(all_at_once):
            alone = list(map_floats(Tensor.detach, args))
            position = [i for i, a in enumerate(args) if is_float(a)][index]
            alone[position] = alone[position].clone().requires_grad_()
            y = case(*alone)
            assert y.requires_grad
            (got,) = torch.autograd.grad(y, alone[position], torch.ones_like(y))
            torch.testing.assert_close(got, want)

    # ---- torch's own rules

    def test_opcheck(self, case: OpCase, device: torch.device) -> None:
        args = case.make(Inputs(torch.float32, device))
        utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if case.differentiable:
            args = with_grad(args)
            utils.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(case.overload, args, test_utils=utils)

    def test_compile(self, case: OpCase, device: torch.device) -> None:
        args = with_grad(case.make(Inputs(torch.float32, device)))
        torch._dynamo.reset()
        compiled = torch.compile(lambda *a: case.overload(*a) * 2, fullgraph=True, backend="aot_eager")
        assert_compiled_equals_eager(compiled, lambda *a: case.overload(*a) * 2, args, str(case))

    def test_export(self, case: OpCase, device: torch.device) -> None:
        args = case.make(Inputs(torch.float32, device))
        tensors = [i for i, a in enumerate(args) if isinstance(a, Tensor)]

        class Module(torch.nn.Module):
            def forward(self, *given: Tensor) -> Tensor:
                full = list(args)
                for i, t in zip(tensors, given, strict=True):
                    full[i] = t
                return case.overload(*full)

        program = torch.export.export(Module(), tuple(args[i] for i in tensors))
        assert case.overload in [node.target for node in program.graph.nodes]

    # ---- memory and order

    def test_poisoned_allocations(self, case: OpCase, device: torch.device, poison_memory: Callable[[], None]) -> None:
        """Nothing that an op allocates is read before it is written, and all of it is written."""
        drawn = [case.make(Inputs(dtype, device)) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
        wants = [run_bits(case, args) for args in drawn]
        poison_memory()
        assert torch.empty(3).isnan().all()
        for args, want in zip(drawn, wants, strict=True):
            for index, (g, w) in enumerate(zip(run_bits(case, args), want, strict=True)):
                assert g.isfinite().all()
                assert_bitwise_equal(g, w, f"{case} result {index}")

    def test_poisoned_scratch(self, case: OpCase, device: torch.device) -> None:
        """What an earlier call left in reused buffers has no effect."""
        args = case.make(Inputs(torch.float32, device))
        before = run_bits(case, args)
        run_bits(case, map_floats(lambda t: torch.full_like(t, torch.nan), args))
        for index, (got, want) in enumerate(zip(run_bits(case, args), before, strict=True)):
            assert_bitwise_equal(got, want, f"{case} result {index}")

    def test_inputs_are_not_written(self, case: OpCase, device: torch.device) -> None:
        args = case.make(Inputs(torch.float32, device))
        copies = [a.clone() if isinstance(a, Tensor) else a for a in args]
        run_bits(case, args)
        for index, (a, copy) in enumerate(zip(args, copies, strict=True)):
            if isinstance(a, Tensor):
                assert_bitwise_equal(a, copy, f"{case} argument {index}")

    def test_deterministic(self, case: OpCase, threads: Callable[[int], None]) -> None:
        """The same bits in every run, and with every number of threads unless the dense library is involved."""
        for dtype in (torch.float32, torch.bfloat16):
            args = case.make(Inputs(dtype))
            threads(1)
            want = run_bits(case, args)
            for count in (1, 2, 3, 4):
                threads(count)
                if case.dense:
                    want = run_bits(case, args)
                for _ in range(2):
                    for index, (g, w) in enumerate(zip(run_bits(case, args), want, strict=True)):
                        assert_bitwise_equal(g, w, f"{case} result {index}, {count} threads")

    # ---- CUDA

    def test_cuda_graph_replays_on_new_inputs(self, case: OpCase, gpu: torch.device) -> None:
        """Capturing proves that the op neither synchronizes nor leaves the current stream; replaying, that nothing of
        the inputs was frozen into the graph."""
        args = case.unchecked(case.make(Inputs(torch.bfloat16, gpu)))
        run_bits(case, args)  # lazy initialization is not the op's own work
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run_bits(case, args)
        for t in floats(args):
            t.normal_()
        graph.replay()
        for index, (got, want) in enumerate(zip(captured, run_bits(case, args), strict=True)):
            assert_bitwise_equal(got, want, f"{case} result {index}")

    def test_cuda_stream_with_pending_work(self, case: OpCase, gpu: torch.device) -> None:
        """On a side stream the op waits for what that stream still has to do to its inputs."""
        args = case.unchecked(case.make(Inputs(torch.bfloat16, gpu)))
        want = run_bits(case, args)
        late = map_floats(torch.zeros_like, args)
        side = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            for to, source in zip(floats(late), floats(args), strict=True):
                to.copy_(source)
            got = run_bits(case, late)
        side.synchronize()
        for index, (g, w) in enumerate(zip(got, want, strict=True)):
            assert_bitwise_equal(g, w, f"{case} result {index}")

    # ---- errors

    def test_error(self, error: ErrorCase) -> None:
        with pytest.raises(RuntimeError) as caught:
            error.call()
        text = str(caught.value)
        assert text.startswith(f"slkernels::{error.op}: ") and error.message in text

    def test_fault(self, faulty: tuple[str, Fault]) -> None:
        """Every op finds every fault of a support, at its position, before it touches memory."""
        op, fault = faulty
        crow, col = fault.support()
        with pytest.raises(RuntimeError) as caught:
            self.fault_calls[op](crow, col, True)
        assert f"slkernels::{op}: {fault.message}" in str(caught.value)
        if not fault.needs_validate and op != "check_support":
            with pytest.raises(RuntimeError, match=rf"slkernels::{op}: "):
                self.fault_calls[op](crow, col, False)


def assert_compiled_equals_eager(compiled: Callable, eager: Callable, args: tuple, what: str) -> None:
    want, got = eager(*args), compiled(*args)
    assert_bitwise_equal(got, want, what)
    if not want.requires_grad:
        return
    cotangent = torch.ones_like(want)
    wants = torch.autograd.grad(want, floats(args), cotangent, allow_unused=True)
    gots = torch.autograd.grad(got, floats(args), cotangent, allow_unused=True)
    for index, (g, w) in enumerate(zip(gots, wants, strict=True)):
        assert (g is None) == (w is None)
        if g is not None:
            assert_bitwise_equal(g, w, f"{what} gradient {index}")
