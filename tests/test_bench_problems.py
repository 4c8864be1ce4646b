"""The problems of the benchmark's cases, small: every provider solves them, and every check notices a wrong result."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("rich")

from slkernels.bench import report, roofline, timing
from slkernels.bench.case import DENSE, OURS, Absent, Case
from slkernels.bench.cases import lowrank, optim, project, sl, sparse
from slkernels.bench.run import run_case

CPU = torch.device("cpu")
CEILINGS = roofline.Roofline(gbs=10.0, gflops={"float32": 100.0, "bfloat16": 200.0})
SHORT = timing.Plan(rounds=3, slice_seconds=0.0, warmup_seconds=0.0)

_F32, _BF16 = torch.float32, torch.bfloat16
_TINY = {
    "spmm": (sparse.spmm_problem(33, 96, 80, 0.1, _F32), DENSE),
    "spmm bf16": (sparse.spmm_problem(33, 96, 80, 0.1, _BF16), DENSE),
    "spmm_t": (sparse.spmm_t_problem(33, 96, 80, 0.1, _F32), DENSE),
    "sddmm": (sparse.sddmm_problem(33, 96, 80, 0.1, _F32), DENSE),
    "compose": (sparse.compose_problem(96, 80, 16, 0.1, _F32), sparse.SLTRAIN),
    "random_support": (sparse.random_support_problem(96, 80, 0.1), "torch.randperm"),
    "lowrank": (lowrank.forward_problem(33, 96, 80, 16, _F32, gated=True), DENSE),
    "lowrank bwd": (lowrank.forward_backward_problem(33, 96, 80, 16, _F32), DENSE),
    "sl": (sl.layer_problem(33, 96, 80, 16, 0.1, _F32, backward=True), DENSE),
    "sl bf16": (sl.layer_problem(33, 96, 80, 16, 0.1, _BF16, backward=True), DENSE),
    "decode": (sl.layer_problem(1, 96, 80, 16, 0.1, _F32, backward=False), DENSE),
    "project_back": (project.back_problem(96, 80, 16, _F32), DENSE),
    "paths": (sl.paths_problem(33, 96, 80, 16, 0.1, _F32, backward=True), DENSE),
}


def _by_provider(rows: list[report.Row]) -> dict[str, report.Row]:
    return {row.provider: row for row in rows}


@pytest.mark.parametrize("name", _TINY)
def test_every_problem_is_solved_by_every_provider(name):
    make, baseline = _TINY[name]
    case = Case("tiny", name, "tiny", _BF16 if "bf16" in name else _F32, make, baseline=baseline)
    rows = run_case(case, CPU, SHORT, CEILINGS)
    assert [(r.provider, r.message) for r in rows if r.failed] == []
    assert _by_provider(rows)[OURS].ratios[baseline].median > 0


@pytest.mark.parametrize("name", _TINY)
def test_every_problem_notices_a_wrong_result(name):
    make, _ = _TINY[name]

    def wrong(run):
        def negated():
            result = run()
            return (*result[:-1], -result[-1]) if isinstance(result, tuple) else -result  # the last of the gradients

        return negated

    def make_wrong(device, seed):
        problem = make(device, seed)
        return {k: p if isinstance(p, Absent) else dataclasses.replace(p, run=wrong(p.run)) for k, p in problem.items()}

    dtype = _BF16 if "bf16" in name else _F32
    rows = run_case(Case("tiny", name, "tiny", dtype, make_wrong), CPU, SHORT, CEILINGS)
    assert [row.provider for row in rows if row.status == "ok"] == []


_BOTH = {optim.BNB, optim.TORCHAO}


def _kind_problem(kind, peers):
    return optim.step_problem(3, 5120, _BF16, kind), next(iter(kind.peers)), peers


_TINY_OPTIM = {
    "step": (optim.step_problem(3, 5000, _F32), optim.FUSED, _BOTH),
    "step bf16": (optim.step_problem(3, 5000, _BF16), optim.FUSED, _BOTH),
    "step dyn8": _kind_problem(optim.adam_kind("dyn8"), _BOTH),
    "step lin8": _kind_problem(optim.adam_kind("lin8"), set()),
    "step cmp8": _kind_problem(optim.adam_kind("cmp8"), set()),
    "step dyn4": _kind_problem(optim.adam_kind("dyn4"), {optim.TORCHAO}),
    "step fp8": _kind_problem(optim.adam_kind("fp8"), {optim.TORCHAO}),
    "step lion": _kind_problem(optim.momentum_kind("lion"), {optim.BNB}),
    "step sgd": _kind_problem(optim.momentum_kind("sgd"), {optim.BNB}),
    "step nesterov": _kind_problem(optim.momentum_kind("nesterov"), set()),
    "step signum": _kind_problem(optim.momentum_kind("signum"), set()),
    "step ademamix": _kind_problem(optim.ademamix_kind(), {optim.BNB}),
    "direction": (optim.direction_problem(5000, _BF16), optim.TORCH, set()),
    "norm": (optim.norm_problem(3, 5000, _BF16), optim.TORCH, set()),
    "quantize": (optim.quantize_problem(4096, _F32), optim.BUCKETIZE, {optim.BNB}),
    "quantize bf16": (optim.quantize_problem(4096, _BF16), optim.BUCKETIZE, {optim.BNB}),
    "dequantize": (optim.dequantize_problem(4096, _F32), optim.LOOKUP, set()),
}


@pytest.mark.parametrize("name", _TINY_OPTIM)
@pytest.mark.parametrize("wrong", [False, True])
def test_optimizer_problems_and_their_checks(monkeypatch, name, wrong):
    monkeypatch.setattr(optim, "_installed", lambda package: False)
    make, baseline, absent = _TINY_OPTIM[name]

    def make_wrong(device, seed):
        def skip(provider):  # an optimizer that does nothing; codes or values of the opposite sign
            run = (lambda: None) if "step" in name else lambda: _negated(provider.run())
            return dataclasses.replace(provider, run=run)

        return {k: p if isinstance(p, Absent) else skip(p) for k, p in make(device, seed).items()}

    case = Case("tiny", name, "tiny", _F32, make_wrong if wrong else make, baseline=baseline)
    rows = _by_provider(run_case(case, CPU, SHORT, CEILINGS))
    peers = {peer for peer in (optim.BNB, optim.TORCHAO) if peer in rows}
    assert peers == absent
    assert all((rows[p].status, rows[p].message) == ("absent", "not installed") for p in peers)
    assert {row.status for name, row in rows.items() if name not in peers} == {"wrong" if wrong else "ok"}


def _negated(result):
    return tuple(255 - t if t.dtype == torch.uint8 else t for t in result) if isinstance(result, tuple) else -result
