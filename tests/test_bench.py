"""The benchmark program: its timing logic on a fake clock, checks, JSON, comparison, plots and command line."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from slkernels.bench import __main__ as program
from slkernels.bench import case as bench_case
from slkernels.bench import compare, environment, paths, plots, report, roofline, tables, timing
from slkernels.bench.case import DENSE, OURS, Absent, Case, Provider, Target, compare_with, relative_error
from slkernels.bench.cases import all_cases, families, sl, sparse
from slkernels.bench.run import run_case

CPU = torch.device("cpu")
CEILINGS = roofline.Roofline(gbs=10.0, gflops={"float32": 100.0, "bfloat16": 200.0})
SHORT = timing.Plan(rounds=3, slice_seconds=0.0, warmup_seconds=0.0)


class FakeClock:
    """A clock that only the work moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float):
        def run():
            self.now += seconds

        return run


# ---- timing ---------------------------------------------------------------------------------------------------------


def test_every_provider_gets_the_same_slice_in_every_round():
    clock = FakeClock()
    plan = timing.Plan(rounds=5, slice_seconds=1.0, warmup_seconds=0.0, case_seconds=1e9)
    runs = {"fast": [clock.work(0.125)], "slow": [clock.work(4.0)]}
    found = timing.interleave(runs, plan, timing.CpuTimer(clock), clock)
    assert [len(r) for r in found["fast"].rounds] == [8] * 5
    assert [len(r) for r in found["slow"].rounds] == [1] * 5
    assert found["fast"].median == 0.125 and found["slow"].median == 4.0
    assert timing.speedup(found["fast"], found["slow"]) == (32.0, 32.0, 32.0)


def test_warmup_calls_every_set_and_is_not_counted():
    clock, calls = FakeClock(), []
    sets = [lambda i=i: (calls.append(i), clock.work(100.0 if len(calls) <= 5 else 1.0)()) for i in range(4)]
    plan = timing.Plan(rounds=2, slice_seconds=0.0, warmup_seconds=0.0, case_seconds=1e9)
    found = timing.interleave({"a": sets}, plan, timing.CpuTimer(clock), clock)
    assert set(calls[:4]) == {0, 1, 2, 3}
    assert found["a"].samples == [1.0, 1.0]


def test_no_two_successive_calls_share_buffers():
    clock, used = FakeClock(), []

    def sets():
        return [lambda i=i: (used.append(i), clock.work(0.3)()) for i in range(3)]

    plan = timing.Plan(rounds=6, slice_seconds=1.0, warmup_seconds=0.0)
    timing.interleave({"a": sets(), "b": sets()}, plan, timing.CpuTimer(clock), clock)
    assert len(used) > 40 and all(a != b for a, b in itertools.pairwise(used))


def test_a_slow_case_stops_after_its_time_but_not_before_the_least_rounds():
    clock = FakeClock()
    plan = timing.Plan(rounds=50, least_rounds=3, slice_seconds=0.0, case_seconds=25.0, warmup_seconds=0.0)
    found = timing.interleave({"a": [clock.work(10.0)]}, plan, timing.CpuTimer(clock), clock)
    assert len(found["a"].rounds) == 3
    found = timing.interleave({"a": [clock.work(2.0)]}, plan, timing.CpuTimer(clock), clock)
    assert 3 < len(found["a"].rounds) < 50


def test_ratios_survive_a_machine_that_becomes_slower():
    ours = timing.Timings([[1.0, 1.0], [1.0], [3.0], [3.0, 3.0]])
    other = timing.Timings([[2.0], [2.0, 2.0], [6.0], [6.0]])
    assert timing.speedup(ours, other) == (2.0, 2.0, 2.0)
    assert ours.median == 2.0  # the times themselves do not survive it


@pytest.mark.parametrize(("q", "expected"), [(0.0, 1.0), (0.2, 1.8), (0.5, 3.0), (0.8, 4.2), (1.0, 5.0)])
def test_quantiles_interpolate(q, expected):
    assert timing.quantile([5.0, 1.0, 4.0, 2.0, 3.0], q) == pytest.approx(expected)


def test_copies_are_twice_the_cache_and_bounded():
    mib = 2**20
    assert timing.copies_beyond_cache(8 * mib, 32 * mib) == 8
    assert timing.copies_beyond_cache(9 * mib, 32 * mib) == 8
    assert timing.copies_beyond_cache(100 * mib, 32 * mib) == 1
    assert timing.copies_beyond_cache(1, 32 * mib) == 16


# ---- checks ---------------------------------------------------------------------------------------------------------


