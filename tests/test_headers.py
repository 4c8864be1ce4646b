"""Every public header compiles alone."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

INCLUDE = Path(__file__).parents[1] / "include"
COMPILER = shutil.which("g++") or shutil.which("c++")
# ptx/ and tensor_map.h are device code: nvcc and the harness of tests/simt compile them.
HEADERS = sorted(h for h in INCLUDE.rglob("*.h") if h.parent.name != "ptx" and h.name != "tensor_map.h")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("header", HEADERS, ids=lambda p: p.name)
def test_self_contained(header: Path) -> None:
    command = [
        COMPILER,
        "-std=c++17",
        "-fsyntax-only",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-I",
        str(INCLUDE),
        "-x",
        "c++",
        "-",
    ]
    source = f'#include "{header.relative_to(INCLUDE)}"\n#include "{header.relative_to(INCLUDE)}"\n'
    result = subprocess.run(command, input=source, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr


def test_there_are_headers() -> None:
    assert len(HEADERS) >= 2
