"""lowrank_linear_multi and lowrank_swiglu."""

from __future__ import annotations

import pytest
import slkernels
import torch
from harness import Inputs, OpCase, assert_bitwise_equal, with_grad
from op_tests import ErrorCase, OpTests, assert_compiled_equals_eager
from slkernels import reference
from torch import Tensor

ops = torch.ops.slkernels

# ---- lowrank_linear_multi. Its lists stand one by one in a case's arguments: x, A, sizes, tensors. -----------------

# id: leading shape of x, m, (n, rank) each, bias, base, alpha, small
MULTI = {
    "small": ((3,), 4, ((5, 2), (3, 3)), False, False, None, True),
    "small_all": ((4,), 6, ((5, 2), (3, 1), (4, 3)), True, True, (0.5, 1.0, -2.0), True),
    "small_bias": ((4,), 6, ((5, 2), (3, 1)), True, False, (0.5, 1.0), True),
    "one": ((3,), 4, ((5, 2),), False, True, (0.5,), True),
    "vector": ((), 4, ((5, 2), (3, 2)), True, False, None, True),
    "batched": ((2, 3), 5, ((4, 2), (4, 2)), False, True, None, True),
    "no_tokens": ((0,), 4, ((5, 2), (3, 3)), True, True, None, True),
    "no_features": ((3,), 0, ((5, 2), (3, 3)), True, True, None, True),
    "no_outputs": ((3,), 4, ((0, 2), (3, 3)), False, False, None, True),
    "qkv_few_tokens": ((7,), 257, ((131, 31), (37, 8), (37, 17)), False, False, (0.5, 0.5, 0.5), False),
    "qkv": ((37,), 53, ((61, 13), (29, 13), (29, 13)), True, True, None, False),
    "rows_5461": ((19,), 23, ((5461, 11), (5461, 11)), False, False, None, False),
    "columns_2736": ((18,), 2736, ((19, 11), (23, 5)), False, True, None, False),
}


def pack(x: Tensor, A: Tensor, counts: tuple, *tensors: Tensor) -> tuple:
    """The op's arguments from a case's; counts: how many B, bias, base, and alpha."""
    B, bias, base = (list(tensors[sum(counts[:i]) : sum(counts[: i + 1])]) for i in range(3))
    return x, A, B, None if counts[3] is None else list(counts[3]), bias or None, base or None


class MultiCase(OpCase):
    def __call__(self, *args) -> Tensor:
        return torch.cat(self.overload(*pack(*args))[0], -1)


def multi_reference(*args) -> Tensor:
    return torch.cat(reference.lowrank_linear_multi(*pack(*args)), -1)


def multi_magnitude(x: Tensor, A: Tensor, counts: tuple, *tensors: Tensor) -> Tensor:
    alpha = counts[3] and [abs(a) for a in counts[3]]
    return multi_reference(x, A, (*counts[:3], alpha), *tensors)


def multi_cases() -> list[OpCase]:
    cases = []
    for name, (lead, m, shapes, bias, base, alpha, small) in MULTI.items():

        def make(inputs: Inputs, lead=lead, m=m, shapes=shapes, bias=bias, base=base, alpha=alpha) -> tuple:
            count = len(shapes)
            x, A = inputs.tensor(*lead, m), inputs.tensor(sum(r for _, r in shapes), m)
            tensors = [inputs.tensor(n, r) for n, r in shapes]
            tensors += [inputs.tensor(n) for n, _ in shapes if bias]
            tensors += [inputs.tensor(n, m) for n, _ in shapes if base]
            return x, A, (count, count * bias, count * base, alpha), *tensors

        tokens = int(torch.tensor(lead).prod())
        cases.append(
            MultiCase(
                op="lowrank_linear_multi",
                id=name,
                make=make,
                reference=multi_reference,
                magnitude=multi_magnitude,
                terms=len(shapes) * max(m, tokens, *(max(shape) for shape in shapes)),
                roundings=3 + len(shapes),  # z, the base's product; in backward the sum over the outputs
                small=small,
                dense=True,
                exact=bool(tokens and m) and m < 1000,
            )
        )
    return cases


def multi(**changes) -> Tensor:
    a = dict(x=torch.ones(3, 4), A=torch.ones(5, 4), B=[torch.ones(5, 2), torch.ones(6, 3)], alpha=None)
    a |= dict(bias=[torch.ones(5), torch.ones(6)], base=[torch.ones(5, 4), torch.ones(6, 4)])
    return ops.lowrank_linear_multi(*{**a, **changes}.values())


def multi_error(id: str, message: str, **changes) -> ErrorCase:
    return ErrorCase("lowrank_linear_multi", id, lambda: multi(**changes), message)


