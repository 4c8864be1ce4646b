"""CUDA kernels on the CPU: builds tests/simt and runs its programs under several schedules. docs/testing.md."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "tests" / "simt"
BUILD = ROOT / "build" / "simt"
SCHEDULES = [("forward", 0), ("reverse", 0), ("shuffled", 1), ("shuffled", 2)]
PROGRAMS = sorted(p.stem for p in SOURCES.glob("*.cpp"))
FAULT = re.compile(r'^ *\{"(\w+)", *"([^"]+)",', re.MULTILINE)
FAULTS = [
    (source.stem, name, message)
    for source in sorted(SOURCES.glob("faults*.cu"))
    for name, message in FAULT.findall(source.read_text())
]


def cuda_include() -> Path | None:
    """The folder of cuda_runtime_api.h: CUDA_HOME's, nvcc's, or /usr/local/cuda*'s."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    if nvcc := shutil.which("nvcc"):
        homes.append(Path(nvcc).resolve().parent.parent)
        found = re.search(r"^exec (\S+)/bin/nvcc", Path(nvcc).read_bytes()[:4096].decode("latin-1"), re.MULTILINE)
        homes += [Path(found.group(1))] if found else []  # a wrapper script
    homes += sorted(Path("/usr/local").glob("cuda*"))
    for home in homes:
        for include in (home / "include", home / "targets" / "x86_64-linux" / "include"):
            if (include / "cuda_runtime_api.h").exists():
                return include
    return None


@pytest.fixture(scope="session")
def programs() -> Path:
    """The folder of the built programs."""
    include = cuda_include()
    missing = [tool for tool in ("g++", "cmake", "ninja") if not shutil.which(tool)]
    if include is None:
        missing.append("the headers of a CUDA toolkit (CUDA_HOME)")
    if missing:
        reason = f"the SIMT harness needs {', '.join(missing)}"
        if os.environ.get("CI") and shutil.which("nvcc"):
            pytest.fail(reason)
        pytest.skip(reason)
    configure = ["cmake", "-S", str(SOURCES), "-B", str(BUILD), "-G", "Ninja", "-DCMAKE_CXX_COMPILER=g++"]
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:  # pytest-xdist's workers build it once, not at the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in ([*configure, f"-DSIMT_CUDA_INCLUDE={include}"], ["cmake", "--build", str(BUILD)]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    return BUILD


def run(program: Path, *arguments: str, schedule: tuple[str, int]) -> subprocess.CompletedProcess[str]:
    kind, seed = schedule
    env = {**os.environ, "SIMT_SCHEDULE": kind, "SIMT_SEED": str(seed)}
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=env, timeout=300)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s[0]}{s[1] or ''}")
@pytest.mark.parametrize("name", PROGRAMS)
def test_kernels(programs, name, schedule):
    done = run(programs / name, schedule=schedule)
    assert done.returncode == 0, done.stdout + done.stderr


def test_tables_of_faults_are_read():
    for source in SOURCES.glob("faults*.cu"):
        rows = re.findall(r'^ *\{"\w+",', source.read_text(), re.MULTILINE)
        assert len(rows) == sum(program == source.stem for program, _, _ in FAULTS) > 0


@pytest.mark.parametrize(("program", "name", "message"), FAULTS, ids=[name for _, name, _ in FAULTS])
def test_planted_fault_is_reported_and_its_sound_twin_is_not(programs, program, name, message):
    for schedule in SCHEDULES:
        sound = run(programs / program, name, "sound", schedule=schedule)
        assert sound.returncode == 0, f"{schedule}: {sound.stderr}"
        planted = run(programs / program, name, "planted", schedule=schedule)
        assert planted.returncode not in (0, 2), f"{schedule}: not reported"
        assert message in planted.stderr, f"{schedule}: {planted.stderr}"
