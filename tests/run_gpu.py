"""The one command that proves every CUDA kernel on a GPU, and then times it. docs/gpu.md says how to call it.

    python tests/run_gpu.py --out OUT [--wheel dist/slkernels-*.whl] [--rehearse]

Stages, each a process of its own with a limit of time, so that one that hangs cannot take the others with it:

    import      the wheel loads in this torch; what torch, GPU and build it is
    wrappers    nvcc compiles the PTX wrappers' tests for sm_90a, the GPU runs them, and records what it does
    tests       pytest -m cuda
    memcheck, racecheck, initcheck, synccheck
                compute-sanitizer over the tests marked `sanitize`, the four tools at once
    bench       python -m slkernels.bench --quick --device cuda; not run when a stage before it failed

OUT holds run.json (what became of each stage: ok, failed, or absent with the reason; seconds; figures; rewritten after
every stage), run.log (all output), bench.json and recordings.tar.gz. Exit status: 0 when every stage is ok.

--rehearse runs the same stages on a machine without a GPU: a few CPU tests in place of the CUDA ones, the benchmark on
the CPU, and only the compilation of the wrappers. It proves this script, not the kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SIMT = ROOT / "tests" / "simt"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
OK, FAILED, ABSENT = "ok", "failed", "absent"

# Seconds, imports of torch included. `wrappers` counts three times: little more than nine minutes at worst. How long a
# run takes on an H100 has not been measured yet.
LIMITS = {"import": 45, "compile": 75, "wrappers": 10, "tests": 140, "sanitizers": 110, "bench": 150}

PROBE = """
import json, slkernels, torch
found = {"slkernels": slkernels.build_info(), "file": slkernels.__file__, "torch": torch.__version__,
         "torch_cuda": torch.version.cuda}
if torch.cuda.is_available():
    a, b = (torch.randn(64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    c = torch.ops.slkernels.gemm(a, b)  # finds the current stream through the weak symbol
    torch.testing.assert_close(c.float(), a.float() @ b.float().t(), rtol=2e-2, atol=2e-1)
    found["gpu"] = torch.cuda.get_device_name()
print(json.dumps(found))
"""


@dataclass
class Stage:
    """What became of one stage."""

    name: str
    status: str = OK
    seconds: float = 0.0
    message: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


class Absent(Exception):
    """The machine lacks what the stage needs."""


class Failed(Exception):
    """The stage ran and found something wrong."""


@dataclass
class Runner:
    """Where results go, and the environment in which the stages' processes run."""

    out: Path
    scratch: Path
    rehearse: bool
    environment: dict[str, str]
    site: Path | None = None  # where the wheel was installed
    lock: threading.Lock = field(default_factory=threading.Lock)

    def process(self, name: str, command: list[str], limit: float, **environment: str) -> str:
        """Run to the end and return the output, which goes to OUT/run.log too. Raises Failed with its last lines if it
        does not end within limit seconds with status 0."""
        log, code = self.scratch / f"{name}.log", None
        with log.open("w") as file, contextlib.suppress(subprocess.TimeoutExpired):
            code = subprocess.run(
                command,
                cwd=self.scratch,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**self.environment, **environment},
                timeout=limit,
            ).returncode
        text = log.read_text(errors="replace")
        with self.lock, (self.out / "run.log").open("a") as file:
            file.write(f"\n==== {name}: {' '.join(command)}\n{text}")
        if code != 0:
            what = f"took more than {limit:.0f} s" if code is None else f"exit status {code}"
            raise Failed(f"{what}: " + " | ".join(text.strip().splitlines()[-3:])[-600:])
        return text

    def run(self, name: str, work: Callable[[Runner], dict[str, Any]]) -> Stage:
        stage, start = Stage(name), time.monotonic()
        try:
            stage.figures = work(self)
        except Absent as error:
            stage.status, stage.message = ABSENT, str(error)
        except Failed as error:
            stage.status, stage.message = FAILED, str(error)
        stage.seconds = round(time.monotonic() - start, 1)
        print(f"{stage.name:<10} {stage.status:<7} {stage.seconds:6.1f} s  {stage.message}", flush=True)
        return stage


# ---- stages ---------------------------------------------------------------------------------------------------------


def probe(runner: Runner) -> dict[str, Any]:
    text = runner.process("import", [sys.executable, "-c", PROBE], LIMITS["import"])
    found = json.loads(text.strip().splitlines()[-1])
    if runner.site and runner.site not in Path(found["file"]).parents:
        raise Failed(f"{found['file']} was imported in place of the wheel")
    if not found["slkernels"]["cuda"]:
        raise (Absent if runner.rehearse else Failed)("this slkernels was built without CUDA kernels")
    if "gpu" not in found and not runner.rehearse:
        raise Failed("torch sees no GPU")
    return found


def wrappers(runner: Runner) -> dict[str, Any]:
    """Before anything is believed of the harness on the CPU: the hardware's own answers."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise Absent("no nvcc")
    arch = ["-gencode=arch=compute_90a,code=sm_90a"]
    flags = ["-std=c++17", "-O1", "--expt-relaxed-constexpr", f"-I{ROOT / 'include'}", f"-I{SIMT}"]
    programs = ("ptx_sm90", "conformance")

    def compile_one(name: str) -> None:
        command = [nvcc, *flags, *arch, str(SIMT / f"{name}.cu"), "-o", str(runner.scratch / name)]
        runner.process(f"compile-{name}", command, LIMITS["compile"])

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, programs))
    if runner.rehearse:
        return {"compiled": list(programs)}
    runner.process("ptx_sm90", [str(runner.scratch / "ptx_sm90")], LIMITS["wrappers"])
    recordings = runner.scratch / "recordings"
    recordings.mkdir()
    for command in ("record", "compare"):  # the second: the same bits when the hardware is asked again
        runner.process(
            "conformance", [str(runner.scratch / "conformance"), command, str(recordings)], LIMITS["wrappers"]
        )
    with tarfile.open(runner.out / "recordings.tar.gz", "w:gz") as archive:
        archive.add(recordings, "recordings")
    return {"recorded": len(list(recordings.glob("*.bin")))}


def selection(runner: Runner, reduced: bool) -> list[str]:
    """pytest's arguments. Rehearsing, a few tests that need no GPU stand in for those that do."""
    if runner.rehearse:
        return ["-k", "cpu", str(ROOT / "tests" / "test_gemm.py")]
    return ["-m", "cuda and sanitize" if reduced else "cuda", str(ROOT / "tests")]


def pytest_command(runner: Runner, name: str, reduced: bool) -> list[str]:
    report = runner.scratch / f"{name}.xml"
    config = ["-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml")]
    return [sys.executable, "-m", "pytest", *config, f"--junitxml={report}", *selection(runner, reduced)]