class TestLowrankLinearMulti(OpTests):
    cases = multi_cases()
    errors = [  # noqa: RUF012
        multi_error("x_columns", "x must be [tokens, 4], got [3, 5]", x=torch.ones(3, 5)),
        multi_error("x_int", "x must be float32, bfloat16, float16 or float64, got int64", x=torch.ones(3, 4).long()),
        multi_error("A_vector", "A must be [sum of ranks, m], got [4]", A=torch.ones(4)),
        multi_error("A_rows", "A must be [5, m], the sum of B's ranks, got [6, 4]", A=torch.ones(6, 4)),
        multi_error("no_B", "B must hold at least one tensor", B=[]),
        multi_error("B_vector", "B must be [n, rank] each, got [2]", B=[torch.ones(2), torch.ones(6, 3)]),
        multi_error("rank_0", "ranks must be at least 1", A=torch.ones(2, 4), B=[torch.ones(5, 2), torch.ones(6, 0)]),
        multi_error("B_dtype", "B must have x's dtype float32", B=[torch.ones(5, 2), torch.ones(6, 3).half()]),
        multi_error("alpha", "alpha must hold 2, one for each B, got 1", alpha=[1.0]),
        multi_error("bias_count", "bias must hold 2, one for each B, got 1", bias=[torch.ones(5)]),
        multi_error("bias_length", "bias must be [6], got [5]", bias=[torch.ones(5), torch.ones(5)]),
        multi_error("base_shape", "base must be [6, 4], got [5, 4]", base=[torch.ones(5, 4), torch.ones(5, 4)]),
    ]

    # the op itself takes lists

    def test_opcheck(self, case: OpCase, device: torch.device) -> None:
        args = with_grad(case.make(Inputs(torch.float32, device)))
        torch.library.opcheck(case.overload, pack(*args))

    def test_compile(self, case: OpCase, device: torch.device) -> None:
        args = with_grad(case.make(Inputs(torch.float32, device)))
        torch._dynamo.reset()
        compiled = torch.compile(lambda *a: case(*a) * 2, fullgraph=True, backend="aot_eager")
        assert_compiled_equals_eager(compiled, lambda *a: case(*a) * 2, args, str(case))

    def test_export(self, case: OpCase, device: torch.device) -> None:
        x, A, counts, *tensors = case.make(Inputs(torch.float32, device))

        class Module(torch.nn.Module):
            def forward(self, x: Tensor, A: Tensor, *given: Tensor) -> Tensor:
                return case(x, A, counts, *given)

        program = torch.export.export(Module(), (x, A, *tensors))
        assert case.overload in [node.target for node in program.graph.nodes]