def test_one_wrong_element_in_a_million_is_an_error():
    expected = torch.randn(1000, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert relative_error(expected.float(), expected, torch.float32) < 0.1
    assert relative_error(expected.bfloat16(), expected, torch.bfloat16) < 1
    wrong = expected.bfloat16()
    wrong[-1, -1] += 1.0
    assert relative_error(wrong, expected, torch.bfloat16) > 1


def test_nan_and_shape_are_not_overlooked():
    expected = torch.ones(4, dtype=torch.float64)
    good, bad = torch.ones(4), torch.tensor([1.0, 1.0, math.nan, 1.0])
    assert math.isnan(compare_with(lambda: (expected, expected), torch.float32)((good, bad)))
    with pytest.raises(ValueError, match=r"must be \[4\], got \[1\]"):
        relative_error(torch.ones(1), expected, torch.float32)


def _toy(**providers) -> Case:
    """y = 2 x with a right baseline and the given other providers."""
    x = torch.arange(8.0)
    error = compare_with(lambda: (2 * x.double(),), torch.float32)

    def make(device, seed):
        wrap = {name: Provider(run, error, 8.0, 64.0) if callable(run) else run for name, run in providers.items()}
        return {DENSE: Provider(lambda: x + x, error, 8.0, 64.0), **wrap}

    goals = (Target(DENSE, 1e-9), Target("peer", 2.0))
    return Case("toy", "double", "8", torch.float32, make, targets=goals, quick=True)


def _by_provider(rows: list[report.Row]) -> dict[str, report.Row]:
    return {row.provider: row for row in rows}


def test_wrong_raising_and_absent_providers_are_told_apart_and_not_timed():
    x = torch.arange(8.0)

    def broken():
        raise RuntimeError("no such kernel\nand a long tail")

    case = _toy(**{OURS: lambda: 2 * x, "wrong": lambda: 2.001 * x, "broken": broken, "peer": Absent("not installed")})
    rows = _by_provider(run_case(case, CPU, SHORT, CEILINGS))
    assert {name: row.status for name, row in rows.items()} == {
        DENSE: "ok",
        OURS: "ok",
        "wrong": "wrong",
        "broken": "error",
        "peer": "absent",
    }
    assert rows["wrong"].median_ms is None and rows["wrong"].error > 1
    assert rows["wrong"].message.endswith("times what is allowed")
    assert rows["broken"].message == "RuntimeError: no such kernel"
    assert [row.failed for row in rows.values()] == [False, False, True, True, False]
    assert set(rows[OURS].ratios) == {DENSE}
    reached = {goal.against: (goal.reached is not None, goal.met) for goal in rows[OURS].goals}
    assert reached == {DENSE: (True, True), "peer": (False, False)}


def test_a_case_that_cannot_be_made_is_an_error_of_ours():
    def make(device, seed):
        raise AttributeError("module 'slkernels' has no attribute 'spmmm'")

    (row,) = run_case(Case("toy", "x", "1", torch.float32, make), CPU, SHORT, CEILINGS)
    assert row.failed and row.provider == OURS and "spmmm" in row.message


def test_roofline_is_the_lower_of_both_ceilings():
    assert CEILINGS.least_seconds(1e11, 1.0, "float32") == pytest.approx(1.0)
    assert CEILINGS.least_seconds(1e11, 1e11, "bfloat16") == pytest.approx(10.0)
    assert CEILINGS.bound(1e11, 1.0, "float32") == "compute" and CEILINGS.bound(0.0, 1.0, "float32") == "memory"
    raised = roofline.Roofline(gbs=12.0, gflops={"float32": 90.0})
    raised.raise_to(CEILINGS)
    assert raised == roofline.Roofline(gbs=12.0, gflops={"float32": 100.0, "bfloat16": 200.0})
    timer = timing.CpuTimer()
    assert roofline.gemm_gflops(CPU, torch.float32, timer, 32, 0.0) > 0
    assert roofline.memory_gbs(CPU, timer, 1, 0.0) > 0


# ---- results as data ------------------------------------------------------------------------------------------------


def _row(provider: str, ms: float | None, baseline_ms: float = 10.0, **fields) -> report.Row:
    row = report.Row("toy", "double", "T=8", "float32", provider, "ok" if ms else "absent", DENSE, **fields)
    if ms:
        row.median_ms, row.p20_ms, row.p80_ms, row.samples = ms, 0.99 * ms, 1.01 * ms, 9
        row.gflops, row.gbs, row.roofline_percent, row.bound = 1.0, 2.0, 50.0, "memory"
        if provider != DENSE:
            row.ratios[DENSE] = report.Ratio(baseline_ms / ms, baseline_ms / ms * 0.98, baseline_ms / ms * 1.02)
    return row


def _report(*rows: report.Row) -> report.Report:
    return report.Report(environment.gather(CPU), dataclasses.asdict(CEILINGS), {"quick": True}, list(rows))


def _full_report() -> report.Report:
    ours = _row(OURS, 2.0)
    ours.goals = [report.Goal(DENSE, 6.0, 5.0, False), report.Goal("torchao", 2.0, None, False)]
    return _report(ours, _row(DENSE, 10.0), _row("torchao", None, message="not installed"))


def test_json_round_trip(tmp_path):
    before = _full_report()
    report.save(before, tmp_path / "deep" / "bench.json")
    after = report.load(tmp_path / "deep" / "bench.json")
    assert after == before
    assert after.rows[0].ratios[DENSE].median == 5.0 and after.rows[0].goals[1].reached is None


@pytest.mark.parametrize("text", ['{"schema": 99, "rows": []}', "[]", "{}"])
def test_other_files_are_refused(text):
    with pytest.raises(ValueError, match="a benchmark file of schema 1 is needed"):
        report.Report.from_json(text)


def test_table_names_absent_providers_missed_goals_and_failures(capsys):
    full = _full_report()
    full.rows.append(_row("broken", None))
    full.rows[-1].status, full.rows[-1].message = "error", "RuntimeError: [boom]"
    tables.print_report(full)
    text = capsys.readouterr().out
    for expected in ("5x (4.9..5.1)", "6x ✗", "2x not measured", "absent: torchao (float32): not installed"):
        assert expected in text
    assert "goals: 0 of 2 reached" in text
    assert "✗ toy double T=8 float32 broken: RuntimeError: [boom]" in text


def test_narrow_terminals_lose_columns_not_text():
    from rich.console import Console

    rows = _full_report().rows
    for width, gone in ((200, ()), (88, ("% roof", "vs baseline"))):
        out = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        out.print(tables.family_table(rows, width))
        text = out.export_text()
        assert all(name not in text for name in gone) and "slkernels is .. faster" in text and "…" not in text


# ---- comparison -----------------------------------------------------------------------------------------------------


def _verdicts(old: report.Report, new: report.Report) -> dict[str, str]:
    return {c.key[4]: c.verdict for c in compare.compare(old, new)}


def test_compare_judges_by_noise_and_never_fails_one_sided_rows():
    failed = _row("broken", None)
    failed.status = "wrong"
    old = [_row("same", 10.0), _row("slower", 10.0), _row("faster", 10.0), _row("gone", 1.0), _row("broken", 1.0)]
    new = [_row("same", 10.4), _row("slower", 12.0), _row("faster", 8.0), _row("added", 1.0), failed]
    assert _verdicts(_report(*old), _report(*new)) == {
        "same": "same",
        "slower": "slower",
        "faster": "faster",
        "gone": "only old",
        "broken": "broken",
        "added": "only new",
    }
    noisy = _row("slower", 12.0)
    noisy.p20_ms, noisy.p80_ms = 9.0, 15.0
    assert _verdicts(_report(old[1]), _report(noisy)) == {"slower": "same"}


@pytest.mark.parametrize(("ms", "status"), [(2.0, 0), (3.0, 1), (1.0, 0)])
def test_compare_exit_status(tmp_path, capsys, ms, status):
    for name, time in (("old", 2.0), ("new", ms)):
        report.save(_report(_row(OURS, time), _row(DENSE, 10.0)), tmp_path / f"{name}.json")
    argv = [str(tmp_path / "old.json"), str(tmp_path / "new.json")]
    assert compare.main(argv) == 0
    assert compare.main([*argv, "--fail-on-slower"]) == status
    assert "toy double" in capsys.readouterr().out


def test_compare_names_what_differs_in_the_set_up():
    old, new = _report(), _report()
    new.environment = {**old.environment, "threads": 77}
    assert compare.differences(old, new) == [f"threads: {old.environment['threads']} against 77"]


# ---- plots and the table of paths -----------------------------------------------------------------------------------


def _sweep_rows(tokens: int, chain: float, compose: float, picked: str) -> list[report.Row]:
    parameters = {"T": tokens, "n": 64, "m": 64, "r": 8, "density": 0.03, "mode": "fwd"}
    rows = []
    for name, ms in ((OURS, chain), ("chain", chain), ("compose", compose), (DENSE, 10.0)):
        row = _row(name, ms, parameters=dict(parameters), note=picked if name == OURS else "")
        row.shape, row.family, row.case = f"T={tokens}", "sl", "path fwd"
        rows.append(row)
    rows[1].ratios["compose"] = report.Ratio(compose / chain, compose / chain * 0.98, compose / chain * 1.02)
    return rows


def test_plots_are_drawn_from_json_only(tmp_path):
    full = _full_report()
    full.rows += _sweep_rows(1, 1.0, 5.0, "chain") + _sweep_rows(64, 6.0, 3.0, "compose")
    report.save(full, tmp_path / "bench.json")
    written = plots.draw(report.load(tmp_path / "bench.json"), tmp_path / "plots")
    assert [p.name for p in written] == ["ratio_toy.png", "overview.png", "paths.png"]
    for path in written:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG\r\n") and len(data) > 5000


def test_plots_of_a_report_without_times_are_none(tmp_path):
    assert plots.draw(_report(_row("torchao", None, message="not installed")), tmp_path) == []


def test_paths_table_says_whether_auto_was_right():
    swept = [
        *_sweep_rows(1, 1.0, 5.0, "chain"),
        *_sweep_rows(8, 1.0, 1.02, "compose"),
        *_sweep_rows(64, 6.0, 3.0, "chain"),
        *_sweep_rows(512, 6.0, 3.0, "undecided"),
    ]
    text = paths.markdown(_report(*swept))
    assert "| 64→64 | 8 | 3% | fwd | 1 | 1 | 5 | 10 | chain | chain | ✓ |" in text
    assert "| 8 | 1 | 1.02 | 10 | chain | compose | ✓ (tie) |" in text
    assert "| 64 | 6 | 3 | 10 | compose | chain | ✗ 2.00x slower |" in text
    assert "in 2 of 4 rows" in text


def test_paths_tells_which_path_auto_took():
    make = sl.paths_problem(512, 96, 80, 16, 0.1, torch.float32, backward=False)
    providers = make(CPU, 0)
    for path in ("chain", "compose"):
        assert providers[OURS].note(providers[path].run()) == path
    assert providers[OURS].note(torch.zeros(512, 96)) == "undecided"
    assert providers[OURS].note(providers[OURS].run()) in ("chain", "compose")


# ---- command line ---------------------------------------------------------------------------------------------------


def test_list_names_every_family(capsys):
    listed = set()
    for device in ("cpu", "cuda"):
        assert program.main(["--list", "--device", device]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == len(set(lines)) == sum(device in case.devices for case in all_cases())
        listed.update(lines)
    named = {line.split()[0] for line in listed}
    expected = {"attention", "block8", "galore", "gemm", "lowrank", "model", "optim", "project", "sl", "sparse"}
    expected |= {"semi24", "semi24_gpu", "semi24_linear", "semi24_mask"}
    assert named == set(families()) == expected


def test_cases_of_the_other_device_are_not_selected():
    args = program.parser().parse_args(["--family", "gemm"])
    assert program.select(all_cases(), args) == []
    args.device = "cuda"
    assert program.select(all_cases(), args)


def test_an_op_without_a_kernel_on_the_device_is_absent():
    def make(device, seed):
        def missing():
            raise NotImplementedError(
                "Could not run 'slkernels::spmm' with arguments from the 'CUDA' backend. This could be because ..."
            )

        work = (1.0, 1.0)
        return {OURS: Provider(missing, lambda _: 0.0, *work), DENSE: Provider(lambda: 1, lambda _: 0.0, *work)}

    rows = {r.provider: r for r in run_case(Case("toy", "x", "1", torch.float32, make), CPU, SHORT, CEILINGS)}
    assert rows[OURS].status == "absent" and rows[OURS].message == "no CUDA kernel yet: slkernels::spmm"
    assert rows[DENSE].status == "ok"


def test_quick_covers_every_family_of_ops_and_no_sweep():
    quick = [c for c in all_cases() if c.quick]
    assert {c.family for c in quick} == set(families()) - {"model"}  # whole training steps take too long
    assert not any(c.parameters for c in quick)


def test_the_goals_stand_at_their_cases():
    found = {(c.name, c.shape, t.against): t.at_least for c in all_cases() for t in c.targets if c.quick}
    assert found["spmm", "T=2048 1024→2736 3%", DENSE] == 6 and found["spmm", "T=2048 1024→1024 3%", sparse.CSR] == 8
    assert found["sddmm", "T=2048 1024→1024 3%", DENSE] == 5
    assert found["sl_linear fwd+bwd", "T=4096 1024→1024 r=256 3%", DENSE] == 1.3
    assert found["sl_linear fwd+bwd", "T=4096 1024→2736 r=256 3%", sl.SLTRAIN] == 1.6
    assert all(found["sl_linear decode", f"T={t} 4096→4096 r=1024 5%", DENSE] == 1.5 for t in (1, 8))
    assert found["AdamW8bit step", "1 x 16777216", "bitsandbytes"] == 20
    assert found["AdamW8bit step", "256 x 8192", "torch fused"] == 1


@pytest.fixture
def tiny_program(monkeypatch):
    """The command line with tiny cases and ceilings that need no measurement."""
    problem = sparse.spmm_problem(33, 96, 80, 0.1, torch.float32)
    good = Case("sparse", "spmm", "tiny", torch.float32, problem, targets=(Target(DENSE, 1e9),), quick=True)
    absent = _toy(peer=Absent("not installed"), **{OURS: lambda: 2 * torch.arange(8.0)})
    cases = [good, absent]
    monkeypatch.setattr(program, "all_cases", lambda: cases)
    monkeypatch.setattr(program.roofline, "measure", lambda device, dtypes, quick: CEILINGS)
    monkeypatch.setattr(program, "QUICK", SHORT)
    return cases


def test_end_to_end(tiny_program, tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert program.main(["--quick", "--json", str(path), "--plot", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "torch.sparse_csr" in text and "absent: peer (float32): not installed" in text and "goals: 1 of 3" in text
    assert {row.provider for row in report.load(path).rows} == {OURS, DENSE, "torch.sparse_csr", "peer"}
    assert (tmp_path / "ratio_sparse.png").exists() and (tmp_path / "overview.png").exists()
    assert program.main(["--show", str(path)]) == 0
    assert "goals: 1 of 3" in capsys.readouterr().out


def test_end_to_end_fails_when_a_provider_is_wrong(tiny_program, tmp_path, capsys):
    tiny_program.append(_toy(wrong=lambda: 3 * torch.arange(8.0)))
    assert program.main(["--quick", "--json", str(tmp_path / "bench.json")]) == 1
    assert "✗ toy double 8 float32 wrong: error is" in capsys.readouterr().out


def test_an_interrupted_run_keeps_its_rows(tiny_program, tmp_path, monkeypatch):
    ran = []

    def run_one(case, *rest):
        if ran:
            raise KeyboardInterrupt
        ran.append(case)
        return run_case(case, *rest)

    monkeypatch.setattr(program, "run_case", run_one)
    path = tmp_path / "bench.json"
    assert program.main(["--quick", "--json", str(path)]) == 130
    kept = report.load(path)
    assert {row.family for row in kept.rows} == {"sparse"} and kept.settings["interrupted"]


def test_case_and_family_select(tiny_program, capsys):
    assert program.main(["--list", "--case", "spmm tiny"]) == 0
    assert capsys.readouterr().out.splitlines() == ["sparse spmm tiny float32"]
    assert program.main(["--case", "no such case"]) == 2
    assert "--list" in capsys.readouterr().err


def test_cuda_without_a_gpu_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.main(["--quick", "--device", "cuda"]) == 2
    assert "--device cuda needs a CUDA build of torch and a visible GPU" in capsys.readouterr().err


@pytest.mark.parametrize(("package", "argv"), [("rich", ["--list"]), ("matplotlib", ["--list", "--plot", "x"])])
def test_missing_extras_say_what_to_install(monkeypatch, capsys, package, argv):
    monkeypatch.setitem(sys.modules, package, None)
    assert program.main(argv) == 2
    message = capsys.readouterr().err
    assert package in message and "pip install 'slkernels[bench]'" in message


def test_results_of_a_checkout_go_to_bench_out_and_of_a_wheel_to_the_current_folder(monkeypatch, tmp_path):
    assert program.default_folder().parts[-2:] == ("bench", "out")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, "__file__", str(tmp_path / "site-packages" / "slkernels" / "bench" / "__main__.py"))
    assert program.default_folder() == tmp_path / "slkernels-bench"


def test_environment_names_the_machine():
    header = environment.gather(CPU)
    assert header["cores"] >= 1 and header["torch"] == torch.__version__
    assert header["threads"] == torch.get_num_threads()
    assert set(header["peers"]) == {"bitsandbytes", "torchao"} and environment.largest_cache() >= 2**18
    assert environment.version("no-such-package") is None


def test_bench_case_labels_are_unique():
    labels = [c.label for c in all_cases()]
    assert len(labels) == len(set(labels))
    assert bench_case.OURS == "slkernels"
