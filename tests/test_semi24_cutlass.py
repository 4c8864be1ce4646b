"""Layout sm90 is what CUTLASS' kernel reads: compress24 against CuTe's own layout types, compiled for the host."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import slkernels
import torch
from test_simt import cuda_include

ROOT = Path(__file__).resolve().parent.parent


def cutlass_include() -> Path | None:
    """As cmake/cutlass.cmake looks for it."""
    places = [Path(os.environ["SLKERNELS_CUTLASS_DIR"])] if os.environ.get("SLKERNELS_CUTLASS_DIR") else []
    places.append(ROOT / "third_party" / "cutlass")
    if spec := importlib.util.find_spec("cutlass_library"):
        places.append(Path(spec.origin).parent / "source")
    folders = [folder for place in places for folder in (place / "include", place)]
    return next((folder for folder in folders if (folder / "cutlass" / "cutlass.h").exists()), None)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    cuda, cutlass = cuda_include(), cutlass_include()
    if not (shutil.which("g++") and cuda and cutlass):
        pytest.skip("needs g++, the headers of a CUDA toolkit (CUDA_HOME) and of CUTLASS (nvidia-cutlass)")
    binary = tmp_path_factory.mktemp("cutlass") / "semi24_layout_sm90"
    folders = [f"-I{ROOT / 'include'}", "-isystem", cutlass, "-isystem", cuda, "-isystem", cuda / "cccl"]
    source = ROOT / "tests" / "cutlass" / "semi24_layout_sm90.cpp"
    done = subprocess.run(["g++", "-std=c++17", *folders, source, "-o", binary], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return binary


@pytest.mark.parametrize(("n", "m"), [(64, 128), (192, 384)])
def test_packer_writes_what_cutlass_reads(program, n, m):
    done = subprocess.run([program, str(n), str(m)], capture_output=True, text=True, check=True)
    at = torch.tensor([[int(word) for word in line.split()] for line in done.stdout.splitlines()])
    at_value, at_byte, at_bit = at.view(n, m // 4, 3).unbind(2)

    w = torch.randn(n, m, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = slkernels.prune24(w)
    plain_values, plain_meta = slkernels.compress24(w, mask, "plain")
    codes = torch.stack([plain_meta & 15, plain_meta >> 4], 2).view(n, m // 4)
    values, meta = slkernels.compress24(w, mask, "sm90")
    assert torch.equal((meta.view(torch.uint8).view(-1)[at_byte] >> at_bit) & 15, codes)
    kept = torch.stack([values.view(-1)[at_value], values.view(-1)[at_value + 1]], 2)
    assert torch.equal(kept.view(n, m // 2), plain_values)
    assert len(set(zip(at_byte.view(-1).tolist(), at_bit.view(-1).tolist(), strict=True))) == meta.numel() * 2