def test_multi_gradients_of_some_outputs_and_inputs() -> None:
    """Outputs that nobody uses, and inputs that need no gradient, change nothing for the others."""
    inputs = Inputs(torch.float64)
    x, A = inputs.tensor(9, 7), inputs.tensor(5, 7).requires_grad_()
    B = [inputs.tensor(4, 2), inputs.tensor(6, 3).requires_grad_()]
    base = [inputs.tensor(4, 7).requires_grad_(), inputs.tensor(6, 7)]
    leaves = [A, B[1], base[0]]
    got = torch.autograd.grad(slkernels.lowrank_linear_multi(x, A, B, 0.5, None, base)[1].sum(), leaves)
    ys = reference.lowrank_linear_multi(x, A, B, (0.5, 0.5), None, base)
    want = torch.autograd.grad(ys[1].sum(), leaves, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(got, want)
    y = slkernels.lowrank_linear_multi(x, A.detach(), [b.detach() for b in B], 0.5, None, [b.detach() for b in base])
    assert not any(t.requires_grad for t in y)


def test_multi_backward_keeps_only_inputs_and_z() -> None:
    saved: list[Tensor] = []
    args = [torch.randn(s, requires_grad=True) for s in ((40, 16), (5, 16), (24, 3), (8, 2))]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        slkernels.lowrank_linear_multi(args[0], args[1], args[2:])
    extra = [t for t in saved if all(t.data_ptr() != a.data_ptr() for a in args)]
    assert [list(t.shape) for t in extra] == [[40, 5]]


def test_multi_is_each_layer_by_itself() -> None:
    inputs = Inputs(torch.float32)
    x, A, B = inputs.tensor(21, 16), inputs.tensor(5, 16), [inputs.tensor(7, 3), inputs.tensor(9, 2)]
    together = slkernels.lowrank_linear_multi(x, A, B, (0.5, 2.0))
    apart = [slkernels.lowrank_linear(x, a, b, s) for a, b, s in zip(A.split([3, 2]), B, (0.5, 2.0), strict=True)]
    torch.testing.assert_close(together, apart)
    torch.testing.assert_close(slkernels.lowrank_linear_multi(x, A, B, 2)[1], apart[1])


# ---- lowrank_swiglu --------------------------------------------------------------------------------------------------

# id: leading shape of x, n, m, rank of gate, rank of up, small
SWIGLU = {
    "small": ((3,), 5, 4, 2, 3, True),
    "vector": ((), 5, 4, 2, 2, True),
    "batched": ((2, 3), 4, 5, 1, 2, True),
    "no_tokens": ((0,), 5, 4, 2, 2, True),
    "no_features": ((3,), 5, 0, 2, 2, True),
    "no_outputs": ((3,), 0, 4, 2, 2, True),
    "primes": ((37,), 61, 53, 13, 17, False),
    "one_token": ((1,), 131, 257, 17, 17, False),
    "rows_5461": ((19,), 5461, 23, 11, 11, False),
    "many_tokens": ((1031,), 29, 31, 7, 5, False),
}


def swiglu_magnitude(x: Tensor, A: Tensor, B_gate: Tensor, B_up: Tensor, alpha: float = 1.0) -> Tensor:
    """On absolute values: g (1 + g) bounds silu, its slope, and what an error of g does to it (|silu''| <= 1/2)."""
    gate, up = reference.lowrank_linear_multi(x, A, (B_gate, B_up), (alpha, alpha))
    return gate * (1 + gate) * up


def swiglu_cases() -> list[OpCase]:
    cases = []
    for name, (lead, n, m, rank_gate, rank_up, small) in SWIGLU.items():

        def make(inputs: Inputs, lead=lead, n=n, m=m, rank_gate=rank_gate, rank_up=rank_up, name=name) -> tuple:
            A = inputs.tensor(rank_gate + rank_up, m, scale=max(m, 1) ** -0.5)
            args = (inputs.tensor(*lead, m), A, inputs.tensor(n, rank_gate), inputs.tensor(n, rank_up))
            return args if name == "small" else (*args, 0.5)

        tokens = int(torch.tensor(lead).prod())
        cases.append(
            OpCase(
                op="lowrank_swiglu",
                id=name,
                make=make,
                reference=reference.lowrank_swiglu,
                magnitude=swiglu_magnitude,
                terms=2 * max(n, m, rank_gate, rank_up, tokens),
                roundings=5,  # z, gate and up; their gradients, dz
                small=small,
                dense=True,
                exact=False,
            )
        )
    return cases


def swiglu(**changes) -> Tensor:
    a = dict(x=torch.ones(3, 4), A=torch.ones(5, 4), B_gate=torch.ones(6, 2), B_up=torch.ones(6, 3), alpha=1.0)
    return ops.lowrank_swiglu(*{**a, **changes}.values())


class TestLowrankSwiglu(OpTests):
    cases = swiglu_cases()
    errors = [  # noqa: RUF012
        ErrorCase("lowrank_swiglu", id, lambda changes=changes: swiglu(**changes), message)
        for id, message, changes in (
            ("x_columns", "x must be [tokens, 4], got [3, 5]", dict(x=torch.ones(3, 5))),
            ("A_rows", "A must be [5, m], the sum of B's ranks, got [4, 4]", dict(A=torch.ones(4, 4))),
            ("rows", "B_gate and B_up must have the same rows, got [6, 2] and [7, 3]", dict(B_up=torch.ones(7, 3))),
            ("dtype", "B must have x's dtype float32, got float16", dict(B_up=torch.ones(6, 3).half())),
        )
    ]


def test_swiglu_of_extreme_gates() -> None:
    """e^-gate overflows or vanishes; silu and its slope do not."""
    gate = torch.tensor([-1e30, -200.0, -100.0, -90.0, -88.0, 0.0, 20.0, 90.0, 200.0, 1e30])
    x = torch.eye(len(gate))  # a token for each gate, through a diagonal A
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        A = torch.cat([torch.diag(gate), torch.eye(len(gate))]).to(dtype).requires_grad_()
        B = torch.eye(len(gate), dtype=dtype)
        h = slkernels.lowrank_swiglu(x.to(dtype), A, B, B)
        want = torch.nn.functional.silu(gate.to(dtype).double()).diag()
        torch.testing.assert_close(h.double(), want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-30)
        (slope,) = torch.autograd.grad(h.sum(), A)
        assert slope.isfinite().all()


@pytest.mark.parametrize("needs", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)])
def test_swiglu_gradient_of_one_input(needs: tuple[int, ...]) -> None:
    tensors = [torch.randn(s, dtype=torch.float64) for s in ((7, 16), (5, 16), (24, 3), (24, 2))]
    leaf = tensors[needs.index(1)].requires_grad_()
    got = torch.autograd.grad(ops.lowrank_swiglu(*tensors, 0.5).sum(), leaf)
    want = torch.autograd.grad(reference.lowrank_swiglu(*tensors, 0.5).sum(), leaf)
    torch.testing.assert_close(got, want)


def test_wrapper_is_the_op() -> None:
    x, A, B_gate, B_up = torch.randn(3, 4), torch.randn(4, 4), torch.randn(5, 2), torch.randn(5, 2)
    got = slkernels.lowrank_swiglu(x, A, B_gate, B_up, alpha=0.5)
    assert_bitwise_equal(got, ops.lowrank_swiglu(x, A, B_gate, B_up, 0.5), "")
