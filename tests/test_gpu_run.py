"""The command that proves the kernels on a GPU (run_gpu.py), as far as a machine without one can tell."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import run_gpu
from run_gpu import ABSENT, FAILED, OK, Absent, Failed, Runner

JUNIT = """<testsuites><testsuite name="pytest">
<testcase classname="tests.test_a" name="test_one"/>
<testcase classname="tests.test_a" name="test_two"><skipped message="no CUDA kernel yet: slkernels::spmm"/></testcase>
<testcase classname="tests.test_a" name="test_three"><failure message="wrong"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def runner(tmp_path) -> Runner:
    (tmp_path / "out").mkdir()
    (tmp_path / "scratch").mkdir()
    return Runner(tmp_path / "out", tmp_path / "scratch", False, {})


def fake(runner, monkeypatch, **stages) -> list[str]:
    """Replace every stage: by nothing, or by what raises the given error. Returns the list of those that ran."""
    ran = []

    def stage(name):
        def work(_):
            ran.append(name)
            if name in stages:
                raise stages[name]
            return {}

        return work

    for name in ("probe", "wrappers", "tests", "bench"):
        monkeypatch.setattr(run_gpu, name, stage(name))
    monkeypatch.setattr(run_gpu, "sanitizer", stage)
    return ran


def statuses(runner) -> dict[str, str]:
    return {s["name"]: s["status"] for s in json.loads((runner.out / "run.json").read_text())["stages"]}


def test_all_stages_run_and_are_recorded(runner, monkeypatch):
    ran = fake(runner, monkeypatch)
    run_gpu.run_all(runner)
    assert set(statuses(runner)) == {"import", "wrappers", "tests", *run_gpu.TOOLS, "bench"}
    assert set(statuses(runner).values()) == {OK}
    assert ran[0] == "probe" and ran[-1] == "bench" and len(ran) == 8


@pytest.mark.parametrize("stage", ["wrappers", "tests", "racecheck"])
def test_nothing_is_timed_after_a_failure(runner, monkeypatch, stage):
    ran = fake(runner, monkeypatch, **{stage: Failed("wrong result")})
    stages = run_gpu.run_all(runner)
    assert "bench" not in ran
    assert statuses(runner)[stage] == FAILED and statuses(runner)["bench"] == FAILED
    assert stages[-1].message == f"not run: {stage} failed"


def test_a_missing_tool_is_recorded_and_does_not_stop_the_rest(runner, monkeypatch):
    ran = fake(runner, monkeypatch, wrappers=Absent("no nvcc"))
    run_gpu.run_all(runner)
    assert statuses(runner)["wrappers"] == ABSENT and "bench" in ran


def test_a_library_that_does_not_load_ends_the_run(runner, monkeypatch):
    ran = fake(runner, monkeypatch, probe=Failed("undefined symbol"))
    run_gpu.run_all(runner)
    assert ran == ["probe"] and statuses(runner) == {"import": FAILED}


def test_processes_are_logged_and_judged(runner):
    assert runner.process("good", [sys.executable, "-c", "print('fine')"], 30) == "fine\n"
    with pytest.raises(Failed, match=r"exit status 3: bad"):
        runner.process("bad", [sys.executable, "-c", "print('bad'); raise SystemExit(3)"], 30)
    with pytest.raises(Failed, match="took more than 1 s: started"):
        slow = "import time; print('started', flush=True); time.sleep(60)"
        runner.process("slow", [sys.executable, "-c", slow], 1)
    log = (runner.out / "run.log").read_text()
    assert "fine" in log and "bad" in log and "started" in log


def test_outcomes_are_counted(tmp_path):
    path = tmp_path / "report.xml"
    path.write_text(JUNIT)
    assert run_gpu.outcomes(path) == {
        "passed": 1,
        "skipped": 1,
        "failure": 1,
        "skip_reasons": {"no CUDA kernel yet: slkernels::spmm": 1},
        "failures": ["tests.test_a::test_three"],
    }


def test_tests_that_did_not_run_prove_nothing(runner, monkeypatch):
    def nothing(self, name, command, limit, **environment):
        (self.scratch / f"{name}.xml").write_text("<testsuites/>")
        return ""

    monkeypatch.setattr(Runner, "process", nothing)
    monkeypatch.setattr(run_gpu.shutil, "which", lambda name: name)
    for work in (run_gpu.tests, run_gpu.sanitizer("memcheck")):
        with pytest.raises(Failed, match="no test ran"):
            work(runner)


def test_sanitizers_fail_the_run_and_filter_kernels_except_for_initcheck(runner, monkeypatch):
    commands = {}

    def note(self, name, command, limit, **environment):
        commands[name] = command
        (self.scratch / f"{name}.xml").write_text(JUNIT)
        assert environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return ""

    monkeypatch.setattr(Runner, "process", note)
    monkeypatch.setattr(run_gpu.shutil, "which", lambda name: name)
    for tool in run_gpu.TOOLS:
        run_gpu.sanitizer(tool)(runner)
        command = commands[tool]
        assert command[:5] == ["compute-sanitizer", "--tool", tool, "--error-exitcode", "86"]
        assert ("kns=3slk" in command) == (tool != "initcheck") and "cuda and sanitize" in command


def test_limits_fit_the_promise():
    """Compilations and sanitizers run side by side."""
    assert sum(run_gpu.LIMITS.values()) <= 9 * 60


def test_another_slkernels_in_place_of_the_wheel_is_noticed(runner, monkeypatch, tmp_path):
    text = json.dumps({"slkernels": {"cuda": True}, "file": "/elsewhere/slkernels/__init__.py", "gpu": "x"})
    monkeypatch.setattr(Runner, "process", lambda *a, **k: text)
    runner.site = tmp_path / "site"
    with pytest.raises(Failed, match="was imported in place of the wheel"):
        run_gpu.probe(runner)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_rehearsal(tmp_path):
    pytest.importorskip("rich")
    assert run_gpu.main(["--out", str(tmp_path), "--rehearse"]) == 0
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["rehearsal"] is True
    assert {s["name"]: s["status"] for s in record["stages"]}["tests"] == OK
    assert json.loads((tmp_path / "bench.json").read_text())["rows"]
