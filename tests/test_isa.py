"""The numeric tests again, for each instruction set that is compiled in but not the best one of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import slkernels

TESTS = Path(__file__).parent
FILES = [
    "test_attention.py",
    "test_attention_states.py",
    "test_lowrank.py",
    "test_project.py",
    "test_project_quant.py",
    "test_project_random.py",
    "test_semi24.py",
    "test_semi24_linear.py",
    "test_sl.py",
    "test_sparse.py",
    "test_sparse_compose.py",
]


def run(isa: str, *command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "SLKERNELS_CPU_ISA": isa}
    return subprocess.run([sys.executable, *command], env=environment, cwd=TESTS, text=True, capture_output=True)


def available(isa: str) -> bool:
    return run(isa, "-c", "import slkernels; slkernels.build_info()").returncode == 0


@pytest.mark.parametrize("isa", slkernels.build_info()["cpu_isas"])
def test_numbers_of_isa(isa: str) -> None:
    if isa == slkernels.build_info()["cpu_isa"]:
        pytest.skip("the other tests run on it")
    if not available(isa):
        pytest.skip("not on this machine")
    paths = [str(TESTS / name) for name in FILES]
    result = run(isa, "-m", "pytest", "-q", "-x", "-k", "numeric", "-p", "no:cacheprovider", *paths)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def test_unknown_isa_is_an_error() -> None:
    result = run("sse9", "-c", "import slkernels; slkernels.build_info()")
    assert result.returncode != 0
    assert "SLKERNELS_CPU_ISA=sse9 is not available on this machine; choose one of: " in result.stderr