def outcomes(report: Path) -> dict[str, Any]:
    """Counts of a junit report, and the reasons of what was skipped."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    failures = []
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        kind = kinds[0] if kinds else "passed"
        counts[kind] += 1
        if kind == "skipped":
            reasons[case.find("skipped").get("message", "")] += 1
        elif kind != "passed":
            failures.append(f"{case.get('classname')}::{case.get('name')}")
    return {**counts, "skip_reasons": dict(reasons), "failures": failures[:50]}


def tests(runner: Runner) -> dict[str, Any]:
    report = runner.scratch / "tests.xml"
    try:
        runner.process("tests", pytest_command(runner, "tests", reduced=False), LIMITS["tests"])
    except Failed as error:
        if report.exists():
            found = outcomes(report)
            raise Failed(f"{error}; {found}") from None
        raise
    found = outcomes(report)
    if not found.get("passed"):
        raise Failed(f"no test ran: {found}")
    return found


def sanitizer(tool: str) -> Callable[[Runner], dict[str, Any]]:
    def work(runner: Runner) -> dict[str, Any]:
        program = shutil.which("compute-sanitizer")
        if program is None and not runner.rehearse:
            raise Absent("no compute-sanitizer")
        options = ["--tool", tool, "--error-exitcode", "86", "--report-api-errors", "no"]
        # initcheck must see who writes: torch's kernels and copies too. The other tools look at ours only.
        options += [] if tool == "initcheck" else ["--kernel-name", "kns=3slk"]
        prefix = [] if program is None else [program, *options]
        runner.process(
            tool,
            [*prefix, *pytest_command(runner, tool, reduced=True)],
            LIMITS["sanitizers"],
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",  # every tensor an allocation of its own, so that its ends are seen
        )
        found = outcomes(runner.scratch / f"{tool}.xml")
        if not found.get("passed"):
            raise Failed(f"no test ran: {found}")
        if program is None:
            raise Absent("no compute-sanitizer; the tests alone passed")
        return found

    return work


def bench(runner: Runner) -> dict[str, Any]:
    path = runner.out / "bench.json"
    command = [sys.executable, "-m", "slkernels.bench", "--json", str(path)]
    if runner.rehearse:
        command += ["--case", "random_support 1024"]
    else:
        command += ["--quick", "--device", "cuda"]
    runner.process("bench", command, LIMITS["bench"])
    rows = json.loads(path.read_text())["rows"]
    return dict(Counter(row["status"] for row in rows))


# ---- the run --------------------------------------------------------------------------------------------------------


def save(out: Path, stages: list[Stage], rehearse: bool) -> None:
    record = {"rehearsal": rehearse, "stages": [asdict(stage) for stage in stages]}
    (out / "run.json").write_text(json.dumps(record, indent=1) + "\n")


def run_all(runner: Runner) -> list[Stage]:
    stages: list[Stage] = []

    def done(*more: Stage) -> None:
        stages.extend(more)
        save(runner.out, stages, runner.rehearse)

    done(runner.run("import", probe))
    if stages[0].status == FAILED:
        return stages
    done(runner.run("wrappers", wrappers))
    done(runner.run("tests", tests))
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        done(*pool.map(lambda tool: runner.run(tool, sanitizer(tool)), TOOLS))
    failed = [stage.name for stage in stages if stage.status == FAILED]
    if failed:
        done(Stage("bench", FAILED, message=f"not run: {', '.join(failed)} failed"))
    else:
        done(runner.run("bench", bench))
    return stages


def install(wheel: Path, site: Path) -> None:
    """The wheel alone, into a folder of its own: the machine's torch stays."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="where run.json, bench.json and the logs go")
    parser.add_argument("--wheel", type=Path, help="installed into a temporary folder; default: slkernels as installed")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: proves this script, not the kernels")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "run.log").write_text("")
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        site = Path(scratch) / "site" if args.wheel else None
        if site:
            install(args.wheel.resolve(), site)
            environment["PYTHONPATH"] = str(site)
        stages = run_all(Runner(args.out.resolve(), Path(scratch), args.rehearse, environment, site))
    accepted = (OK, ABSENT) if args.rehearse else (OK,)
    return 0 if all(stage.status in accepted for stage in stages) else 1


if __name__ == "__main__":
    sys.exit(main())
